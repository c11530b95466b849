"""What a run writes besides checkpoints: console, log.txt, metrics.jsonl, config.yaml.

Rank 0 writes all of them; other ranks log only errors. On a terminal a progress bar shows the
batches, elsewhere plain lines do, so that log files stay readable.
"""

import contextlib
import json
import logging
import logging.handlers
import math
import os
import time
import traceback
from collections.abc import Iterator

from tqdm import tqdm

from replknet_paddle.checkpoints.checkpoint_file import config_text
from replknet_paddle.checkpoints.run_folder import checkpoints, is_same, run_folder_of
from replknet_paddle.data.class_names import CLASS_NAMES_FILE
from replknet_paddle.engine.console import Console
from replknet_paddle.engine.run_lock import ALONE, LAUNCHED, RunLock
from replknet_paddle.engine.signals import Stopped
from replknet_paddle.engine.train import DivergedError
from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.files import append_whole, path_in_error, write_text
from replknet_paddle.runtime.launch import lost_peer
from replknet_paddle.runtime.machines import is_launched
from replknet_paddle.runtime.packages import import_extra

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
CONFIG_FILE = "config.yaml"
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def check_is_own(folder: str, *, resume: str | None) -> None:
    """Check that a run folder does not hold another run's checkpoints, which would be replaced.

    Args:
        resume: what MODEL.RESUME names; 'auto', or a checkpoint of this folder, continues the run.

    Raises:
        InputError: it does.
    """
    continues = resume == "auto" or (resume is not None and is_same(run_folder_of(resume), folder))
    if not continues and checkpoints(folder):
        raise InputError(
            f"{folder} holds the checkpoints of another run; -resume {folder} continues "
            "it, another -output starts a new one"
        )


def lock_run_folder(folder: str, part: tuple[int, int], *, resume: str | None) -> RunLock:
    """Lock a run folder, which is made if it is not there, and make its log.

    Args:
        part: as for `RunLock`.
        resume: as for `check_is_own`.

    Returns:
        The lock, until whose release or this process's end other runs are kept out.

    Raises:
        InputError: it cannot be written, holds another run, or is in use.
    """
    lock = RunLock(folder, part)
    with nothing_left_if_it_fails(lock):
        check_is_own(folder, resume=resume)
        make_log(folder)
    return lock


@contextlib.contextmanager
def nothing_left_if_it_fails(lock: RunLock) -> Iterator[None]:
    """Remove what a run begins with in its folder, as far as this context has made it, where an
    error ends it: on a full disk the files would be empty."""
    paths = [os.path.join(lock.folder, name) for name in (LOG_FILE, CONFIG_FILE, CLASS_NAMES_FILE)]
    new = [path for path in paths if not os.path.lexists(path)]
    try:
        yield
    except (InputError, OSError):
        for path in new:
            with contextlib.suppress(OSError):
                os.unlink(path)
        lock.withdraw()
        raise


