"""Storage that fails for a while: telling its errors from bad input, and trying again."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from replknet_paddle.runtime.errors import SystemFault

# Pauses between the attempts; after the last one the system is taken to have failed for good.
PAUSES_SECONDS = (0.5, 1, 2, 4, 8, 16)

# What a file system says of a path at which there is no file. Every other error number (EIO,
# ESTALE, EMFILE, ENFILE, ENOMEM, ETIMEDOUT, EACCES...) says nothing about the file's content.
_NO_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EILSEQ),
}

Result = TypeVar("Result")


def is_system_error(error: BaseException) -> bool:
    """Whether the system failed, rather than that a file is missing or damaged.

    Pillow's own OSErrors, about damaged content, have no error number.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _NO_FILE


def describe(error: BaseException) -> str:
    """An exception's message without the path, which other parts of a message name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def read_patiently(
    read: Callable[[], Result], what: str, failures: list[str] | None = None
) -> Result:
    """`read()`, repeated after `PAUSES_SECONDS` while the system fails.

    Args:
        read: reads files; must give the same when repeated.
        what: what is read, for messages.
        failures: gets a message for each attempt that failed and was followed by another.

    Raises:
        SystemFault: the last attempt failed as well.
        Exception: whatever else `read` raises, at the first attempt that does.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not is_system_error(error):
                raise
            if pause is None:
                raise SystemFault(
                    f"cannot read {what}: {describe(error)}, in {len(PAUSES_SECONDS) + 1} attempts "
                    f"over {sum(PAUSES_SECONDS):g} s. This is a failure of the system, not of the "
                    "data: check the disk, the network share, the memory and the file limit"
                ) from error
            if failures is not None:
                failures.append(f"cannot read {what}: {describe(error)}")
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")
