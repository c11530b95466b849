"""Writing the list files of a dataset from its folders."""

import os
import re
from collections.abc import Iterator

from replknet_paddle.data.class_names import CLASS_NAMES_FILE
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file
from replknet_paddle.runtime.packages import import_extra

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


def make_lists(
    root: str, *, train: str, val: str, devkit: str | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Write train_list.txt and val_list.txt into `root`, and class_names.txt.

    Classes are the folders in `train`, numbered in the sorted order of their names, which for
    ImageNet's synsets is that of the published weights. Their names become class_names.txt, unless
    they are synsets: for those the project has better ones.

    Args:
        root: folder of the data set.
        train: folder below it with a folder of images for each class.
        val: likewise, with some or all of the same classes; or, with `devkit`, a folder of
            ImageNet-1K's 50,000 validation images.
        devkit: ImageNet's ILSVRC2012_devkit_t12, whose ground truth has the validation labels.
        overwrite: replace lists that are there.

    Returns:
        The number of lines in each file written.

    Raises:
        FileNotFoundError: a folder or file is missing.
        InputError: what is there cannot become a list.
    """
    classes = class_folders(os.path.join(root, train))
    return write_lists(
        root,
        train=tree_lines(root, train, classes),
        val=(
            tree_lines(root, val, classes)
            if devkit is None
            else _ground_truth_lines(root, val, classes, devkit)
        ),
        classes=classes,
        overwrite=overwrite,
    )


def write_lists(
    root: str, *, train: list[str], val: list[str], classes: list[str], overwrite: bool
) -> dict[str, int]:
    """Write the lines of both lists and, unless they are synsets, the names of the classes.

    Returns:
        The number of lines in each file written.

    Raises:
        InputError: an empty list, or an existing file without `overwrite`.
    """
    lists = {LIST_FILES[True]: train, LIST_FILES[False]: val}
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        lists[CLASS_NAMES_FILE] = classes
    for name in lists:
        if os.path.exists(os.path.join(root, name)) and not overwrite:
            raise InputError(f"{os.path.join(root, name)} is there; -overwrite replaces it")
    for name, lines in lists.items():
        if not lines:
            raise InputError(f"no images ({', '.join(SUFFIXES)}) for {os.path.join(root, name)}")
    for name, lines in lists.items():
        with atomic_file(os.path.join(root, name), errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in lines)
    return {name: len(lines) for name, lines in lists.items()}


def class_folders(folder: str) -> list[str]:
    """The names of the folders in `folder`, sorted."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold a folder for each class")
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folders; it should hold one for each class")
    return classes


def tree_lines(root: str, part: str, classes: list[str]) -> list[str]:
    """The lines of all images in the class folders of `part`, a folder below `root`."""
    labels = {name: label for label, name in enumerate(classes)}
    lines = []
    for name in class_folders(os.path.join(root, part)):
        if name not in labels:
            raise InputError(f"{os.path.join(root, part, name)}: no such class in training")
        for path in _images(root, os.path.join(part, name)):
            lines.append(_line(path, labels[name]))
    return lines


def _images(root: str, part: str) -> Iterator[str]:
    """The image files in a folder and those below, sorted, as paths relative to `root`."""
    for folder, folders, files in os.walk(os.path.join(root, part)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _line(path: str, label: int) -> str:
    if path != path.strip() or "\n" in path or "\r" in path:
        raise InputError(
            f"{path!r}: a list cannot hold names with line breaks, or white space at "
            "their start; rename it"
        )
    return f"{path} {label}"


def _ground_truth_lines(root: str, part: str, classes: list[str], devkit: str) -> list[str]:
    """Lines of ImageNet's validation images, which its ground truth labels in sorted order."""
    folder, truth = os.path.join(root, part), os.path.join(devkit, GROUND_TRUTH)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold the validation images")
    for path in (truth, os.path.join(devkit, META)):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {path}; -devkit takes ImageNet's ILSVRC2012_devkit_t12")
    images = list(_images(root, part))
    with open(truth, encoding="ascii", errors="replace") as file:
        numbers = file.read().split()
    if len(numbers) != len(images):
        raise InputError(f"{truth} has {len(numbers)} labels, {folder} has {len(images)} images")
    synsets = read_synsets(os.path.join(devkit, META))
    labels = {name: label for label, name in enumerate(classes)}
    lines = []
    for image, number in zip(images, numbers):
        synset = synsets.get(int(number)) if number.isdigit() else None
        if synset not in labels:
            raise InputError(
                f"{truth}: {number} stands for {synset}, which is not a class of the training set"
            )
        lines.append(_line(image, labels[synset]))
    return lines


def read_synsets(meta: str) -> dict[int, str]:
    """The synset of each ILSVRC2012_ID, from the development kit's meta.mat.

    Raises:
        InputError: the file is something else, or SciPy is missing.
    """
    scipy_io = import_extra("scipy.io", "imagenet")
    try:
        rows = scipy_io.loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # damaged files make SciPy's readers raise almost anything
        raise InputError(f"{meta} is not the meta.mat of ImageNet's development kit") from error
