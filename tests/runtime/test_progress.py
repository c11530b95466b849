"""The line of progress: what is in it, how often it is drawn, and what is left of it at the end."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import unicodedata

import numpy as np
import pytest
from harness import screen
from hypothesis import example, given
from hypothesis import strategies as st

from replknet_paddle.runtime import progress
from replknet_paddle.runtime.progress import Bar, duration, print_above

# A long run on ImageNet, with each number at its longest.
STEP = ["12:31:31 left", "loss 6.9078", "lr 0.000412", "12,345 images/s", "4,545/5,004 batches"]
STEP.append("data wait 12%")
EPOCH = "epoch 299/300"


class Pty:
    """A terminal of so many columns: `stream` writes to it, `raw` returns what was written."""

    def __init__(self, columns: int):
        try:
            self.terminal, program_end = pty.openpty()
        except OSError as error:  # a bare root file system without devpts
            pytest.skip(f"no terminal can be made here: {error}")
        fcntl.ioctl(program_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.stream = os.fdopen(program_end, "w", encoding="utf-8")
        self.written = b""

    def read(self) -> None:
        """Read what has been written: writing to a terminal that nobody reads has to wait."""
        self.stream.flush()
        os.write(self.stream.fileno(), b"\0")
        while not self.written.endswith(b"\0"):
            self.written += os.read(self.terminal, 65536)
        self.written = self.written[:-1]

    def raw(self) -> str:
        self.read()
        return self.written.decode()

    def lines(self) -> list[str]:
        """All that ever stood on the line of the bar."""
        drawn = [line.rstrip() for line in re.split(r"[\r\n]", self.raw())]
        return [line for line in drawn if line]

    def close(self) -> None:
        self.stream.close()
        os.close(self.terminal)


@pytest.fixture
def terminal(request):
    with contextlib.closing(Pty(getattr(request, "param", 80))) as made:
        yield made


class Clock:
    """Stands for the module `time`: it goes on when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def columns_of(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "FW" else 1 for letter in text)


# ---- what is in the line


def test_a_step_of_training_at_80_and_at_120_columns():
    """The bar is last, parts are whole, and those that matter less are what 80 columns lack."""
    for columns, parts in ((80, STEP[:4]), (120, STEP)):
        with contextlib.closing(Pty(columns)) as terminal:
            with Bar(EPOCH, total=5004, unit="batches", stream=terminal.stream) as bar:
                bar.clear()
                bar.show(4545, STEP)
            shown = re.fullmatch(r"(.*) \|(#+) +\|", terminal.lines()[-1])
            assert shown and shown[1] == "  ".join([EPOCH, *parts])
            cells = columns - 3 - len(shown[1]) - len(" ||")
            assert len(shown[2]) == cells * 4545 // 5004


def test_the_number_done_the_speed_and_the_time_left(terminal, clock):
    with Bar("evaluation", total=50_000, unit="images", stream=terminal.stream) as bar:
        for done in (10_000, 10_500, 12_000):  # what came before the first is not of this speed
            clock.now += 10
            bar.show(done)
    begin, *_, fast, last = (line.split(" |")[0] for line in terminal.lines())
    assert begin == "evaluation  0/50,000 images"
    assert fast == "evaluation  10,500/50,000 images  50 images/s  0:13:10 left"
    assert last == "evaluation  12,000/50,000 images  100 images/s  0:06:20 left"


def test_bytes_are_shown_in_megabytes_even_if_nobody_knows_how_many(terminal, clock):
    with Bar("download", total=None, unit="MB", per_unit=10**6, stream=terminal.stream) as bar:
        for done in (0, 5_250_000):
            bar.show(done)
            clock.now += 2
    assert terminal.lines()[-1] == "download  5.2 MB  2.62 MB/s"


def test_slow_loops_have_speeds_that_are_not_zero_and_more_than_was_announced_is_no_error(
    terminal, clock
):
    with Bar("receptive field", total=2, unit="images", stream=terminal.stream) as bar:
        for done in (1, 2, 3):
            bar.show(done)
            clock.now += 32
    assert "3/3 images  0.0312 images/s  0:00:00 left |####" in terminal.lines()[-1]


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (360_000, "100:00:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


LETTERS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("写真ねこ고양이😀é\x1b\n\r"))
)


@example("写真", ["写真" * 18], 3, 80)
@given(LETTERS, st.lists(LETTERS, max_size=6), st.integers(0, 7), st.sampled_from([80, 120, 20, 4]))
def test_no_line_is_wider_than_the_terminal(title, parts, done, columns):
    """Nor does the "^C" that a terminal writes behind it break it."""
    with contextlib.closing(Pty(columns)) as terminal:
        parts = [progress.printable(part) for part in parts]
        with Bar(title, total=7, unit="images", stream=terminal.stream) as bar:
            bar.clear()
            bar.show(done, parts)
        raw = terminal.raw()
        assert "\n" not in raw and "\x1b" not in raw
        drawn = [line for line in raw.split("\r") if line.strip()]
        assert all(columns_of(line) + len("^C") < columns for line in drawn)


def test_a_terminal_that_is_resized_has_lines_of_its_new_width(terminal, clock):
    with Bar(EPOCH, total=5004, unit="batches", stream=terminal.stream) as bar:
        size = struct.pack("HHHH", 40, 40, 0, 0)
        fcntl.ioctl(terminal.stream.fileno(), termios.TIOCSWINSZ, size)
        before = len(terminal.lines())
        clock.now += 1
        bar.show(7, STEP)
    (line,) = terminal.lines()[before:]
    assert line == "epoch 299/300  12:31:31 left |      |"


