"""A run folder and its training checkpoints: saved, resumed, and linked as `last` and `best`.

    RUN/checkpoints/epoch_0010_step_00012510.safetensors    and others
    RUN/last, RUN/best                                      links to two of them

A checkpoint is one self-describing safetensors file. Its tensors are `model.*`, `model_ema.*` (the
EMA weights, if the run has them) and `optimizer.*`, under native parameter names; its metadata hold
the configuration, the progress of the run and the names of the classes (see `checkpoint_file`). It
is written under a temporary name and renamed when it is complete.
"""

import contextlib
import logging
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from replknet_paddle.checkpoints.checkpoint_file import WEIGHTS, CheckpointFile, record_metadata
from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import (
    PARTIAL_SUFFIX,
    atomic_file,
    find_path,
    is_full_of_files,
    searched_weights,
)

logger = logging.getLogger(__name__)

EXPORT_FILE = "export.json"  # in a folder with a config.yaml and a model for inference
EXPORT_FILE_OF_0_2 = "replknet.json"  # of versions 0.1 and 0.2, in place of both

PARTS = ("model", "model_ema", "optimizer")
FOLDER = "checkpoints"
NAME = re.compile(r"epoch_(\d+)_step_(\d+)\.safetensors")


# ---- which folder, and which file


def run_folder_of(path: str) -> str | None:
    """Return the run folder of a checkpoint, of a link to one, or of the folder itself, if any."""
    folder = os.path.dirname(os.path.realpath(path))
    for candidate in (path, os.path.dirname(path), os.path.dirname(folder)):
        if os.path.isfile(os.path.join(candidate, "config.yaml")):
            return candidate or "."
    return None


def is_same(folder: str | None, other: str) -> bool:
    """Return whether two paths lead to one folder."""
    return folder is not None and os.path.realpath(folder) == os.path.realpath(other)


def config_of(path: str | os.PathLike):
    """Return the configuration of a checkpoint or export: that of its folder or, of a file that no
    run keeps there (copied out, merged, converted), the one that it carries."""
    path = find_path(path)
    folder = run_folder_of(path)
    if os.path.isfile(path) and (folder is None or _moment(os.path.realpath(path)) is None):
        config = CheckpointFile(path).config
        if config is not None:
            return config
    if folder is not None:
        return get_config(os.path.join(folder, "config.yaml"))
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {searched_weights(path)}")
    raise InputError(
        f"{path} carries no configuration and does not lie in a run folder with a config.yaml; "
        "name its configuration by -cfg"
    )


def checkpoint_path(path: str | os.PathLike) -> str:
    """Return `path`, of an export too, or for a run folder its `best`, or `last` where that is
    missing."""
    path = find_path(path)
    is_export = os.path.isfile(os.path.join(path, EXPORT_FILE))
    if is_export or not os.path.isfile(os.path.join(path, "config.yaml")):
        return path
    for name in ("best", "last"):
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise InputError(f"{path} is a run folder without a checkpoint: neither best nor last is there")


# ---- what a checkpoint holds


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs done
    batch: int = 0  # forward passes done, on each process, in the epoch after those
    batches: int = 0  # forward passes of an epoch
    batch_size: int = 0  # images of a forward pass on all processes
    accum_iter: int = 0  # forward passes of an optimizer step
    step: int = 0  # optimizer steps done in all, however many an epoch had when they were done
    best_score: float = -1.0  # best figure of TRAIN.BEST_BY (mIoU in segmentation), percent
    best_checkpoint: str = ""  # name of the file that had it
    better_weights: str = "model"  # or "model_ema", by that figure in the latest evaluation
    epoch_sums: tuple[float, float] = (0.0, 0.0)  # loss times images, images; of this epoch so far
    record: dict = field(default_factory=dict)  # of metrics.jsonl, of an epoch yet to be evaluated

    @property
    def schedule_step(self) -> int:
        """Return the optimizer steps that a run with epochs like this one takes to come as far."""
        return (self.epoch * self.batches + self.batch) // self.accum_iter

    @property
    def best_epoch(self) -> int | None:
        """Return the epochs done by the best checkpoint; None before there is one."""
        moment = _moment(self.best_checkpoint)
        return None if moment is None else moment[0]


