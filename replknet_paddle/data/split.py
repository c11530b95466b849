"""Splitting folders of classes into training and validation lists."""

import logging
import os
from collections import Counter, defaultdict

import numpy as np

from replknet_paddle.data.make_lists import class_folders, tree_lines, write_lists
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import file_sha256

logger = logging.getLogger(__name__)


def split_lists(
    root: str, *, folder: str, share: float, seed: int = 0, overwrite: bool = False
) -> dict[str, int]:
    """Write train_list.txt, val_list.txt and class_names.txt over one tree of class folders.

    Of each class, `share` of the images goes to validation, rounded, at least one and never all.
    Files with the same bytes stay together, and in training if they are in several classes.

    Args:
        root: folder of the dataset.
        folder: below it, with a folder of images for each class; "." for `root` itself.
        share: of each class, between 0 and 1.
        seed: of the choice, which depends on nothing but this, the paths and identical files.
        overwrite: replace lists that are there.

    Returns:
        The number of lines in each file written.

    Raises:
        FileNotFoundError: the folder is missing.
        InputError: what is there cannot become lists.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share:g} for validation; allowed: a number between 0 and 1")
    classes = class_folders(os.path.join(root, folder))
    if len(classes) == 1:
        raise InputError(
            f"{os.path.join(root, folder)} holds one folder, {classes[0]}, which would be the only "
            f"class; if the classes are in it, add -train {classes[0]}"
        )
    lines = tree_lines(root, folder, classes)
    labels = [int(line.rsplit(" ", 1)[1]) for line in lines]
    paths = [os.path.join(root, line.rsplit(" ", 1)[0]) for line in lines]
    in_val = choose_validation(labels, identical_files(paths), share=share, seed=seed)
    counts, represented = Counter(labels), {labels[i] for i in in_val}
    for label, name in enumerate(classes):
        if label not in represented:
            logger.warning(
                "class %s has no validation image: it has too few images that differ (%d in all)",
                name,
                counts[label],
            )
    return write_lists(
        root,
        train=[line for i, line in enumerate(lines) if i not in in_val],
        val=[line for i, line in enumerate(lines) if i in in_val],
        classes=classes,
        overwrite=overwrite,
    )


def identical_files(paths: list[str]) -> list[list[int]]:
    """Groups of indices of files with the same bytes; a file that is like no other is alone."""
    by_size = defaultdict(list)
    for i, path in enumerate(paths):
        by_size[os.path.getsize(path)].append(i)
    groups = []
    for same_size in by_size.values():
        by_digest = defaultdict(list)
        for i in same_size:
            by_digest[file_sha256(paths[i]) if len(same_size) > 1 else ""].append(i)
        groups += by_digest.values()
    return sorted(groups)


def choose_validation(
    labels: list[int], groups: list[list[int]], *, share: float, seed: int
) -> set[int]:
    """The indices that go to validation.

    Args:
        labels: of each image.
        groups: partition of the indices; no group is divided.
        share, seed: as in `split_lists`.
    """
    of_class = defaultdict(list)
    for group in groups:
        if len({labels[i] for i in group}) == 1:
            of_class[labels[group[0]]].append(group)
    counts = Counter(labels)
    chosen: set[int] = set()
    for label, candidates in sorted(of_class.items()):
        images = counts[label]
        wanted = min(max(1, int(share * images + 0.5)), images - 1)
        order = np.random.default_rng((seed, label)).permutation(len(candidates))
        taken: list[int] = []
        for group in (candidates[i] for i in order):
            if len(taken) + len(group) <= wanted:
                taken += group
        smallest = min(candidates, key=len)
        if not taken and len(smallest) < images:  # copies of which there are more than wanted
            taken = smallest
        chosen.update(taken)
    return chosen
