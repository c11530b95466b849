"""Timing on noisy machines: alternatives in turn, medians with their spread, and where it was."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy
import paddle

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import available_cores, processor_name


class Timing(NamedTuple):
    """Seconds of repeated runs: median, fastest, slowest, and how many."""

    median_seconds: float
    min_seconds: float
    max_seconds: float
    runs: int

    def __str__(self) -> str:
        median, low, high = (1e3 * value for value in self[:3])
        return f"median {median:.2f} ms ({low:.2f} to {high:.2f}, n = {self.runs})"


class Table:
    """A table that is printed row by row, so that a long measurement shows what it has.

    `columns` are widths by heading; below 0 for text, which stands on the left.
    """

    def __init__(self, columns: dict[str, int]):
        self.widths = list(columns.values())
        self.add(*columns)

    def add(self, *cells) -> None:
        """Print one row."""
        texts = (
            f"{cell:{'<' if width < 0 else '>'}{abs(width)}}"
            for cell, width in zip(map(str, cells), self.widths)
        )
        print(" ".join(texts).rstrip(), flush=True)


def time_in_turn(
    alternatives: dict[Hashable, Callable[[], object]],
    *,
    rounds: int,
    settle_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Hashable, list[float]]:
    """Return the seconds of each call, timed A B A B ..., so that a drift meets all alike.

    The first round does not count. A call ends when the device has done all its work.
    `settle_seconds` are for alternatives with thread pools of their own: a pause before each, and a
    call that is not timed. Idle threads of one pool keep spinning for a while, and take the cores
    from the next. `time.process_time` as the clock counts this process's own work alone.
    """
    seconds = {name: [] for name in alternatives}
    for turn in range(1 + rounds):
        for name, call in alternatives.items():
            if settle_seconds:
                time.sleep(settle_seconds)
                call()
            start = clock()
            call()
            if paddle.device.get_device() != "cpu":
                paddle.device.synchronize()
            if turn > 0:
                seconds[name].append(clock() - start)
    return seconds


def summarize(seconds: list[float]) -> Timing:
    """Return the figures to quote of a list of measured seconds."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def median_ratio(seconds: list[float], baseline: list[float]) -> float:
    """Return the median ratio of neighbouring runs, which a drift of the machine does not move."""
    return statistics.median(a / b for a, b in zip(seconds, baseline))


def check_counts(**counts: int) -> None:
    """Raise InputError for a number of rounds or images below 1, by the name of its flag."""
    if min(counts.values()) < 1:
        given = " ".join(f"-{name} {value}" for name, value in counts.items())
        raise InputError(f"{given}; allowed: integers >= 1")


def describe_machine() -> str:
    """Return processor, cores that this process may use, and versions, in one line."""
    return (
        f"{processor_name()}, {available_cores()} cores, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, "
        f"{paddle.device.get_device()}, Python {platform.python_version()}, "
        f"Paddle {paddle.__version__}, numpy {numpy.__version__}"
    )
