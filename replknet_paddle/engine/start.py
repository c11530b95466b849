"""What a run starts from: weights, and the classes that these and the data agree on.

Rank 0 decides, and the other ranks follow and check. On a shared file system ranks may see
different files for a while: if each chose the newest checkpoint, they would train different weights
without an error.
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile, Classes, config_text
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.checkpoints.run_folder import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    newest_whole_checkpoint,
)
from replknet_paddle.config import RANDOM, config_changes, override
from replknet_paddle.config_keys import TWO_CLASS_FIGURES
from replknet_paddle.data.class_names import (
    get_class_names,
    name_differences,
    names_file,
    read_class_names,
)
from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import shifted_folders
from replknet_paddle.optim.losses import class_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError, SystemFault, counted
from replknet_paddle.runtime.files import file_sha256, searched_weights
from replknet_paddle.zoo import weights_file

logger = logging.getLogger(__name__)

# How long ranks wait until all see a file as rank 0 does. Network file systems cache folders for up
# to a minute.
FILE_WAIT_SECONDS = 120.0
POLL_SECONDS = 0.5

LISTED_CLASSES = 10


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    file: CheckpointFile | None = None  # whose weights are loaded; None: fresh ones
    resumed: Checkpoint | None = None  # what else it holds, where the run continues it
    classes: Classes = Classes()  # of that file, if its head is to be kept


def find_start(config, *, is_opened: bool = False) -> Start:
    """Return what MODEL.RESUME and MODEL.PRETRAINED mean, the same on all ranks; where `is_opened`,
    a backend opens MODEL.PRETRAINED, which may be a folder."""
    # 1. A checkpoint that is resumed, if there is one: weights, and all that training needs.
    resumed = find_resumed(config)
    if resumed is not None:
        return Start(resumed.file, resumed, resumed.file.classes)
    # 2. Fresh weights.
    if config.MODEL.PRETRAINED in (None, RANDOM):
        return Start()
    # 3. An export, which a backend opens.
    if is_opened and os.path.isdir(checkpoint_path(config.MODEL.PRETRAINED)):
        return Start()
    # 4. The weights of a file, to evaluate them or to start from them; with its classes or others.
    path = from_rank_0(lambda: weights_file(config.MODEL.PRETRAINED))
    wait_for_file(path)
    file = CheckpointFile(path)
    has_new_head = config.MODEL.DROP_HEAD and not config.EVAL
    if has_new_head or file.classes.model_type not in (None, config.MODEL.TYPE):
        return Start(file)
    return Start(file, classes=file.classes)


def find_resumed(config) -> Checkpoint | None:
    """Return the checkpoint that MODEL.RESUME means, if any; the same on all ranks."""
    resume, checkpoint = config.MODEL.RESUME, None
    if resume is None:
        return None

    def decide() -> str:
        nonlocal checkpoint
        if resume != "auto":
            path = os.path.join(resume, "last") if os.path.isdir(resume) else resume
            return os.path.realpath(path)  # a link may lead somewhere else by the time it is read
        checkpoint = newest_whole_checkpoint(config.SAVE)
        if checkpoint is None:
            logger.info("-resume auto: no checkpoint in %s, starting afresh", config.SAVE)
        return "" if checkpoint is None else checkpoint.file.path

    path = from_rank_0(decide)
    if not path:
        return None
    wait_for_file(path)
    if checkpoint is None:
        checkpoint = load_checkpoint(path)
    logger.info("resuming %s", path)
    if config.MODEL.NUM_CLASSES is None:
        config = override(config, MODEL__NUM_CLASSES=checkpoint.file.classes.count)
    for change in config_changes(checkpoint.config, config_text(config)):
        # The optimizer has no state for what was frozen, and scores by two figures do not compare.
        if change.startswith(("TRAIN.FREEZE ", "TRAIN.BEST_BY ")):
            raise InputError(
                f"{path}: {change}; allowed: what the run began with, or another run from its "
                "weights, by -pretrained"
            )
        logger.warning("other than in the run resumed: %s", change)
    epochs = checkpoint.progress.epoch
    if config.TRAIN.LAST_EPOCH > epochs:
        raise InputError(
            f"-last_epoch {config.TRAIN.LAST_EPOCH} contradicts {path}, which was "
            f"trained for {epochs} epochs; leave -last_epoch out"
        )
    if config.TRAIN.MODEL_EMA != bool(checkpoint.model_ema):
        raise InputError(
            f"{path} was trained with TRAIN.MODEL_EMA {bool(checkpoint.model_ema)}; "
            f"got {config.TRAIN.MODEL_EMA}"
        )
    return checkpoint


def load_start(model, config, load_weights: Callable, start: Start) -> None:
    """Load the weights of `start`, if there are any, and check that all ranks hold the same ones;
    `load_weights` (model, config, file) loads those of MODEL.PRETRAINED."""
    if start.resumed is not None:
        load_pretrained(model, start.file, weights="model")
    elif start.file is not None:
        load_weights(model, config, start.file)
    check_same_weights(model)


# ---- what the ranks agree on


def from_rank_0(decide: Callable[[], str]) -> str:
    """Return on every rank what `decide` returns on rank 0; raise an InputError or OSError of it on
    all."""
    if processes.world_size() == 1:
        return decide()
    answer = None
    if processes.rank() == 0:
        try:
            answer = "decision", decide()
        except (InputError, OSError) as error:
            answer = "input" if isinstance(error, InputError) else "system", str(error)
    kind, text = json.loads(processes.text_of_rank_0(json.dumps(answer)))
    if kind != "decision":
        raise {"input": InputError, "system": OSError}[kind](text)
    return text


def wait_for_file(path: str) -> None:
    """Wait until every rank sees the file `path` with the contents that rank 0 sees; SystemFault on
    all ranks, if some rank does not after `FILE_WAIT_SECONDS`."""
    if processes.world_size() == 1:
        return

    def digest() -> str:
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"no checkpoint {searched_weights(path)}; docs/model_zoo.md says where the "
                "published ones are"
            )
        return file_sha256(path)

    wanted = from_rank_0(digest)
    deadline = time.monotonic() + FILE_WAIT_SECONDS
    while True:
        try:
            is_seen = digest() == wanted
        except OSError:  # not there yet, or a stale handle
            is_seen = False
        ranks_seeing, ranks_out_of_time = processes.sum_over_ranks(
            [is_seen, time.monotonic() > deadline]
        )
        if ranks_seeing == processes.world_size():
            return
        if ranks_out_of_time:
            raise SystemFault(
                f"{path} is not on every rank what it is on rank 0 after {FILE_WAIT_SECONDS:g} "
                f"seconds ({int(ranks_seeing)} of {processes.world_size()} ranks see it); all "
                "machines must share the folder"
            )
        time.sleep(POLL_SECONDS)


def check_same_weights(model: paddle.nn.Layer) -> None:
    """Raise InputError on all ranks if they do not hold the same weights and statistics."""
    ranks = processes.world_size()
    if ranks == 1:
        return
    crc = 0
    for name, tensor in sorted(model.state_dict().items()):
        crc = zlib.crc32(np.ascontiguousarray(tensor.numpy()), zlib.crc32(name.encode(), crc))
    digests = np.zeros(ranks)
    digests[processes.rank()] = crc
    digests = processes.sum_over_ranks(digests)
    wrong = [rank for rank in range(ranks) if digests[rank] != digests[0]]
    if wrong:
        raise InputError(
            f"ranks {', '.join(map(str, wrong))} start with other weights than rank 0; all "
            "machines need the same files, the same kind of device and the same version of Paddle"
        )


# ---- classes


def resolve_classes(config, start: Start):
    """Return the configuration with a number in MODEL.NUM_CLASSES, and the classes' names or None.

    What the checkpoint says wins, if its head is to be used. InputError: the data folder names
    other classes, or a file does not have a name for each class.
    """
    stored = start.classes
    differences = differing_names(config, stored)
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise InputError(
            f"the classes of {start.file.path} are not those of {names_file(config)}:\n{listed}\n"
            "Give the data that the checkpoint was trained for; training with MODEL.DROP_HEAD True "
            "starts with a fresh head for other classes"
        )
    if config.MODEL.NUM_CLASSES is None:
        config = override(config, MODEL__NUM_CLASSES=stored.count or count_classes(config))
        logger.info("MODEL.NUM_CLASSES is None: %s", counted(config.MODEL.NUM_CLASSES, "class"))
    return config, get_class_names(config, stored.names_for(config))


def differing_names(config, stored: Classes) -> list[str]:
    """Return how class_names.txt of the data folder differs from a checkpoint's names, in lines."""
    path = names_file(config)
    if stored.names is None or path is None or config.DATA.CLASS_NAMES is not None:
        return []
    return name_differences(stored.names, read_class_names(path))


