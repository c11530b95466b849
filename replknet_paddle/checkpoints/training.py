"""Checkpoints of a training run: one self-describing safetensors file each.

Tensors are `model.*`, `model_ema.*` (the EMA weights, if the run has them) and `optimizer.*`,
under native parameter names; the file's metadata holds, as JSON, the schema version, the
configuration, the progress of the run and the names of the classes (see `record`). No pickle:
reading one cannot run code.

    RUN/checkpoints/epoch_0010_step_00012510.safetensors    and others
    RUN/last, RUN/best                                      links to two of them

A checkpoint is written under a temporary name and renamed when it is complete, so a file under its
final name is complete.
"""

import contextlib
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from replknet_paddle.checkpoints.readers import read_checkpoint
from replknet_paddle.checkpoints.record import record_metadata, verified_body
from replknet_paddle.checkpoints.run_folder import is_same, run_folder_of
from replknet_paddle.checkpoints.writers import write_safetensors
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import is_full_of_files, searched_weights

logger = logging.getLogger(__name__)

PARTS = ("model", "model_ema", "optimizer")
FOLDER = "checkpoints"
NAME = re.compile(r"epoch_(\d+)_step_(\d+)\.safetensors")


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs done.
        batch: forward passes done, on each process, in the epoch after those.
        batches: how many an epoch has.
        step: optimizer steps done in all, however many an epoch had when they were done.
        batch_size, accum_iter: of those, images on all processes, and how many make a step.
        best_score: best top-1 accuracy (mIoU in segmentation) so far, percent, of the weights or of
            the EMA weights.
        best_checkpoint: name of the file that had it.
        better_weights: 'model' or 'model_ema', whichever had the higher accuracy in the latest
            evaluation.
        epoch_sums: loss times images, and images, of the current epoch so far.
        record: of metrics.jsonl, of the last epoch done, where its evaluation is still to come.
    """

    epoch: int = 0
    batch: int = 0
    batches: int = 0
    batch_size: int = 0
    accum_iter: int = 0
    step: int = 0
    best_score: float = -1.0
    best_checkpoint: str = ""
    better_weights: str = "model"
    epoch_sums: tuple[float, float] = (0.0, 0.0)
    record: dict = field(default_factory=dict)

    @property
    def schedule_step(self) -> int:
        """The optimizer steps that a run with epochs like this one takes to come as far."""
        return (self.epoch * self.batches + self.batch) // self.accum_iter


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        config: YAML.
        model, model_ema, optimizer: arrays by parameter name.
        scaler: of the loss, with float16.
        class_names: one for each class, or None.
        path: where it was read from.
    """

    config: str
    progress: Progress
    model: dict[str, np.ndarray]
    model_ema: dict[str, np.ndarray] = field(default_factory=dict)
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    path: str = ""

    def progress_with(self, **batches: int) -> Progress:
        """The progress of a run that continues from here.

        Args:
            batches: its own `batches`, `batch_size` and `accum_iter`.

        Raises:
            InputError: they differ from those of an epoch that had begun.
        """
        there = {name: getattr(self.progress, name) for name in batches}
        if self.progress.batch and batches != there:
            raise InputError(
                f"{self.path} stopped after {self.progress.batch} of {there['batches']} batches of "
                f"an epoch, which has {batches['batches']} here (global batch without accumulation "
                f"{there['batch_size']}, here {batches['batch_size']}; TRAIN.ACCUM_ITER "
                f"{there['accum_iter']}, here {batches['accum_iter']}); resume it with the same "
                "data, batch size, accumulation and number of processes, or resume a checkpoint "
                "from the end of an epoch"
            )
        return replace(self.progress, **batches)


def save_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write `checkpoint`; until it is complete, `path` is the old file, or does not exist.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {}
    for part in PARTS:
        for name, value in getattr(checkpoint, part).items():
            tensors[f"{part}.{name}"] = np.ascontiguousarray(value).reshape(value.shape)
    body = {
        "config": checkpoint.config,
        "progress": asdict(checkpoint.progress),
        "scaler": checkpoint.scaler,
        "class_names": checkpoint.class_names,
    }
    folder = os.path.dirname(path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)  # and not the run folder: one that is not there has been deleted
        write_safetensors(path, tensors, record_metadata(body, tensors))
    except OSError as error:  # a full disk, mostly
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(
            f"cannot write {path}: {error.strerror}{room_in(folder, size)}. Earlier checkpoints "
            "are unchanged"
        ) from None


def room_in(folder: str, size: int) -> str:
    """What a message says of the space in a folder for a file of `size` bytes."""
    if is_full_of_files(folder) or not os.path.isdir(folder):
        return ""
    free = shutil.disk_usage(folder).free
    return f"; {size / 2**20:.1f} MiB are needed and {free / 2**20:.0f} MiB free there"


