"""List files of a data set: written from folders, and checked against the images they name."""

import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

from replknet_paddle.data.dataset import CLASS_NAMES_FILE, LIST_FILES, Line, parse_list, resolve
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.data.transforms.image import load, open_image, to_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"


# ---- writing


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
    classes = _class_folders(os.path.join(root, train))
    lists = {
        LIST_FILES[True]: _tree_lines(root, train, classes),
        LIST_FILES[False]: (
            _tree_lines(root, val, classes)
            if devkit is None
            else _ground_truth_lines(root, val, classes, devkit)
        ),
    }
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        lists[CLASS_NAMES_FILE] = classes
    for name in lists:
        if os.path.exists(os.path.join(root, name)) and not overwrite:
            raise InputError(f"{os.path.join(root, name)} is there; -overwrite replaces it")
    for name, lines in lists.items():
        if not lines:
            raise InputError(f"no images ({', '.join(SUFFIXES)}) for {os.path.join(root, name)}")
        unfinished = os.path.join(root, f"{name}.unfinished")
        with open(unfinished, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(unfinished, os.path.join(root, name))
    return {name: len(lines) for name, lines in lists.items()}


def _class_folders(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold a folder for each class")
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folders; it should hold one for each class")
    return classes


def _tree_lines(root: str, part: str, classes: list[str]) -> list[str]:
    labels = {name: label for label, name in enumerate(classes)}
    lines = []
    for name in _class_folders(os.path.join(root, part)):
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
                f"{truth}: {number} stands for {synset}, which is no class in training"
            )
        lines.append(_line(image, labels[synset]))
    return lines


def read_synsets(meta: str) -> dict[int, str]:
    """The synset of each ILSVRC2012_ID, from the development kit's meta.mat.

    Raises:
        InputError: the file is something else, or SciPy is missing.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            f"reading {meta} needs SciPy: pip install -r requirements/imagenet.txt"
        ) from None
    try:
        rows = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # damaged files make SciPy's readers raise almost anything
        raise InputError(f"{meta} is not the meta.mat of ImageNet's development kit") from error


# ---- checking


class Problem(NamedTuple):
    """Something wrong in a data set.

    kind: one of `KINDS`.
    list, line, path: where; a line of 0 stands for the whole list.
    """

    kind: str
    list: str
    line: int
    path: str
    message: str


KINDS = {
    "line": "lines that cannot be parsed",
    "label": "labels out of range",
    "outside": "paths that lead out of the data folder",
    "missing": "missing files",
    "undecodable": "files that are no image, or damaged",
    "truncated": "files that end too early",
    "duplicate": "lines whose path is in the list already",
    "overlap": "validation images that training has as well, by path or by content",
    "empty class": "classes without a training image",
}


class Finding(NamedTuple):
    """What reading one image found: a kind of problem and its message, or a digest of the file."""

    kind: str | None
    message: str
    digest: bytes


def check_data(
    root: str,
    *,
    num_classes: int | None = None,
    allow_outside: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda images, total: images,
) -> dict:
    """Read every image of a data set, and report all that is wrong.

    Args:
        root: folder of the lists that are there, train_list.txt, val_list.txt or both.
        num_classes: labels must be below; None: the largest label of train_list.txt, plus one, but
            no more than it has lines.
        allow_outside: as DATA.ALLOW_OUTSIDE.
        workers: processes that decode.
        progress: (findings, how many) -> the same findings, showing how far it is.

    Returns:
        {"data_path", "num_classes", "lists": {name: {"images", "images_per_class"}},
        "counts": {kind: problems}, "problems": [fields of `Problem`]}, ready for JSON.

    Raises:
        FileNotFoundError: no such folder, or no list in it.
    """
    names = [name for name in LIST_FILES.values() if os.path.isfile(os.path.join(root, name))]
    if not names:
        raise FileNotFoundError(f"no {' or '.join(LIST_FILES.values())} in {root}")
    lines = {
        name: list(parse_list(os.path.join(root, name), None, allow_outside=allow_outside))
        for name in names
    }
    if num_classes is None:
        labels = [line.label for line in lines[names[0]] if line.problem is None]
        # One slip of a key must not make millions of classes: each has an image at least.
        num_classes = min(1 + max(labels, default=0), max(1, len(labels)))
    problems = []
    for name in names:
        problems += _line_problems(name, lines[name], num_classes)

    paths = sorted({line.path for part in lines.values() for line in part if not line.problem})
    check = partial(check_image, root, allow_outside=allow_outside)
    with ProcessPoolExecutor(max_workers=workers) as pool:
        findings = pool.map(check, map(os.fsdecode, paths), chunksize=16)
        found = dict(zip(paths, progress(findings, len(paths))))
    for name in names:
        for line in lines[name]:
            if not line.problem and found[line.path].kind:
                problems.append(
                    _problem(found[line.path].kind, name, line, found[line.path].message)
                )
    if len(names) == 2:
        problems += _overlap(lines, found)
    counts = Counter(problem.kind for problem in problems)
    return {
        "data_path": root,
        "num_classes": num_classes,
        "lists": {
            name: {
                "images": len(lines[name]),
                "images_per_class": _per_class(lines[name], num_classes),
            }
            for name in names
        },
        "counts": {kind: counts[kind] for kind in KINDS},
        "problems": [problem._asdict() for problem in problems],
    }


def check_image(root: str, path: str, *, allow_outside: bool = False) -> Finding:
    """Read one image as training does, and decode all of it."""
    try:
        full = resolve(root, path, allow_outside=allow_outside)
    except InputError as error:
        return Finding("outside", str(error), b"")
    if os.path.exists(full) and not os.path.isfile(full):
        return Finding("undecodable", "not a regular file", b"")
    try:
        with open(full, "rb") as file:
            data = file.read()
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "undecodable"
        return Finding(kind, (error.strerror or str(error)).lower(), b"")
    try:
        with open_image(io.BytesIO(data)) as image:
            load(image)
            to_rgb(image)
    except (OSError, InputError) as error:
        # Pillow has no kind of exception for it; an empty file ends too early as well.
        truncated = not data or re.search("truncated|premature|not enough", str(error), re.I)
        return Finding("truncated" if truncated else "undecodable", str(error), b"")
    return Finding(None, "", hashlib.blake2b(data, digest_size=16).digest())


def _problem(kind: str, name: str, line: Line, message: str) -> Problem:
    path = line.path.decode("utf-8", "backslashreplace")
    return Problem(kind, name, line.number, path, message)


def _line_problems(name: str, lines: list[Line], num_classes: int) -> Iterator[Problem]:
    first = {}
    for line in lines:
        if line.problem:
            yield _problem(line.kind, name, line, line.problem)
            continue
        if line.label >= num_classes:
            yield _problem("label", name, line, f"{line.label} is outside [0, {num_classes})")
        if line.path in first:
            yield _problem("duplicate", name, line, f"also in line {first[line.path]}")
        first.setdefault(line.path, line.number)
    if name == LIST_FILES[True]:
        for label, count in enumerate(_per_class(lines, num_classes)):
            if not count:
                yield Problem("empty class", name, 0, "", f"class {label} has no image")


def _overlap(lines: dict[str, list[Line]], found: dict[bytes, Finding]) -> Iterator[Problem]:
    train = {}
    for line in lines[LIST_FILES[True]]:
        if not line.problem:
            train.setdefault(line.path, line.number)
            train.setdefault(found[line.path].digest or line.path, line.number)
    for line in lines[LIST_FILES[False]]:
        if not line.problem:
            number = train.get(line.path) or train.get(found[line.path].digest or line.path)
            if number:
                yield _problem(
                    "overlap",
                    LIST_FILES[False],
                    line,
                    f"also in line {number} of {LIST_FILES[True]}",
                )


def _per_class(lines: list[Line], num_classes: int) -> list[int]:
    counts = defaultdict(int)
    for line in lines:
        if not line.problem:
            counts[line.label] += 1
    return [counts[label] for label in range(num_classes)]