def count_classes(config) -> int:
    """Return the number of names in the data's file, or else the largest label and one."""
    path = names_file(config)
    if path is not None:
        return len(read_class_names(path))
    return 1 + max(
        int(get_dataset(config, is_train).labels.max())
        for is_train in ([False] if config.EVAL else [True, False])
    )


def check_labels(dataset, count: int) -> None:
    """Raise InputError for labels of a list, read before the number of classes was resolved, that
    a network of `count` classes does not have."""
    largest = int(dataset.labels.max()) if hasattr(dataset, "labels") else -1
    if largest >= count:
        raise InputError(
            f"{dataset.list_file} has label {largest}, outside [0, {count}): the network has "
            f"{counted(count, 'class')} (MODEL.NUM_CLASSES)"
        )


def check_best_by(config, val) -> None:
    """Raise InputError for a TRAIN.BEST_BY that needs two classes, where the network has another
    number of them, or the list by which a run is to choose has images of one class alone."""
    by = config.TRAIN.BEST_BY
    if by not in TWO_CLASS_FIGURES:
        return
    if config.MODEL.NUM_CLASSES != 2:
        raise InputError(
            f"TRAIN.BEST_BY is {by}, which is defined for two classes; the network has "
            f"{counted(config.MODEL.NUM_CLASSES, 'class')}. Allowed with them: macro_f1 and others "
            "that docs/training.md names"
        )
    if not config.EVAL and len(np.unique(val.labels)) < 2:
        raise InputError(
            f"TRAIN.BEST_BY is {by}, which needs images of both classes in {val.list_file}; it has "
            "those of one. Add some, or choose by top1"
        )


