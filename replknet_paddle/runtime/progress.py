"""How far a loop is: one line for all commands, what matters first, then numbers, the bar last.

On a terminal the line is redrawn in place, at most ten times a second, and is gone when the loop
ends or fails. Anywhere else there is a plain line for each tenth of the way, but none within five
seconds of the start or of the last one, so that short loops say nothing.
"""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from replknet_paddle.runtime.terminal import printable

REDRAWS_PER_SECOND = 10
LINE_SECONDS = 5.0  # between plain lines
FREE_COLUMNS = 3  # on the right, where a terminal echoes "^C" without breaking the line
SMALLEST_BAR = " |###|"


class Bar(tqdm):
    """The line of one loop, which runs inside `with`: an exception clears it before its message.

    Args:
        title: what is under way.
        total: how many there are; None where that is unknown.
        unit: what is counted, in the plural.
        per_unit: how many of what is counted make one that is shown, such as 10**6 bytes.
        done: how many were done before.
        stream: where the line goes, standard error by default.
        say: gets each plain line where `stream` is not a terminal; by default they are printed.
    """

    monitor_interval = 0  # tqdm's thread redraws whenever it likes, even after an interruption

    def __init__(
        self,
        title: str,
        *,
        total: int | None,
        unit: str,
        per_unit: int = 1,
        done: int = 0,
        stream: TextIO | None = None,
        say: Callable[[str], None] | None = None,
    ):
        stream = stream or sys.stderr
        self.title, self.unit, self.per_unit = printable(title), unit, per_unit
        self.say = say or (lambda line: print(line, file=stream, flush=True))
        self.is_on_terminal = stream.isatty()
        self.is_visible = False
        self.drawn_at: deque[float] = deque(maxlen=REDRAWS_PER_SECOND)
        self.first: tuple[float, int] | None = None  # when `show` was called first, and with what
        self.tenths, self.said_at = 0, time.monotonic()
        self.n, self.total = done, total
        self.parts: Sequence[str] = [self._count()]
        super().__init__(
            total=total,
            initial=done,
            unit=unit,
            file=stream,
            disable=not self.is_on_terminal,
            leave=False,
        )

    def show(self, done: int, parts: Sequence[str] | None = None) -> None:
        """Show that `done` are done, and `parts`, the most important one first, or by default their
        number, the speed since the first call, and the time left."""
        now = time.monotonic()
        self.n = done
        if self.total is not None:
            self.total = max(self.total, done)  # a folder may have got more files meanwhile
        self.first = self.first or (now, done)
        self.parts = self._numbers(now) if parts is None else parts
        if self.is_on_terminal:
            self.refresh()
        elif self.total:
            tenths = 10 * done // self.total
            if tenths > self.tenths and now - self.said_at >= LINE_SECONDS:
                self.tenths, self.said_at = tenths, now
                self.say(", ".join([f"{self.title}: {100 * done // self.total} %", *self.parts]))

    def over(self, items: Iterable) -> Iterator:
        """Yield `items`, and show after each of them how many are done."""
        with self:
            for done, item in enumerate(items, start=1):
                yield item
                self.show(done)

    def _numbers(self, now: float) -> list[str]:
        parts = [self._count()]
        began, done_before = self.first
        if self.n > done_before and now > began:
            speed = (self.n - done_before) / (now - began)
            parts.append(per_second(speed / self.per_unit, self.unit))
            if self.total is not None:
                parts.append(f"{duration((self.total - self.n) / speed)} left")
        return parts

    def _count(self) -> str:
        counts = [self.n] if self.total is None else [self.n, self.total]
        shown = (f"{n:,}" if self.per_unit == 1 else f"{n / self.per_unit:,.1f}" for n in counts)
        return f"{'/'.join(shown)} {self.unit}"

    # ---- what tqdm calls to draw

    def __str__(self) -> str:
        """Return the line, as wide as the terminal but for `FREE_COLUMNS`. Parts that do not fit
        are left out, from the last one on."""
        width = max(1, self.columns - FREE_COLUMNS)
        text = disp_trim(self.title, width)
        for part in self.parts:
            if disp_len(f"{text}  {part}{SMALLEST_BAR}") > width:
                break
            text += f"  {part}"
        room = width - disp_len(text)
        if self.total and room >= len(SMALLEST_BAR):
            cells = room - len(" ||")
            text += f" |{'#' * (cells * self.n // self.total):{cells}}|"
        return text + " " * (width - disp_len(text))

    @property
    def columns(self) -> int:
        """How wide the terminal is now."""
        with contextlib.suppress(OSError):  # the terminal is gone
            return os.get_terminal_size(self.fp.fileno()).columns or 80
        return 80

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the line, or clear all that is there where `msg` is empty."""
        self.fp.write("\r" + (str(self) if msg is None else " " * (self.columns - 1)))
        self.fp.flush()
        return True

    def refresh(self, nolock: bool = False, lock_args=None) -> bool:
        """Redraw the line where that is due. tqdm does so as well after each line above it."""
        now = time.monotonic()
        seconds = [now - drawn_at for drawn_at in self.drawn_at]  # the longest time first
        is_often = len(seconds) == REDRAWS_PER_SECOND and seconds[0] < 1
        if is_often or self.is_visible and seconds[-1] < 1 / REDRAWS_PER_SECOND:
            return False
        self.drawn_at.append(now)
        self.is_visible = True
        return super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Clear the line, and put the cursor at its beginning."""
        if not self.disable and self.is_visible:
            self.is_visible = False
            self.display("")
            self.fp.write("\r")


def above_bars(stream: TextIO) -> contextlib.AbstractContextManager:
    """Return a context in which what is written to `stream` stands above the bar of a terminal."""
    return Bar.external_write_mode(file=stream) if stream.isatty() else contextlib.nullcontext()


def print_above(text: object, file: TextIO | None = None) -> None:
    """Print a line on `file`, standard output by default, above the bar if there is one."""
    file = file or sys.stdout
    with above_bars(file):
        print(text, file=file)


def per_second(speed: float, unit: str) -> str:
    """Return a speed with three digits or more: "0.0312 images/s", "1,812 images/s"."""
    return f"{speed:{',.0f' if speed >= 100 else '.3g'}} {unit}/s"


class LogLines(logging.StreamHandler):
    """Writes log lines, on standard error by default, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with above_bars(self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # else nobody reads the console any more
            super().handleError(record)


def duration(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
