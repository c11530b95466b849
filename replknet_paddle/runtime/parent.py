"""Processes that end with the one that started them, and hear of its signals."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

# Looked up here, because between fork and exec as little as possible may be called.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def end_with_parent(parent: int | None = None) -> None:
    """Let the system kill this process as soon as its parent has ended. Linux only.

    Args:
        parent: process id of the parent, where it is known; it may have ended already.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)


@contextlib.contextmanager
def child_process(
    command: list[str], environment: dict[str, str], *, handed_on: int | None = None
) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """Run a command, in this context, that ends with this process.

    Args:
        handed_on: the signal that it gets for each SIGTERM and SIGINT; None: the same.

    Returns:
        The process, and the list of the signals that came in the context.
    """
    # It imports this very package, wherever it is started and whatever is installed.
    paths = [_PACKAGE_PARENT, *filter(None, [environment.get("PYTHONPATH")])]
    environment = {**environment, "PYTHONPATH": os.pathsep.join(paths)}
    child, received = None, []

    def hand_on(number, _):
        received.append(number)
        if child is not None:
            child.send_signal(handed_on or number)

    # Before it is started: Python loses a KeyboardInterrupt of that moment.
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # A session of its own: Ctrl-C reaches it once, from here, and not by the terminal as well.
        child = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )
        if received:
            child.send_signal(handed_on or received[0])
        yield child, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
