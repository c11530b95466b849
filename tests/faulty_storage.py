"""Storage that fails or hangs, by an `open` that is patched in a run and in the workers it forks.

Each function of arguments takes the place of `main_status` in `harness.Run`.
"""

import builtins
import errno
import os
import time

from harness import main_status


class _BrokenFile:
    """A file that opens and cannot be read."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def patch_open(fault) -> None:
    """Let `open` do as `fault(path)` says of an image: None, or what happens instead."""
    really_open = builtins.open

    def faulty_open(file, *args, **kwargs):
        instead = fault(file) if str(file).endswith(".jpg") else None
        return really_open(file, *args, **kwargs) if instead is None else instead()

    builtins.open = faulty_open


def fail_to_open():
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


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

    def fault(_):
        nonlocal reads, first
        reads += 1
        if reads % 100 != 37 or (first is not None and time.monotonic() > first + 1):
            return None
        first = first or time.monotonic()
        with os.fdopen(os.open(faults, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(f"{os.getpid()}\n")
        return fail_to_open if reads % 200 == 37 else _BrokenFile

    patch_open(fault)
    return main_status(arguments)


def break_for_ever() -> None:
    """One image gives EIO whenever it is read; the pauses are a tenth of the real ones."""
    from replknet_paddle.data import storage

    storage.PAUSES_SECONDS = tuple(pause / 10 for pause in storage.PAUSES_SECONDS)
    patch_open(lambda path: _BrokenFile if path.endswith("0020.jpg") else None)


def broken_for_ever(arguments) -> int:
    """A run with `break_for_ever`."""
    break_for_ever()
    return main_status(arguments)


def hanging(arguments) -> int:
    """A worker blocks for ever in the read of one training image."""
    patch_open(lambda path: hang if path.endswith("train/class 0/0020.jpg") else None)
    return main_status(arguments)


def hanging_unkillably(arguments) -> int:
    """Likewise, and the worker survives SIGKILL, as one that waits in the kernel does."""
    from multiprocessing.process import BaseProcess

    from replknet_paddle.data import loader

    loader.KILL_SECONDS = 1
    BaseProcess.kill = lambda self: None
    return hanging(arguments)
