"""The run folder and what a run tells: console, log.txt, metrics.jsonl, config.yaml.

Rank 0 speaks for all. On a terminal a progress bar shows the batches; elsewhere plain lines do,
so that log files stay readable.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import sys

from tqdm import tqdm

from replknet_paddle.checkpoints.run_folder import run_folder_of
from replknet_paddle.checkpoints.training import checkpoints
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import write_text


def check_run_folder(folder: str, *, resume: str | None) -> None:
    """Make the run folder, if it is not there.

    Args:
        resume: what MODEL.RESUME names; 'auto', or a checkpoint of this folder, goes on in it.

    Raises:
        InputError: it cannot be written, or holds another run, which this one would spoil.
    """
    goes_on = resume == "auto" or (resume is not None and is_same(run_folder_of(resume), folder))
    if not goes_on and checkpoints(folder):
        raise InputError(
            f"{folder} holds the checkpoints of another run; -resume {folder} goes "
            "on with it, another -output starts afresh"
        )
    try:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "log.txt"), "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write the run folder {folder}: {error.strerror}; give another one by -output"
        ) from None


def is_same(folder: str | None, other: str) -> bool:
    """Whether two paths lead to one folder."""
    return folder is not None and os.path.realpath(folder) == os.path.realpath(other)


def config_text(config) -> str:
    """YAML of all that defines a run, without what holds for one start of it alone."""
    config = config.clone()
    config.defrost()
    config.SAVE = None
    config.MODEL.RESUME = None
    return config.dump()


def visualdl_writer(folder: str):
    """VisualDL's writer of scalars.

    Raises:
        InputError: VisualDL is not installed.
    """
    try:
        from visualdl import LogWriter
    except ImportError as error:
        raise InputError(
            f"LOG.VISUALDL needs VisualDL ({error}); pip install -r requirements/plots.txt"
        ) from None
    return LogWriter(logdir=folder)


class RunLog:
    """Writes one run's folder and console; other ranks than 0 say what is wrong, and no more.

    It writes nothing to disk before `open`, which comes when all input has been found usable.
    """

    def __init__(self, *, is_main: bool):
        self.folder = None
        self.step_file = None
        self.metrics_jsonl = False
        self.visualdl = None
        self.is_main = is_main
        self.on_terminal = is_main and sys.stdout.isatty()
        self.early = logging.handlers.MemoryHandler(capacity=10**6, flushOnClose=False)
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        root = logging.getLogger()
        root.setLevel(logging.INFO if is_main else logging.ERROR)
        root.handlers[:] = [console, self.early]
        # Each process has images of its own to complain of.
        logging.getLogger("replknet_paddle.data.loader").setLevel(
            logging.INFO if is_main else logging.WARNING
        )

    def open(self, folder: str, config, *, resume: str | None = None) -> None:
        """Make the run folder: log.txt, and config.yaml, which can stand for `-cfg`.

        Raises:
            InputError: as `check_run_folder`.
        """
        root = logging.getLogger()
        root.removeHandler(self.early)
        if not self.is_main:
            return
        check_run_folder(folder, resume=resume)
        self.folder = folder
        file = logging.FileHandler(os.path.join(folder, "log.txt"), encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)
        self.early.setTarget(file)
        self.early.flush()
        write_text(os.path.join(folder, "config.yaml"), config_text(config))
        self.step_file = os.open(os.path.join(folder, "step"), os.O_WRONLY | os.O_CREAT, 0o644)
        self.metrics_jsonl = config.LOG.METRICS_JSONL
        if config.LOG.VISUALDL:
            self.visualdl = visualdl_writer(os.path.join(folder, "visualdl"))

    def write_metrics(self, record: dict) -> None:
        """Append one object to metrics.jsonl, and its numbers to VisualDL's scalars."""
        if not self.is_main:
            return
        if self.metrics_jsonl:
            with open(self._metrics_file(), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if self.visualdl is not None:
            for tag, value in record.items():
                if tag != "epoch" and not isinstance(value, list):
                    self.visualdl.add_scalar(tag, value, record["epoch"])

    def write_step(self, step: int) -> None:
        """Leave word of the optimizer step that is under way; it outlives this process.

        run_train_multi.sh compares where two failures happened.
        """
        if self.is_main:
            os.pwrite(self.step_file, b"%-12d\n" % step, 0)

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the records of epochs that a resumed run will go through again."""
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

    def bar(self, batches=None, **options) -> tqdm:
        """tqdm's progress bar over batches; invisible where there is no terminal."""
        return tqdm(
            batches,
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=not self.on_terminal,
            **options,
        )