def test_a_terminal_that_is_gone_ends_no_loop(clock):
    """As after the end of an SSH connection, under `nohup`."""
    terminal = Pty(80)
    with Bar("check", total=3, unit="files", stream=terminal.stream) as bar:
        os.close(terminal.terminal)
        clock.now += 1
        bar.show(1)
    with contextlib.suppress(OSError):
        terminal.stream.close()


# ---- how often it is drawn


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.0004, 0.03, 0.1, 0.7]), st.booleans()),
        min_size=50,
        max_size=150,
    )
)
def test_it_is_drawn_at_most_ten_times_in_any_second(events):
    """However fast the loop goes, and however many lines are printed above; but no redraw is left
    out for longer than a second."""
    with contextlib.closing(Pty(80)) as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "time", clock := Clock())
        drawn, display = [clock.now], Bar.display

        def noted(bar, msg=None, pos=None):
            if msg is None:
                drawn.append(clock.now)
            return display(bar, msg, pos)

        with Bar("check", total=1000, unit="files", stream=terminal.stream) as bar:
            patch.setattr(Bar, "display", noted)
            for done, (seconds, is_line) in enumerate(events):
                clock.now += seconds
                if is_line:
                    print_above("a line", terminal.stream)
                bar.show(done)
                assert clock.now - drawn[-1] < 1
                terminal.read()
    drawn = np.array(drawn)
    assert all((np.abs(drawn - begin - 0.5) < 0.4999).sum() <= 10 for begin in drawn - 1e-6)


def test_a_fast_loop_is_drawn_ten_times_a_second(terminal, clock):
    with Bar("check", total=3000, unit="files", stream=terminal.stream) as bar:
        for done in range(1, 3001):
            clock.now += 0.001
            bar.show(done)
            terminal.read()
    assert 28 <= len(terminal.lines()) <= 31


# ---- lines above it, and where there is no terminal


def test_lines_stand_alone_above_it(terminal, clock):
    with Bar("check", total=9, unit="files", stream=terminal.stream) as bar:
        for done in range(9):
            print_above(f"写真{done}.jpg", terminal.stream)
            bar.show(done)
        shown = screen(terminal.raw())
        assert shown[:-1] == [f"写真{done}.jpg" for done in range(9)]
        assert shown[-1].startswith("check  7/9 files") and shown[-1].endswith("|")
    assert screen(terminal.raw()) == shown[:-1]


def test_log_lines_stand_above_it(terminal, clock):
    log = logging.Logger("test")
    log.addHandler(progress.LogLines(terminal.stream))
    with Bar("check", total=9, unit="files", stream=terminal.stream):
        log.warning("a warning")
        assert [line.split("  ")[0] for line in screen(terminal.raw())] == ["a warning", "check"]


def test_results_that_go_elsewhere_do_not_redraw_it(terminal, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with open(tmp_path / "results", "w") as results, Bar("check", total=9, unit="files"):
        monkeypatch.setattr(sys, "stdout", results)
        before = terminal.raw()
        print_above("a line")
        assert terminal.raw() == before
    assert (tmp_path / "results").read_text() == "a line\n"


def test_elsewhere_there_is_a_plain_line_for_each_tenth(clock, capsys):
    with Bar("evaluation", total=2000, unit="images") as bar:
        for done in range(0, 2001, 40):
            bar.show(done)
            clock.now += 2
    out, lines = capsys.readouterr()
    assert out == "" and "\r" not in lines and "|" not in lines
    lines = lines.splitlines()
    assert len(lines) == 10
    assert lines[0] == "evaluation: 10 %, 200/2,000 images, 20 images/s, 0:01:30 left"
    assert [re.search(r"\d+ %", line)[0] for line in lines] == [f"{n}0 %" for n in range(1, 11)]


@pytest.mark.parametrize("total, seconds, count", [(1000, 0.004, 0), (3, 60, 2), (1000, 0.012, 2)])
def test_short_loops_say_nothing_and_slow_ones_whatever_they_do(total, seconds, count, clock):
    """Four seconds; three images of a minute each, the last of which needs no line; twelve."""
    stream = io.StringIO()
    for _ in Bar("check", total=total, unit="files", stream=stream).over(range(total)):
        clock.now += seconds
    assert stream.getvalue().count("\n") == count + (total == 3)


def test_lines_can_go_to_a_log(clock):
    said = []
    with Bar("evaluation", total=10, unit="images", stream=io.StringIO(), say=said.append) as bar:
        clock.now += 7
        bar.show(5)
    assert said == ["evaluation: 50 %, 5/10 images"]


# ---- the end


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, None])
def test_nothing_is_left_of_it_and_nothing_drawn_after_it(terminal, clock, error):
    """Not even what the terminal writes where Ctrl-C is pressed."""
    bar = Bar("check", total=9, unit="files", stream=terminal.stream)
    with contextlib.suppress(BaseException):
        for _ in bar.over(iterated(error, terminal)):
            clock.now += 1
    cleared = len(terminal.raw())
    print_above("interrupted", terminal.stream)
    clock.now += 1
    bar.show(9)
    bar.refresh()
    bar.close()
    assert terminal.raw()[cleared:] == "interrupted\r\n"
    assert screen(terminal.raw()) == ["interrupted"]


def iterated(error, terminal):
    yield from range(5)
    terminal.stream.write("^C")
    if error is not None:
        raise error
