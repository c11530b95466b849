"""What commands that classify and export share of standard output and standard error."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator


def log_to_stderr() -> None:
    """Show what deployment logs, such as the backend that `auto` takes.

    Comes before the import of Paddle, which would send it to standard output.
    """
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.addHandler(handler)
    logging.getLogger("replknet_paddle.deploy").setLevel(logging.INFO)


def until_interrupted(items: Iterable) -> Iterator:
    """`items` until Ctrl-C, which then is the way to end them."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        for item in items:
            if interrupted.is_set():
                return
            yield item
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def results_alone_on_stdout():
    """Send what libraries of C++ print to standard error, so that standard output has results."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        yield
        return
    sys.stdout.flush()
    stdout = sys.stdout
    with os.fdopen(os.dup(number), "w", encoding=stdout.encoding, errors=stdout.errors) as results:
        os.dup2(sys.stderr.fileno(), number)
        sys.stdout = results
        try:
            yield
            results.flush()
        finally:
            os.dup2(results.fileno(), number)
            sys.stdout = stdout


def printable(name: str) -> str:
    """The name of a file or class for a terminal, which it may hold commands for."""
    return name if name.isprintable() else ascii(name)
