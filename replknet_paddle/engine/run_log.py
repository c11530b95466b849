"""What a run writes besides checkpoints: console, log.txt, metrics.jsonl, config.yaml.

Rank 0 writes all of them; other ranks log only errors. On a terminal a progress bar shows the
batches, elsewhere plain lines do, so that log files stay readable.
"""

import contextlib
import errno
import fcntl
import json
import logging
import logging.handlers
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from replknet_paddle.checkpoints.checkpoint_file import WEIGHTS, CheckpointFile, config_text
from replknet_paddle.checkpoints.run_folder import (
    Progress,
    checkpoints,
    is_same,
    run_folder_of,
)
from replknet_paddle.data.class_names import CLASS_NAMES_FILE
from replknet_paddle.engine.signals import Stopped
from replknet_paddle.engine.train import DivergedError
from replknet_paddle.runtime.errors import OUT_OF_MEMORY, InputError, SystemFault
from replknet_paddle.runtime.files import (
    append_whole,
    command_line,
    json_text,
    path_in_error,
    write_text,
)
from replknet_paddle.runtime.launch import TERMINAL_VARIABLE, lost_peer
from replknet_paddle.runtime.machines import is_launched
from replknet_paddle.runtime.packages import import_extra
from replknet_paddle.runtime.progress import Bar, LogLines, duration
from replknet_paddle.runtime.terminal import Terminal, escaped

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
CONFIG_FILE = "config.yaml"
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

# Bytes of RUN/lock: a launcher locks the first, rank 0 of what it launched the second, and a run in
# one process, which is both, both.
LAUNCHER, LAUNCHED, ALONE = (0, 1), (1, 1), (0, 2)  # start, length

WAIT_SECONDS = 5.0  # a killed run's processes take a moment to end
POLL_SECONDS = 0.1

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# What `Progress.best_score` is, by MODEL.TYPE or TRAIN.BEST_BY; others have their own names.
MEASURES = {"UPerNet": "mIoU", "top1": "top-1"}


class RunLock:
    """The right to write into a run folder, which is made if it does not exist.

    The process that starts a run holds a lock on RUN/lock for as long as it lives, and so does the
    process of rank 0. The system releases it, however the process ends. These are POSIX record
    locks: loader workers do not inherit them, so they cannot outlive their run with one, and
    network file systems know them. A process must not have two of one folder: closing one would
    release the other.

    `part` is LAUNCHER, LAUNCHED or ALONE. `resume` is what MODEL.RESUME names; 'auto', or a
    checkpoint of this folder, continues its run. InputError: another process holds the folder; it
    cannot be written; or another run's checkpoints are in it, which would be replaced.
    """

    def __init__(self, folder: str, part: tuple[int, int] = ALONE, *, resume: str | None = None):
        self.folder, self.part = folder, part
        self.path = os.path.join(folder, "lock")
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
        continues = resume == "auto" or (
            resume is not None and is_same(run_folder_of(resume), folder)
        )
        others = checkpoints(folder)
        if self._made_folder and others:  # another run came first, and has ended
            self._made_folder = self._made_file = False
        if others and not continues:
            self.withdraw()
            raise InputError(
                f"{folder} holds the checkpoints of another run; -resume {folder} continues "
                "it, another -output starts a new one"
            )

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
                self.release()
                raise InputError(
                    f"{self.folder} is in use by {holder}; wait until that run has ended, or name "
                    "another folder by -output"
                )
            time.sleep(POLL_SECONDS)

    def _acquire(self) -> bool:
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
        """Whether the locked file still has its name; else, its successor is opened. A run that
        fails at once takes the folder away that it has made."""
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
        """Remove the folder with what a run begins with, or the lock file, if this lock made it."""
        names = (LOG_FILE, CONFIG_FILE, CLASS_NAMES_FILE) if self._made_folder else ()
        made = [os.path.join(self.folder, name) for name in names]
        for path in [*made, self.path] if self._made_file else made:
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._made_folder:
            with contextlib.suppress(OSError):
                os.rmdir(self.folder)
        self.release()