def make_log(folder: str) -> None:
    """Make the log of a run folder, where it does not exist.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with open(os.path.join(folder, LOG_FILE), "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write the run folder {folder}: {error.strerror}; give another one by -output"
        ) from None


def json_text(value) -> str:
    """`value` as JSON, which has no word for a number that is not finite: it becomes null."""
    return json.dumps(_without_nan(value))


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def visualdl_writer(folder: str):
    """VisualDL's writer of scalars.

    Raises:
        InputError: VisualDL is not installed.
    """
    return import_extra("visualdl", "plots").LogWriter(logdir=folder)


def append_to_log(folder: str, message: str) -> None:
    """Append an error that rank 0 did not see to the log.txt of a run folder, if there is one: an
    error of another rank, or that a process was killed."""
    path = os.path.join(folder, LOG_FILE)
    if message and os.path.exists(path):
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(f"{now} ERROR the run ended: {message.rstrip()}\n")


class LogFile(logging.FileHandler):
    """log.txt. A line that cannot be written is left out: a full disk must not end the run here."""

    def handleError(self, record) -> None:
        pass


class RunLog:
    """Writes one run's folder and console. Ranks other than 0 log only errors, to the console.

    Nothing is written to disk before `open`, which is called once all input has been checked.
    """

    def __init__(self, *, is_main: bool):
        self.folder = None
        self.file = None
        self.step_file = None
        self.metrics_jsonl = False
        self.visualdl = None
        self.is_main = is_main
        self.run_lock = None
        self.lock_part = LAUNCHED if is_launched() else ALONE
        self.early = logging.handlers.MemoryHandler(capacity=10**6, flushOnClose=False)
        self.console = Console(is_main=is_main)
        self.bar = self.console.bar
        root = logging.getLogger()
        for level_of in (root, logging.getLogger("replknet_paddle")):
            level_of.setLevel(logging.INFO if is_main else logging.ERROR)
        root.handlers[:] = [self.console, self.early]
        # Each rank reads images of its own.
        logging.getLogger("replknet_paddle.data.loader").setLevel(
            logging.INFO if is_main else logging.WARNING
        )

    def lock(self, folder: str, *, resume: str | None) -> None:
        """Keep other runs out of a run folder until this process ends.

        To be called before it is read which checkpoint is the newest: a run that is just ending
        may still write one. A folder that does not exist yet is locked by `open`.

        Raises:
            InputError: as `lock_run_folder`.
        """
        if self.is_main and os.path.isdir(folder):
            self.run_lock = RunLock(folder, self.lock_part)
            with nothing_left_if_it_fails(self.run_lock):
                check_is_own(folder, resume=resume)

    def open(self, folder: str, config, *, resume: str | None = None, class_names=None) -> None:
        """Make the run folder: log.txt, config.yaml, which can stand for `-cfg`, and the names of
        the classes, where there are any, in class_names.txt.

        Raises:
            InputError: as `lock_run_folder`.
        """
        logging.getLogger().removeHandler(self.early)
        if not self.is_main:
            return
        if self.run_lock is None:
            self.run_lock = RunLock(folder, self.lock_part)
        with nothing_left_if_it_fails(self.run_lock):
            check_is_own(folder, resume=resume)
            self._open(folder, config, class_names)

    def _open(self, folder: str, config, class_names) -> None:
        make_log(folder)
        self.folder = folder
        self.file = LogFile(os.path.join(folder, LOG_FILE), encoding="utf-8")
        self.file.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger().addHandler(self.file)
        self.early.setTarget(self.file)
        self.early.flush()
        write_text(os.path.join(folder, CONFIG_FILE), config_text(config))
        if class_names is not None:
            text = "".join(f"{name}\n" for name in class_names)
            write_text(os.path.join(folder, CLASS_NAMES_FILE), text)
        self.metrics_jsonl = True
        if config.LOG.VISUALDL:
            self.visualdl = visualdl_writer(os.path.join(folder, "visualdl"))

    @contextlib.contextmanager
    def with_its_end(self) -> Iterator[None]:
        """Write an error that ends the run in this context to log.txt. Its handler prints it.

        Raises:
            PeerLost: for what a collective raises when it has lost another process.
        """
        try:
            yield
        except Stopped:
            raise
        except (InputError, OSError, SystemFault, DivergedError) as error:
            self._write_end(str(error))
            raise
        except BaseException as error:
            lost = lost_peer(error)
            if lost is not None:
                raise lost from None
            self._write_end(traceback.format_exc())
            raise

    def _write_end(self, reason: str) -> None:
        if self.file is not None:
            values = (logging.ERROR, __file__, 0, "the run ended: %s", (reason,), None)
            self.file.handle(logging.LogRecord(__name__, *values))

    def write_metrics(self, record: dict) -> None:
        """Append one object to metrics.jsonl, and its numbers to VisualDL's scalars."""
        if not self.is_main:
            return
        if self.metrics_jsonl:
            append_whole(self._metrics_file(), json_text(record) + "\n")
        if self.visualdl is not None:
            for tag, value in record.items():
                if tag != "epoch" and not isinstance(value, list):
                    self.visualdl.add_scalar(tag, value, record["epoch"])

    def write_step(self, step: int) -> None:
        """Write the number of the last optimizer step to RUN/step.

        run_train_multi.sh compares the steps of two failures.
        """
        if self.is_main:
            path = os.path.join(self.folder, "step")
            with path_in_error(path):
                if self.step_file is None:
                    self.step_file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
                os.pwrite(self.step_file, b"%-12d\n" % step, 0)

    def forget_metrics_after(self, epoch: int) -> None:
        """Delete the records of epochs that a resumed run trains again."""
        if not self.is_main or not os.path.exists(self._metrics_file()):
            return
        kept = []
        with open(self._metrics_file(), encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged by a crash
                    if json.loads(line)["epoch"] <= epoch and line.endswith("\n"):
                        kept.append(line)
        write_text(self._metrics_file(), "".join(kept))

    def _metrics_file(self) -> str:
        return os.path.join(self.folder, "metrics.jsonl")

    def show_step(self, bar: tqdm, text: str, *, title: str, batch: int, is_due: bool) -> None:
        """Show one step of an epoch on its bar, or in a line where there is no terminal.

        Args:
            title: of the line.
            batch: forward passes done in this epoch.
            is_due: whether a line is due; the last batch of an epoch always gets one.
        """
        if not bar.disable:
            bar.update(batch - bar.n)
            bar.set_postfix_str(text)
        elif is_due or batch == bar.total:
            logger.info("%s, batch %d/%d, %s", title, batch, bar.total, text)