_SINCE_0_2 = {"better_weights", "record"}  # which checkpoints of version 0.1 lack
_BODY = ("config", "progress", "scaler", "class_names", "convolutions")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; `model`, `model_ema` and `optimizer` are arrays by parameter name."""

    config: str  # YAML
    progress: Progress
    model: dict[str, np.ndarray]
    model_ema: dict[str, np.ndarray] = field(default_factory=dict)
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)  # of the loss, with float16
    class_names: tuple[str, ...] | None = None
    convolutions: dict[str, str] = field(default_factory=dict)  # what was chosen on a GPU, by shape
    file: CheckpointFile | None = None  # what it was read from

    def progress_with(self, **batches: int) -> Progress:
        """Return the progress of a run that continues from here, with `batches`, `batch_size` and
        `accum_iter` of its own; InputError: they differ from those of an epoch that had begun."""
        there = {name: getattr(self.progress, name) for name in batches}
        if self.progress.batch and batches != there:
            raise InputError(
                f"{self.file.path} stopped after {self.progress.batch} of {there['batches']} "
                f"batches of an epoch, which has {batches['batches']} here (global batch without "
                f"accumulation {there['batch_size']}, here {batches['batch_size']}; "
                f"TRAIN.ACCUM_ITER {there['accum_iter']}, here {batches['accum_iter']}); resume it "
                "with the same data, batch size, accumulation and number of processes, or resume "
                "a checkpoint from the end of an epoch"
            )
        return replace(self.progress, **batches)


# ---- saving and resuming


def save_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write `checkpoint`; until it is complete, `path` is the old file, or does not exist."""
    tensors = {}
    for part in PARTS:
        for name, value in getattr(checkpoint, part).items():
            tensors[f"{part}.{name}"] = np.ascontiguousarray(value).reshape(value.shape)
    body = {
        "config": checkpoint.config,
        "progress": asdict(checkpoint.progress),
        "scaler": checkpoint.scaler,
        "class_names": checkpoint.class_names,
        "convolutions": checkpoint.convolutions,
    }
    folder = os.path.dirname(path)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)  # and not the run folder: one that is not there has been deleted
        write_safetensors(path, tensors, record_metadata(body, tensors))
    except OSError as error:  # a full disk, mostly
        room = ""
        if os.path.isdir(folder) and not is_full_of_files(folder):
            size = sum(tensor.nbytes for tensor in tensors.values())
            free = shutil.disk_usage(folder).free
            room = f"; {size / 2**20:.1f} MiB are needed and {free / 2**20:.0f} MiB free there"
        raise OSError(
            f"cannot write {path}: {error.strerror}{room}. Earlier checkpoints are unchanged"
        ) from None


def load_checkpoint(path: str) -> Checkpoint:
    """Return a checkpoint of `save_checkpoint`; InputError: something else, damaged, or newer."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no checkpoint {searched_weights(path)} to resume from")
    file = CheckpointFile(path)
    if file.parts is None:
        raise InputError(
            f"{path} is not a training checkpoint of this program, and only those can be resumed; "
            "-pretrained starts a new run from weights"
        )
    body = file.body
    if not {"config", "progress", "scaler"} <= body.keys() <= {*_BODY} or not (
        {"model"} <= file.parts.keys() <= set(PARTS)
        and isinstance(body["config"], str)
        and _is_scaler(body["scaler"])
        and _is_texts(body.get("convolutions", {}))
    ):
        raise file.damaged()
    return Checkpoint(
        body["config"],
        _progress_of(file),
        **{part: file.parts.get(part, {}) for part in PARTS},
        scaler=body["scaler"],
        class_names=file.classes.names,
        convolutions=body.get("convolutions", {}),
        file=file,
    )


def _progress_of(file: CheckpointFile) -> Progress:
    """Return the progress in a checkpoint's metadata; each field is there and has its type."""
    found = file.body["progress"]
    wanted = asdict(Progress(epoch_sums=[0.0, 0.0]))
    if not isinstance(found, dict):
        raise file.damaged()
    # Version 0.1 had another name for the best score.
    found = {{"best_top1_percent": "best_score"}.get(key, key): found[key] for key in found}
    if not wanted.keys() - _SINCE_0_2 <= found.keys() <= wanted.keys():
        raise file.damaged()
    found = wanted | found
    is_like = all(_is_like(found[name], example) for name, example in wanted.items())
    if not is_like or not (
        found["better_weights"] in WEIGHTS
        and (found["best_checkpoint"] == "" or NAME.fullmatch(found["best_checkpoint"]))
        and -1 <= found["best_score"] < 101  # percent
        and found["batch"] < max(1, found["batches"])
        and _is_record(found["record"])
    ):
        raise file.damaged()
    return Progress(**found | {"epoch_sums": tuple(found["epoch_sums"])})


def _is_like(value: object, example: object) -> bool:
    """Return whether a value has the type of another; numbers of things are not negative."""
    if isinstance(example, list):
        is_list = isinstance(value, list) and len(value) == len(example)
        return is_list and all(map(_is_like, value, example))
    if isinstance(example, float):
        return type(value) in (int, float)
    return type(value) is type(example) and not (isinstance(value, int) and value < 0)


