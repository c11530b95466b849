"""One run at a time in a run folder.

The process that starts a run holds a lock on RUN/lock for as long as it lives, and so does the
process of rank 0: whoever holds one of the two may write into the folder. The system releases it,
however the process ends. These are POSIX record locks: loader workers do not inherit them, so they
cannot outlive their run with one, and network file systems know them.
"""

import contextlib
import errno
import logging
import os
import socket
import time

from replknet_paddle.runtime.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: runs are not kept apart
    fcntl = None

logger = logging.getLogger(__name__)

FILE = "lock"

# Bytes of the file: a launcher locks the first, rank 0 of what it launched the second, and a run in
# one process, which is both, both.
LAUNCHER, LAUNCHED, ALONE = (0, 1), (1, 1), (0, 2)  # start, length

# A killed run's processes take a moment to end.
WAIT_SECONDS = 5.0
POLL_SECONDS = 0.1

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of one run folder, which is made if it does not exist.

    A process must not have two of one folder: closing one would release the other.

    Args:
        part: LAUNCHER, LAUNCHED or ALONE.

    Raises:
        InputError: another process holds it, which the message names, or the folder cannot be
            written.
    """

    def __init__(self, folder: str, part: tuple[int, int] = ALONE):
        self.folder = folder
        self.path = os.path.join(folder, FILE)
        self.part = part
        self._file = None
        try:
            self._open()
            self._wait()
            self._file.truncate(0)  # in append mode, so the text goes to the start
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            os.write(self._file.fileno(), holder.encode())  # a buffer would be written again
        except OSError as error:
            self.withdraw()
            raise InputError(
                f"cannot write the run folder {folder}: {error.strerror}; give another one by "
                "-output"
            ) from None

    def _open(self) -> None:
        self._made_folder = self._made_file = False
        os.makedirs(os.path.dirname(os.path.abspath(self.folder)), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder)
            self._made_folder = True
        with contextlib.suppress(FileExistsError):
            open(self.path, "x").close()
            self._made_file = True
        self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115

    def _wait(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self._acquire() or not self._is_there():
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise InputError(
                    f"{self.folder} is in use by {holder}; wait until that run has ended, or name "
                    "another folder by -output"
                )
            time.sleep(POLL_SECONDS)

    def _acquire(self) -> bool:
        if fcntl is None:
            return True
        start, length = self.part
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning(
                "%s cannot be locked (%s): a second run in it would not be noticed",
                self.path,
                error.strerror,
            )
        return True

    def _is_there(self) -> bool:
        """Whether the file that is locked still has its name; else, that of its successor is
        opened. A run that fails at once takes the folder away that it has made."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return True
        self._file.close()
        self._open()
        return False

    def release(self) -> None:
        """Let others have the folder. The file stays: removing it would race with them."""
        if self._file is not None:
            self._file.close()

    def withdraw(self) -> None:
        """Remove the file and the folder, where this lock has made them, and let go of them."""
        with contextlib.suppress(OSError):
            if self._made_file:
                os.unlink(self.path)
            if self._made_folder:
                os.rmdir(self.folder)
        self.release()
