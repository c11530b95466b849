"""Processes that end with the one that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

# Looked up here, because between fork and exec as little as possible may be called.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int | None = None) -> None:
    """Let the system kill this process as soon as its parent has ended. Linux only.

    Args:
        parent: process id of the parent, where it is known; it may have ended already.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)