def report_shifted_folders(train, val) -> None:
    """Warn of folders whose label in the validation list is not that in the training list."""
    if not isinstance(train, ListDataset):  # labels in pictures
        return
    shifted = shifted_folders(train.paths_and_labels(), val.paths_and_labels())
    if shifted:
        shown = [f"{name}: {one} and {other}" for name, one, other in shifted[:LISTED_CLASSES]]
        more = len(shifted) - len(shown)
        logger.warning(
            "%s with another label in %s than in %s; unless they only share a name, the accuracy "
            "means nothing: %s%s",
            counted(len(shifted), "folder"),
            train.list_file,
            val.list_file,
            "; ".join(shown),
            f"; and {more} more" if more else "",
        )


def report_absent_classes(dataset, count: int, names) -> None:
    """Warn of classes of the head that no label of a list has; to be called on all ranks."""
    ranks = processes.world_size()
    is_absent = np.zeros(count)
    is_absent[dataset.absent_classes(count, rank=processes.rank(), world_size=ranks)] = 1
    absent = np.flatnonzero(processes.sum_over_ranks(is_absent) == ranks).tolist()
    if absent:
        shown = [f"{i} ({names[i]})" if names else str(i) for i in absent[:LISTED_CLASSES]]
        more = len(absent) - len(shown)
        logger.warning(
            "%s has no label of %d of the %d classes (MODEL.NUM_CLASSES): %s%s",
            dataset.list_file,
            len(absent),
            count,
            ", ".join(shown),
            f" and {more} more" if more else "",
        )


def weigh_classes(config, dataset, names) -> np.ndarray | None:
    """Return the weight of each class in the loss, (classes,), or None without TRAIN.CLASS_WEIGHTS;
    log the sizes of the classes of a training set where they matter, and the weights."""
    wanted, weights = config.TRAIN.CLASS_WEIGHTS, None
    if wanted is None and config.TRAIN.SAMPLER != "balanced":
        return None
    count = config.MODEL.NUM_CLASSES
    sizes = np.bincount(dataset.labels, minlength=count)
    logger.info("class sizes: %s", class_figures(sizes, names))
    if wanted is not None:
        weights = class_weights(wanted, dataset.labels, count)
        logger.info("class weights: %s", class_figures(weights.round(6), names))
    return weights


def class_figures(figures: np.ndarray, names) -> str:
    """Return the figure of each of a few classes, or the lowest and the highest of many."""
    is_few = len(figures) <= LISTED_CLASSES
    shown = range(len(figures)) if is_few else (figures.argmin(), figures.argmax())
    texts = (f"{figures[i]:.10g} ({names[i] if names else f'class {i}'})" for i in shown)
    return (", " if is_few else " to ").join(texts)