class Console(LogLines):
    """Log lines on the terminal or on standard output, each above the bar, if one is shown.

    Of a run in several processes, Paddle's launcher copies what rank 0 prints, line by line and
    some time later. Where the run was started on a terminal, rank 0 writes to that terminal itself.
    """

    def __init__(self, *, is_main: bool):
        terminal = os.environ.get(TERMINAL_VARIABLE)
        stream = sys.stdout
        if is_main and terminal is not None:
            number = os.open(terminal, os.O_WRONLY | os.O_NOCTTY)
            stream = os.fdopen(number, "w", 1, encoding="utf-8", errors="replace")
        super().__init__(Terminal(stream))
        self.setFormatter(logging.Formatter("%(message)s"))


class LogFile(logging.FileHandler):
    """log.txt. A line that cannot be written is left out: a full disk must not end the run here."""

    def format(self, record) -> str:
        return escaped(super().format(record))

    def handleError(self, record) -> None:
        pass


class RunLog:
    """Writes one run's folder and console. Ranks other than 0 log only errors, to the console.

    Nothing is written to disk before `open`, which is called once all input has been checked, and
    nothing at all where there is no folder.
    """

    def __init__(self, folder: str | None, *, resume: str | None = None, is_main: bool):
        self.folder, self.resume, self.is_main = folder, resume, is_main
        self.writes = is_main and folder is not None
        self.metrics_file = os.path.join(folder or "", "metrics.jsonl")
        self.file = self.step_file = self.visualdl = self.run_lock = None
        self.early = logging.handlers.MemoryHandler(capacity=10**6, flushOnClose=False)
        self.console = Console(is_main=is_main)
        root = logging.getLogger()
        for level_of in (root, logging.getLogger("replknet_paddle")):
            level_of.setLevel(logging.INFO if is_main else logging.ERROR)
        root.handlers[:] = [self.console, self.early]
        # Each rank reads images of its own.
        logging.getLogger("replknet_paddle.data.loader").setLevel(
            logging.INFO if is_main else logging.WARNING
        )

    def lock(self, *, makes_folder: bool = False) -> None:
        """Keep other runs out of an existing run folder until this process ends.

        To be called before it is read which checkpoint is the newest: a run that is just ending
        may still write one. A folder that does not exist yet is locked by `open`.
        """
        if not self.writes or self.run_lock is not None:
            return
        if makes_folder or os.path.isdir(self.folder):
            part = LAUNCHED if is_launched() else ALONE
            self.run_lock = RunLock(self.folder, part, resume=self.resume)

    def open(self, config, *, class_names=None) -> None:
        """Make the run folder: log.txt, config.yaml, which can stand for `-cfg`, and the names of
        the classes, where there are any, in class_names.txt."""
        root = logging.getLogger()
        root.removeHandler(self.early)
        if not self.writes:
            return
        self.lock(makes_folder=True)
        try:
            self.file = LogFile(os.path.join(self.folder, LOG_FILE), encoding="utf-8")
            self.file.setFormatter(logging.Formatter(LOG_FORMAT))
            root.addHandler(self.file)
            self.early.setTarget(self.file)
            self.early.flush()
            write_text(os.path.join(self.folder, CONFIG_FILE), config_text(config))
            if class_names is not None:
                text = "".join(f"{name}\n" for name in class_names)
                write_text(os.path.join(self.folder, CLASS_NAMES_FILE), text)
            if config.LOG.VISUALDL:
                visualdl = import_extra("visualdl", "plots")
                self.visualdl = visualdl.LogWriter(logdir=os.path.join(self.folder, "visualdl"))
        except (InputError, OSError):  # on a full disk the files would be empty
            self.run_lock.withdraw()
            raise

    @contextlib.contextmanager
    def log_how_it_ends(self) -> Iterator[None]:
        """Write an error that ends the run in this context to log.txt; who handles it prints it.
        What a collective raises when it has lost another process becomes PeerLost."""
        try:
            yield
        except BaseException as error:
            lost = lost_peer(error)
            if lost is not None:
                raise lost from None
            if self.file is not None and not isinstance(error, Stopped):
                is_message = isinstance(error, (InputError, OSError, SystemFault, DivergedError))
                reason = str(error) if is_message else traceback.format_exc()
                reason = OUT_OF_MEMORY if isinstance(error, MemoryError) else reason
                values = (logging.ERROR, __file__, 0, "the run ended: %s", (reason,), None)
                self.file.handle(logging.LogRecord(__name__, *values))
            raise

    def write_metrics(self, record: dict) -> None:
        """Append one object to metrics.jsonl, and its numbers to VisualDL's scalars."""
        if not self.writes:
            return
        append_whole(self.metrics_file, json_text(record) + "\n")
        if self.visualdl is not None:
            for tag, value in record.items():
                if tag != "epoch" and not isinstance(value, list):
                    self.visualdl.add_scalar(tag, value, record["epoch"])

    def forget_metrics_after(self, epoch: int) -> None:
        """Delete the records of epochs that a resumed run trains again."""
        if not self.is_main or not os.path.exists(self.metrics_file):
            return
        kept = []
        with open(self.metrics_file, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged by a crash
                    if json.loads(line)["epoch"] <= epoch and line.endswith("\n"):
                        kept.append(line)
        write_text(self.metrics_file, "".join(kept))

    def write_step(self, step: int) -> None:
        """Write the number of the last optimizer step to RUN/step. A restart compares the steps of
        two failures."""
        if self.is_main:
            path = os.path.join(self.folder, "step")
            with path_in_error(path):
                if self.step_file is None:
                    self.step_file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                os.pwrite(self.step_file, b"%-12d\n" % step, 0)

    def bar(self, title: str, *, total: int, unit: str, done: int = 0) -> Bar:
        """Return a progress bar on the console; without a terminal, its lines are logged."""
        return Bar(
            title, total=total, unit=unit, done=done, stream=self.console.stream, say=logger.info
        )

    def show_step(
        self, bar: Bar, numbers: Sequence[str], *, left: str, batch: int, is_due: bool
    ) -> None:
        """Show one step of an epoch on its bar, the last of `numbers` where there is room; without
        a terminal, in a line where one is due, or after the last `batch` of the epoch."""
        if bar.is_on_terminal:
            count = f"{batch:,}/{bar.total:,} batches"
            bar.show(batch, [f"{left} left", *numbers[:-1], count, numbers[-1]])
        elif is_due or batch == bar.total:
            text = ", ".join(numbers)
            logger.info("%s, batch %d/%d, %s, %s left", bar.title, batch, bar.total, text, left)

    def log_summary(
        self, config, progress: Progress, first_epoch: int, seconds: float, early: str = ""
    ) -> None:
        """Log what a finished run says last: how the epochs after `first_epoch` went in `seconds`,
        why it ended `early`, its files, what to do next."""
        if not self.is_main:
            return
        trained = "no epoch was left to train"
        if progress.epoch > first_epoch:
            count = progress.epoch - first_epoch
            epochs = f"epochs {first_epoch + 1} to" if count > 1 else "epoch"
            trained = f"trained {epochs} {progress.epoch} in {duration(seconds)}"
        logger.info("finished: %s%s", trained, early and f"; {early}")
        best = os.path.join(self.folder, "best")
        if progress.best_epoch is None or not os.path.isfile(best):
            return
        by = config.TRAIN.BEST_BY
        logger.info(
            "best: epoch %d, %s, %s %.2f %%, in %s",
            progress.best_epoch,
            WEIGHTS[CheckpointFile(best).ema_or_raw("auto")],
            MEASURES.get(config.MODEL.TYPE) or MEASURES.get(by, by),
            progress.best_score,
            best,
        )
        names = ("last", LOG_FILE, "metrics.jsonl", CLASS_NAMES_FILE, CONFIG_FILE)
        there = [name for name in names if os.path.isfile(os.path.join(self.folder, name))]
        logger.info("in %s: %s", self.folder, ", ".join(there))
        folder = os.path.abspath(self.folder)  # the command can be typed anywhere
        words = ["eval", folder, f"-report={os.path.join(folder, 'report')}"]
        logger.info("next: %s", command_line(*words))


def time_left(
    progress: Progress, *, epochs: int, every: int, batch_seconds: float, evaluation_seconds: float
) -> str:
    """Return as h:mm:ss how long the rest of a run of `epochs` takes, with an evaluation and its
    checkpoint after each `every` of them and after the last."""
    batches = (epochs - progress.epoch) * progress.batches - progress.batch
    evaluations = 0
    if progress.epoch < epochs:
        evaluations = epochs // every - progress.epoch // every + (epochs % every != 0)
    return duration(batches * batch_seconds + evaluations * evaluation_seconds)


def append_to_log(folder: str, message: str) -> None:
    """Append an error that rank 0 did not see to the log.txt of a run folder, if there is one: an
    error of another rank, or that a process was killed."""
    if message and os.path.isdir(folder):
        path = os.path.join(folder, LOG_FILE)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(escaped(f"{now} ERROR the run ended: {message.rstrip()}\n"))
