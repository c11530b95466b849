"""One run at a time in a run folder.

The process of rank 0 holds a lock on RUN/lock for as long as it lives; the system releases it,
however the process ends. It is a POSIX record lock: loader workers do not inherit it, so they
cannot outlive their run with it, and network file systems know it.
"""

import errno
import logging
import os
import socket
import time

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import naming

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart
    fcntl = None

logger = logging.getLogger(__name__)

FILE = "lock"

# A killed run's processes take a moment to end.
WAIT_SECONDS = 5.0
POLL_SECONDS = 0.1

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of one run folder, which must exist.

    Raises:
        InputError: another process holds it, which the message names, or the lock file cannot be
            written.
    """

    def __init__(self, folder: str):
        try:
            self._file = open(os.path.join(folder, FILE), "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"cannot write the run folder {folder}: {error.strerror}; give another one by "
                "-output"
            ) from None
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._acquire():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise InputError(
                    f"{folder} is in use by {holder}; wait until that run has ended, or name "
                    "another folder by -output"
                )
            time.sleep(POLL_SECONDS)
        self._file.truncate(0)  # in append mode, so the text goes to the start
        holder = f"process {os.getpid()} on {socket.gethostname()}\n"
        with naming(self._file.name):
            os.write(self._file.fileno(), holder.encode())  # a buffer would be written again

    def _acquire(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning(
                "%s cannot be locked (%s): a second run in it would not be noticed",
                self._file.name,
                error.strerror,
            )
        return True

    def release(self) -> None:
        """Let others have the folder. The file stays: removing it would race with them."""
        self._file.close()