def _is_record(record: dict) -> bool:
    """Return whether a record is empty, or numbers of an epoch."""
    is_numbers = all(type(value) in (int, float) for value in record.values())
    return not record or is_numbers and _is_like(record.get("epoch"), 0)


def _is_texts(texts: object) -> bool:
    """Return whether this is a dictionary of strings."""
    return isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())


def _is_scaler(state: object) -> bool:
    """Return whether this is a loss scaler's state, which is empty where the loss is not scaled."""
    if not isinstance(state, dict) or not state:
        return state == {}
    is_numbers = all(isinstance(value, (int, float)) for value in state.values())
    is_scale = _is_like(state.get("scale"), 1.0) and 0 < state["scale"] < math.inf
    return is_numbers and is_scale and _is_like(state.get("incr_count"), 0)


def newest_whole_checkpoint(run_folder: str) -> Checkpoint | None:
    """Return the newest checkpoint of a run that can be read; warn of each that cannot."""
    for path in reversed(checkpoints(run_folder)):
        try:
            return load_checkpoint(path)
        except InputError as error:
            logger.warning("%s; trying the one before it", error)
    return None


# ---- the checkpoints of a run, and its links


def path_at(run_folder: str, progress: Progress) -> str:
    """Return where the checkpoint of this moment belongs."""
    name = f"epoch_{progress.epoch:04d}_step_{progress.step:08d}.safetensors"
    return os.path.join(run_folder, FOLDER, name)


def _moment(path: str) -> tuple[int, int] | None:
    """Return epoch and step in a checkpoint's name; None for another file."""
    match = NAME.fullmatch(os.path.basename(path))
    return None if match is None else (int(match[1]), int(match[2]))


def checkpoints(run_folder: str) -> list[str]:
    """Return all checkpoints of a run, the oldest first."""
    folder = os.path.join(run_folder, FOLDER)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in sorted(filter(_moment, names), key=_moment)]


def point_to(run_folder: str, name: str, path: str) -> None:
    """Let RUN/`name` link to the checkpoint `path`, atomically."""
    link = os.path.join(run_folder, name)
    if os.path.realpath(link) == os.path.realpath(path):
        return
    partial = f"{link}{PARTIAL_SUFFIX}"
    if os.path.lexists(partial):
        os.unlink(partial)
    try:
        os.symlink(os.path.relpath(path, run_folder), partial)
    except OSError:  # a file system without links
        with open(path, "rb") as checkpoint, atomic_file(link, "wb") as copy:
            shutil.copyfileobj(checkpoint, copy)
    else:
        os.replace(partial, link)


def remove_superseded(run_folder: str, *, keep_every: int, keep_newest: int) -> None:
    """Delete incomplete files of a killed run, and old checkpoints but for `last`, `best`, the
    `keep_newest` newest and those at the end of every `keep_every`-th epoch."""
    paths = checkpoints(run_folder)
    linked = {os.path.realpath(os.path.join(run_folder, name)) for name in ("last", "best")}
    kept_epochs = set()
    for path in paths:  # an epoch's first is the one at the end of the epoch before
        epoch, _ = _moment(path)
        is_kept = epoch % keep_every == 0 and epoch > 0 and epoch not in kept_epochs
        kept_epochs.add(epoch)
        if not (is_kept or os.path.realpath(path) in linked or path in paths[-keep_newest:]):
            os.unlink(path)
    folder = os.path.join(run_folder, FOLDER)
    for name in os.listdir(folder):
        if name.endswith(PARTIAL_SUFFIX):
            os.unlink(os.path.join(folder, name))


def prepare_run_folder(run_folder: str, progress: Progress, resumed: str | None = None) -> None:
    """Prepare a run folder for a run that starts, or continues the file `resumed` from `progress`.

    Later checkpoints are moved to RUN/superseded: they are from an abandoned branch of the run, and
    would be taken for its newest. RUN/last and RUN/best are linked again: `last` may have been one
    of those, and a crash may have come between writing a checkpoint and linking it.
    """
    if resumed is not None and is_same(run_folder_of(resumed), run_folder):
        point_to(run_folder, "last", resumed)
    best = os.path.realpath(os.path.join(run_folder, "best"))
    for path in checkpoints(run_folder):
        if _moment(path) > (progress.epoch, progress.step):
            os.makedirs(os.path.join(run_folder, "superseded"), exist_ok=True)
            moved = os.path.join(run_folder, "superseded", os.path.basename(path))
            os.replace(path, moved)
            logger.warning("%s is later than the checkpoint resumed; moved to %s", path, moved)
            if os.path.realpath(path) == best:
                point_to(run_folder, "best", moved)
    path = os.path.join(run_folder, FOLDER, progress.best_checkpoint)
    if os.path.isfile(path):
        point_to(run_folder, "best", path)
