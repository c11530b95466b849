"""The classes of a run: how many, what they are called, and whether data and weights agree."""

import logging

import numpy as np

from replknet_paddle.checkpoints.record import Classes
from replknet_paddle.config import override
from replknet_paddle.data.class_names import (
    get_class_names,
    name_differences,
    names_file,
    read_class_names,
)
from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import shifted_folders
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

logger = logging.getLogger(__name__)

LISTED_CLASSES = 10


def settle_classes(config, stored: Classes, source: str | None = None):
    """Settle the number and the names of a run's classes.

    Args:
        config: with MODEL.NUM_CLASSES None where that is left to the checkpoint or the data.
        stored: what the checkpoint says, whose head is to be used. Its names win.
        source: that checkpoint, for messages.

    Returns:
        The configuration with a number in MODEL.NUM_CLASSES, and the names or None.

    Raises:
        InputError: the data folder names other classes than the checkpoint; or a file does not
            have a name for each class.
    """
    if has_other_names(config, stored):
        differences = name_differences(stored.names, read_class_names(names_file(config)))
        listed = "\n".join(f"  {line}" for line in differences)
        raise InputError(
            f"the classes of {source} are not those of {names_file(config)}:\n{listed}\n"
            "Give the data that the checkpoint was trained for; training with MODEL.DROP_HEAD True "
            "starts with a fresh head for other classes"
        )
    if config.MODEL.NUM_CLASSES is None:
        config = override(config, MODEL__NUM_CLASSES=stored.count or count_classes(config))
        logger.info("MODEL.NUM_CLASSES is None: %d classes", config.MODEL.NUM_CLASSES)
    return config, get_class_names(config, stored.names_for(config))


def has_other_names(config, stored: Classes) -> bool:
    """Whether class_names.txt of the data folder has other names than a checkpoint."""
    path = names_file(config)
    if stored.names is None or path is None or config.DATA.CLASS_NAMES is not None:
        return False
    return bool(name_differences(stored.names, read_class_names(path)))


def count_classes(config) -> int:
    """How many classes the data have: the names in the file, or else the largest label and one."""
    path = names_file(config)
    if path is not None:
        return len(read_class_names(path))
    return 1 + max(
        int(get_dataset(config, is_train).labels.max())
        for is_train in ([False] if config.EVAL else [True, False])
    )


def check_labels(dataset, count: int) -> None:
    """Check the labels of a list that was read before the number of classes was settled.

    Raises:
        InputError: the network has too few classes.
    """
    largest = int(dataset.labels.max()) if hasattr(dataset, "labels") else -1
    if largest >= count:
        raise InputError(
            f"{dataset.list_file} has label {largest}, outside [0, {count}): the network has "
            f"{count} classes (MODEL.NUM_CLASSES)"
        )


def report_shifted_folders(train, val) -> None:
    """Warn of folders whose label in the validation list is not that in the training list.

    Args:
        train, val: the datasets.
    """
    if not isinstance(train, ListDataset):  # labels in pictures
        return
    shifted = shifted_folders(train.paths_and_labels(), val.paths_and_labels())
    if shifted:
        shown = [f"{name}: {one} and {other}" for name, one, other in shifted[:LISTED_CLASSES]]
        more = len(shifted) - len(shown)
        logger.warning(
            "%d folders have another label in %s than in %s; unless they only share a name, the "
            "accuracy means nothing: %s%s",
            len(shifted),
            train.list_file,
            val.list_file,
            "; ".join(shown),
            f"; and {more} more" if more else "",
        )


def report_absent_classes(dataset, count: int, names) -> None:
    """Warn of classes of the head that no label of a list has. For all ranks to call.

    Args:
        dataset: with a `list_file` and `absent_classes`.
        names: of the classes, or None.
    """
    ranks = processes.world_size()
    is_absent = np.zeros(count)
    is_absent[dataset.absent_classes(count, rank=processes.rank(), world_size=ranks)] = 1
    absent = np.flatnonzero(processes.sum_over_ranks(is_absent) == ranks).tolist()
    if not absent:
        return
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