def load_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint file of `save_checkpoint`.

    Raises:
        FileNotFoundError: nothing there.
        InputError: something else, or a damaged or newer file.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {searched_weights(path)} to resume from")
    tensors = read_checkpoint(path)
    body = verified_body(path, tensors)
    if body is None:
        raise InputError(
            f"{path} is not a training checkpoint of this program, and only those can be resumed; "
            "-pretrained starts a new run from weights"
        )
    parts = {part: {} for part in PARTS}
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    progress = body["progress"]
    progress["epoch_sums"] = tuple(progress["epoch_sums"])
    if "best_top1_percent" in progress:  # as version 0.1 named it
        progress["best_score"] = progress.pop("best_top1_percent")
    names = body.get("class_names")
    return Checkpoint(
        body["config"],
        Progress(**progress),
        **parts,
        scaler=body["scaler"],
        class_names=None if names is None else tuple(names),
        path=path,
    )


def newest_whole_checkpoint(run_folder: str) -> str | None:
    """The newest checkpoint of a run that can be read, with a warning for each that cannot."""
    for path in reversed(checkpoints(run_folder)):
        try:
            load_checkpoint(path)
        except InputError as error:
            logger.warning("%s; trying the one before it", error)
        else:
            return path
    return None


def checkpoint_path(run_folder: str, progress: Progress) -> str:
    """Where the checkpoint of this moment belongs."""
    return os.path.join(
        run_folder, FOLDER, f"epoch_{progress.epoch:04d}_step_{progress.step:08d}.safetensors"
    )


def checkpoints(run_folder: str) -> list[str]:
    """All checkpoints of a run, the oldest first."""
    folder = os.path.join(run_folder, FOLDER)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = {
        name: tuple(map(int, match.groups())) for name in names if (match := NAME.fullmatch(name))
    }
    return [os.path.join(folder, name) for name in sorted(steps, key=steps.get)]


def point_to(run_folder: str, name: str, path: str) -> None:
    """Let RUN/`name` link to the checkpoint `path`, atomically."""
    link = os.path.join(run_folder, name)
    if os.path.realpath(link) == os.path.realpath(path):
        return
    unfinished = f"{link}.unfinished"
    if os.path.lexists(unfinished):
        os.unlink(unfinished)
    try:
        os.symlink(os.path.relpath(path, run_folder), unfinished)
    except OSError:  # a file system without links
        shutil.copyfile(path, unfinished)
    os.replace(unfinished, link)


def remove_superseded(run_folder: str, *, keep_every: int, keep_newest: int) -> None:
    """Delete old checkpoints, and incomplete files of a killed run.

    `last`, `best`, the `keep_newest` newest and those at the end of every `keep_every`-th epoch are
    kept.
    """
    paths = checkpoints(run_folder)
    linked = {os.path.realpath(os.path.join(run_folder, name)) for name in ("last", "best")}
    kept_epochs = set()
    for path in paths:  # an epoch's first is the one at the end of the epoch before
        epoch = int(NAME.fullmatch(os.path.basename(path)).group(1))
        is_kept = epoch % keep_every == 0 and epoch > 0 and epoch not in kept_epochs
        kept_epochs.add(epoch)
        if not (is_kept or os.path.realpath(path) in linked or path in paths[-keep_newest:]):
            os.unlink(path)
    folder = os.path.join(run_folder, FOLDER)
    for name in os.listdir(folder):
        if name.endswith(".unfinished"):
            os.unlink(os.path.join(folder, name))


def take_up(run_folder: str, progress: Progress, resumed: str | None = None) -> None:
    """Prepare a run folder for a run that continues from `progress`, or starts.

    Later checkpoints are moved to RUN/superseded: they are from an abandoned branch of the run, and
    would be taken for its newest. RUN/last and RUN/best are linked again: `last` may have been one
    of those, and a crash may have come between writing a checkpoint and linking it.

    Args:
        resumed: the checkpoint that is continued from, if any.
    """
    if resumed is not None and is_same(run_folder_of(resumed), run_folder):
        point_to(run_folder, "last", resumed)
    best = os.path.realpath(os.path.join(run_folder, "best"))
    for path in checkpoints(run_folder):
        place = tuple(map(int, NAME.fullmatch(os.path.basename(path)).groups()))
        if place > (progress.epoch, progress.step):
            os.makedirs(os.path.join(run_folder, "superseded"), exist_ok=True)
            moved = os.path.join(run_folder, "superseded", os.path.basename(path))
            os.replace(path, moved)
            logger.warning("%s is later than the checkpoint resumed; moved to %s", path, moved)
            if os.path.realpath(path) == best:
                point_to(run_folder, "best", moved)
    path = os.path.join(run_folder, FOLDER, progress.best_checkpoint)
    if os.path.isfile(path):
        point_to(run_folder, "best", path)
