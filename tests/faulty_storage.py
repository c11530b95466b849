"""Storage that fails or hangs, by one `open` that injects faults, here and in forked processes.

A fault is a function of a path: None where all is well, else what is called instead of `open`. The
functions of arguments take the place of `main_status` in `harness.Run`.
"""

import builtins
import errno
import os
import time

from harness import main_status


def patch_open(fault, monkeypatch=None, *, pauses=None) -> None:
    """Let `open` do as `fault(path)` says, for good or until `monkeypatch` is undone.

    Args:
        pauses: of `retry_io`, seconds; None: the real ones.
    """
    from replknet_paddle.data import lists

    set_ = monkeypatch.setattr if monkeypatch else setattr
    set_(builtins, "open", faulty(builtins.open, fault))
    if pauses is not None:
        set_(lists, "PAUSES_SECONDS", pauses)


def faulty(really, fault):
    """`really`, a function of a path, as `fault` lets it be."""

    def function(path, *args, **kwargs):
        instead = fault(str(path))
        return really(path, *args, **kwargs) if instead is None else instead()

    return function


def on(ending: str, instead):
    """The fault of paths with this ending."""
    return lambda path: instead if path.endswith(ending) else None


def fail(number: int = errno.EIO):
    """A call that fails with this error."""

    def call():
        raise OSError(number, os.strerror(number))

    return call


class BrokenFile:
    """A file that opens and cannot be read."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    read = staticmethod(fail())


def hang():
    """A read that the kernel never answers, until the process is killed."""
    reader, _writer = os.pipe()
    return os.read(reader, 1)


def flaky_for_a_second(arguments) -> int:
    """1 % of a worker's reads fail, in turn as the file is opened and read, for a second.

    Each failure is a line of the file FAULTS.
    """
    faults = os.environ["FAULTS"]
    reads, first = 0, None

    def fault(path):
        nonlocal reads, first
        if not path.endswith(".jpg"):
            return None
        reads += 1
        if reads % 100 != 37 or (first is not None and time.monotonic() > first + 1):
            return None
        first = first or time.monotonic()
        with os.fdopen(os.open(faults, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(f"{os.getpid()}\n")
        return fail(errno.ESTALE) if reads % 200 == 37 else BrokenFile

    patch_open(fault)
    return main_status(arguments)


def break_for_ever() -> None:
    """One image gives EIO whenever it is read; the pauses are a tenth of the real ones."""
    patch_open(on("0020.jpg", BrokenFile), pauses=(0.1, 3))


def broken_for_ever(arguments) -> int:
    """A run with `break_for_ever`."""
    break_for_ever()
    return main_status(arguments)


def hanging(arguments) -> int:
    """A worker blocks for ever in the read of one training image."""
    patch_open(on("train/class 0/0020.jpg", hang))
    return main_status(arguments)
