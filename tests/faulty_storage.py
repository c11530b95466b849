"""Storage that fails or hangs, by one `open` that injects faults, here and in forked processes.

A fault is a function of a path: None where all is well, else what is called instead of `open`.
"""

import builtins
import errno
import os
import time


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


def flaky(ending: str):
    """The fault of 1 % of the reads of each process, in turn as the file is opened and read, for a
    second."""
    reads, first = 0, None

    def fault(path):
        nonlocal reads, first
        reads += path.endswith(ending)
        if not path.endswith(ending) or reads % 100 != 37:
            return None
        first = first or time.monotonic()
        if time.monotonic() > first + 1:
            return None
        return fail(errno.ESTALE) if reads % 200 == 37 else BrokenFile

    return fault


def break_storage(ending: str, do: str) -> None:
    """Let paths with this ending do as `harness.install` has it: 'EIO', 'hang' or 'flaky'."""
    if do == "flaky":
        patch_open(flaky(ending))
    else:
        patch_open(on(ending, {"EIO": BrokenFile, "hang": hang}[do]), pauses=(0.1, 3))
