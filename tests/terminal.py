"""A terminal: what a program that writes to one leaves on the screen."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import time

import pytest
from tiny import ROOT

COLUMNS = 150


class Screen:
    """Lines as a terminal shows them after carriage returns and cursor movements."""

    def __init__(self):
        self.lines = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[^\x1b]", text):
            if part == "\x1b[A":
                self.row = max(0, self.row - 1)
            elif part == "\x1b[K":
                del self.lines[self.row][self.column :]
            elif part.startswith("\x1b["):
                assert part.endswith("m"), f"unknown control sequence {part!r}"
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append([])
            else:
                line = self.lines[self.row]
                line.extend(" " * (self.column + 1 - len(line)))
                line[self.column] = part
                self.column += 1

    def text(self) -> list[str]:
        """The lines that are not empty."""
        lines = ["".join(line).rstrip() for line in self.lines]
        return [line for line in lines if line]


class OnTerminal:
    """A program with a terminal for its output."""

    def __init__(self, command, **environment):
        try:
            self.terminal, program_end = pty.openpty()
        except OSError as error:  # a bare root file system without devpts
            pytest.skip(f"no terminal can be made here: {error}")
        fcntl.ioctl(program_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            stdout=program_end,
            stderr=program_end,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        os.close(program_end)
        os.set_blocking(self.terminal, False)
        self.raw = b""

    def read(self) -> None:
        """Take what has been written since."""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while piece := os.read(self.terminal, 65536):
                self.raw += piece

    def wait_for(self, condition, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            self.read()
            assert time.monotonic() < deadline, self.raw.decode(errors="replace")
            time.sleep(0.02)

    def finish(self, timeout: float = 120) -> int:
        """The exit status."""
        try:
            self.wait_for(lambda: self.process.poll() is not None, timeout)
        finally:
            self.process.kill()
        self.read()
        os.close(self.terminal)
        return self.process.returncode

    def screen(self) -> list[str]:
        screen = Screen()
        screen.feed(self.raw.decode("utf-8", "replace"))
        return screen.text()
