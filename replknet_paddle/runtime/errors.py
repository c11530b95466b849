"""The exceptions for mistakes in what a user gave: configs, lists, images, checkpoints; plurals.

Command lines print the message without a traceback and exit with status 2. A `SystemFault` is no
mistake of the user: its message is printed as well, and the status is 1, after which `MAX_RESTARTS`
starts a run again. Any other exception that escapes is a defect of the program and keeps its
traceback.
"""

import difflib
from collections.abc import Iterable

OUT_OF_MEMORY = "out of memory; smaller batches, images or networks take less"


class InputError(ValueError):
    """Input that cannot be used. The message names the thing, its value, and what is allowed."""


class SampleError(InputError):
    """An image that cannot be read. The message names the list, the line and the path."""


class SystemFault(RuntimeError):
    """The system, not the input, failed: a disk, memory, a file limit. A restart may succeed."""


class PeerLost(SystemFault):
    """The connection to another process of this run is lost, which has left no exit status: it was
    killed, or has not answered for half a minute."""


def counted(count: int, noun: str) -> str:
    """Return a count of things for a message: "1 class", "2 classes", "0 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def did_you_mean(word: str, allowed: Iterable[str], place: str = "") -> str:
    """Return the end of a message, "; did you mean NAME?", with the allowed name that is most like
    `word`, whatever the case, after `place`; or "" if none is like it."""
    by_upper = {name.upper(): name for name in allowed}
    near = difflib.get_close_matches(word.upper(), by_upper, n=1)
    return f"; did you mean {place}{by_upper[near[0]]}?" if near else ""
