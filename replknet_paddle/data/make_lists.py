"""Finding images in folders, and writing datasets' list files: from folders, from one tree that is
split, and small ready sets."""

import colorsys
import functools
import logging
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.data.class_names import CLASS_NAMES_FILE, class_names_text
from replknet_paddle.data.lists import IGNORED, LIST_FILES, list_files
from replknet_paddle.data.transforms.image import FORMATS
from replknet_paddle.runtime.errors import InputError, counted, did_you_mean
from replknet_paddle.runtime.files import atomic_file, file_sha256, write_text
from replknet_paddle.runtime.packages import import_extra

# What archives, file servers and Windows leave in folders, in lower case.
SYSTEM_NAMES = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
LISTED = 10  # names in a warning
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
VAL_EVERY = 5  # every fifth image of a ready set goes to validation

Labelled = tuple[str, int]  # path of an image below the data folder, class

logger = logging.getLogger(__name__)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the file name suffixes, in lower case with their dot, of the formats that are read."""
    Image.init()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in FORMATS}
    return frozenset(suffixes - {".pfm"})  # always of floats, which are refused


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_suffixes()


def is_system_name(name: str) -> bool:
    """Return whether a file or folder is hidden, or none of the user's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def find_images(
    folder: str, passed_over: Counter, *, is_left_out: Callable[[str], bool] = lambda folder: False
) -> Iterator[tuple[str, str | None]]:
    """Yield pairs of a path and None, of the images in a folder and below, in sorted order; or of a
    folder and why it cannot be listed.

    Images are the files with `image_suffixes`; the suffixes of others are counted in `passed_over`.
    Hidden names and `SYSTEM_NAMES` are neither. Links to folders are not followed.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.path, e.name, e.is_dir(follow_symlinks=False)) for e in entries)
    except OSError as error:
        yield folder, f"cannot list the folder: {error.strerror}"
        return
    for path, name, is_folder in found:
        if is_system_name(name):
            continue
        if is_folder:
            if not is_left_out(path):
                yield from find_images(path, passed_over, is_left_out=is_left_out)
        elif is_image_name(name):
            yield path, None
        else:
            passed_over[os.path.splitext(name)[1].lower() or "without a suffix"] += 1


def say_passed_over(passed_over: Counter) -> str:
    """Return how many files were not taken for images, by suffix; nothing where all were."""
    kinds = _listed([f"{count} {suffix}" for suffix, count in passed_over.most_common()])
    files = counted(passed_over.total(), "file")
    return f"passed over {files} not named as images are ({kinds})" if kinds else ""


def _listed(items: list[str]) -> str:
    return ", ".join([*items[:LISTED], "..."] if len(items) > LISTED else items)


def make_lists(
    root: str, *, train: str, val: str, devkit: str | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Write train_list.txt and val_list.txt into `root`, and class_names.txt.

    Classes are the folders in `train` that hold images, numbered in the sorted order of their
    names, which for ImageNet's synsets is that of the published weights. Their names become
    class_names.txt, unless they are synsets: for those the project has better ones, and all folders
    count, since one left out would shift the others. The folder `val` has some or all of the
    same classes; or, with `devkit` (ImageNet's ILSVRC2012_devkit_t12, whose ground truth has the
    labels), ImageNet-1K's 50,000 validation images. Return the number of lines of each file.
    """
    passed_over: Counter = Counter()
    folders = class_folders(root, train, passed_over)
    classes = _classes(folders)
    train_images = _labelled(root, train, folders, classes)
    if devkit is None:
        val_images = _labelled(root, val, class_folders(root, val, passed_over), classes)
    else:
        val_images = _ground_truth_images(root, val, classes, devkit, passed_over)
    lists = dict(zip(LIST_FILES.values(), (train_images, val_images)))
    written = _write_lists(root, lists, classes, overwrite=overwrite)
    _report(lists, classes, passed_over)
    return written


def split_lists(
    root: str,
    *,
    folder: str,
    share: float | None = None,
    folds: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the files of `make_lists` over one tree of class folders, `folder` below `root`.

    Of each class, `share` (between 0 and 1) of the images goes to validation, rounded, at least one
    and never all. Files with the same bytes stay together, and in training if they are in several
    classes. The choice depends on nothing but the seed, the paths and identical files.

    With `folds` instead, each image goes to validation in one of so many pairs of lists.
    """
    if seed < 0:
        raise InputError(f"-seed {seed}; allowed: an integer >= 0")
    passed_over: Counter = Counter()
    folders = class_folders(root, folder, passed_over)
    if len(folders) == 1:
        [name] = folders
        raise InputError(
            f"{os.path.join(root, folder)} holds one folder, {name}, which would be the only "
            f"class; if the classes are in it, add -train {name}"
        )
    classes = _classes(folders)
    images = _labelled(root, folder, folders, classes)
    labels = [label for _, label in images]
    groups = identical_files([os.path.join(root, path) for path, _ in images])
    if folds is None:
        chosen = {None: choose_validation(labels, groups, share=share, seed=seed)}
    else:
        chosen = choose_folds(labels, groups, folds=folds, seed=seed)
    lists = {
        name: [image for i, image in enumerate(images) if (i not in in_val) == is_train]
        for fold, in_val in chosen.items()
        for is_train, name in list_files(fold).items()
    }
    written = _write_lists(root, lists, classes, overwrite=overwrite)
    _report(lists, classes, passed_over, why=" (too few of its images differ)")
    return written


def identical_files(paths: list[str]) -> list[list[int]]:
    """Return groups of indices of files with the same bytes; most groups have one."""
    by_size = defaultdict(list)
    for i, path in enumerate(paths):
        by_size[os.path.getsize(path)].append(i)
    groups = defaultdict(list)
    for size, same_size in by_size.items():
        for i in same_size:  # a size of its own tells a file apart without reading it
            groups[size, file_sha256(paths[i]) if len(same_size) > 1 else ""].append(i)
    return sorted(groups.values())


def choose_validation(
    labels: list[int], groups: list[list[int]], *, share: float, seed: int
) -> set[int]:
    """Return the indices of the images that go to validation; none of `groups` is divided."""
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


def choose_folds(
    labels: list[int], groups: list[list[int]], *, folds: int, seed: int
) -> dict[int, set[int]]:
    """Return the indices of the images for validation in each fold, counted from 1; none of
    `groups` is divided, and where they are single images, the numbers of a class in the folds
    differ by at most one, as do those of all classes."""
    if not 2 <= folds <= len(groups):
        count = counted(len(groups), "image")
        raise InputError(f"-folds is {folds}; allowed: from 2 to the {count} that differ")
    chosen = {fold: set() for fold in range(1, folds + 1)}
    counts = {fold: Counter() for fold in chosen}
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    for group in sorted(order, key=lambda group: (labels[group[0]], -len(group))):
        own = {labels[i] for i in group}
        fold = min(chosen, key=lambda f: (sum(counts[f][c] for c in own), len(chosen[f])))
        chosen[fold].update(group)
        counts[fold].update(labels[i] for i in group)
    return chosen


def _write_lists(
    root: str, images: dict[str, list[Labelled]], classes: list[str], *, overwrite: bool
) -> dict[str, int]:
    """Write the lists and, unless they are synsets, the classes; return the lines of each file."""
    for path, _ in sum(images.values(), []):
        if path != path.strip() or "\n" in path or "\r" in path:
            raise InputError(
                f"{path!r}: a list cannot hold names with line breaks, or white space at "
                "their start; rename it"
            )
    lists = {name: [f"{path} {label}" for path, label in listed] for name, listed in images.items()}
    if not _are_synsets(classes):
        for name in classes:
            if len(name.splitlines()) > 1:
                raise InputError(f"the folder name {ascii(name)} has a line break; rename it")
        class_names_text(classes)  # refuses other names that it cannot hold
        lists[CLASS_NAMES_FILE] = classes
    stale = []
    if LIST_FILES[True] not in images:  # those of more folds would be taken for some of these
        others = (n for n in os.listdir(root) if re.fullmatch(r"(train|val)_list_\d+\.txt", n))
        stale = sorted(set(others) - images.keys())
    for name in [*lists, *stale]:
        if os.path.exists(os.path.join(root, name)) and not overwrite:
            raise InputError(f"{os.path.join(root, name)} is there; -overwrite replaces it")
    for name, lines in lists.items():
        if not lines:
            suffixes = ", ".join(sorted(image_suffixes()))
            raise InputError(f"no images ({suffixes}) for {os.path.join(root, name)}")
    for name, lines in lists.items():
        with atomic_file(os.path.join(root, name), errors="surrogateescape") as file:
            file.writelines(f"{line}\n" for line in lines)
    for name in stale:
        os.unlink(os.path.join(root, name))
    return {name: len(lines) for name, lines in lists.items()}


def _report(
    lists: dict[str, list[Labelled]], classes: list[str], passed_over: Counter, why=""
) -> None:
    """Warn of classes without an image to train on or to validate with, and of files that are in no
    list."""
    labels = [{label for _, label in images} for images in lists.values()]
    pairs = list(zip(labels[::2], labels[1::2]))
    for kind, absent in (
        ("validation", set().union(*(train - val for train, val in pairs))),
        ("training", set().union(*(val - train for train, val in pairs))),
    ):
        if absent:
            names = _listed([classes[label] for label in sorted(absent)])
            count = counted(len(absent), "class")
            logger.warning("%s without a %s image%s: %s", count, kind, why, names)
    if passed_over:
        logger.warning("%s", say_passed_over(passed_over))


def _are_synsets(names: Iterable[str]) -> bool:
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def class_folders(root: str, part: str, passed_over: Counter) -> dict[str, list[str]]:
    """Return the images of each folder in `part`, a folder below `root`: sorted paths below it."""
    folder = os.path.normpath(os.path.join(root, part))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold a folder for each class")
    with os.scandir(folder) as entries:
        entries = [entry for entry in entries if not is_system_name(entry.name)]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    beside = [entry for entry in entries if entry.is_file() and is_image_name(entry.name)]
    if beside:
        images = counted(len(beside), "image")
        logger.warning("%s in %s beside the folders of the classes: in no list", images, folder)
    if not names:
        raise InputError(f"{folder} holds no folders; it should hold one for each class")
    return {name: _images(root, os.path.join(part, name), passed_over) for name in names}


def _classes(folders: dict[str, list[str]]) -> list[str]:
    """Return the names of the classes: of folders with images, or of all if they are synsets."""
    empty = [name for name, images in folders.items() if not images]
    are_synsets = _are_synsets(folders)
    if empty:
        count, names = counted(len(empty), "folder"), _listed(empty)
        kept = "kept as classes" if are_synsets else "left out"
        logger.warning("%s without an image, %s: %s", count, kept, names)
    return [name for name, images in folders.items() if images or are_synsets]


def _labelled(
    root: str, part: str, folders: dict[str, list[str]], classes: list[str]
) -> list[Labelled]:
    """Return the images in the class folders of `part` with their classes."""
    labels = {name: label for label, name in enumerate(classes)}
    for name, images in folders.items():
        if images and name not in labels:
            near = did_you_mean(name, classes)
            raise InputError(f"{os.path.join(root, part, name)}: no such class in training{near}")
    return [(image, labels[name]) for name, images in folders.items() for image in images]


def _images(root: str, part: str, passed_over: Counter) -> list[str]:
    """Return the image files in a folder and those below, sorted, as paths relative to `root`."""
    images = []
    for path, problem in find_images(os.path.join(root, part), passed_over):
        if problem:
            raise InputError(f"{path}: {problem}")
        images.append(os.path.relpath(path, root))
    # The files of a folder before its folders: the choice of a share goes by this order.
    return sorted(images, key=lambda path: [(1, up) for up in path.split("/")[:-1]] + [(0, path)])


def _ground_truth_images(
    root: str, part: str, classes: list[str], devkit: str, passed_over: Counter
) -> list[Labelled]:
    """Return ImageNet's validation images, which its ground truth labels in sorted order."""
    folder, truth = os.path.join(root, part), os.path.join(devkit, GROUND_TRUTH)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold the validation images")
    for path in (truth, os.path.join(devkit, META)):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no {path}; -devkit takes ImageNet's ILSVRC2012_devkit_t12")
    images = _images(root, part, passed_over)
    with open(truth, encoding="ascii", errors="replace") as file:
        numbers = file.read().split()
    if len(numbers) != len(images):
        raise InputError(
            f"{truth} has {counted(len(numbers), 'label')}, {folder} has "
            f"{counted(len(images), 'image')}"
        )
    synsets = read_synsets(os.path.join(devkit, META))
    labels = {name: label for label, name in enumerate(classes)}
    labelled = []
    for image, number in zip(images, numbers):
        synset = synsets.get(int(number)) if number.isdigit() else None
        if synset not in labels:
            raise InputError(
                f"{truth}: {number} stands for {synset}, which is not a class of the training set"
            )
        labelled.append((image, labels[synset]))
    return labelled


def read_synsets(meta: str) -> dict[int, str]:
    """Return the synset of each ILSVRC2012_ID, from the development kit's meta.mat."""
    scipy_io = import_extra("scipy.io", "imagenet")
    try:
        rows = scipy_io.loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # damaged files make SciPy's readers raise almost anything
        raise InputError(f"{meta} is not the meta.mat of ImageNet's development kit") from error


def make_digits(folder: str) -> None:
    """Write scikit-learn's handwritten digits below `folder`: train/, val/ and the lists."""
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    lines = []
    for i, (scan, label) in enumerate(zip(digits.images, digits.target)):
        path = os.path.join("train" if i % VAL_EVERY else "val", str(label), f"{i:04d}.png")
        os.makedirs(os.path.join(folder, os.path.dirname(path)), exist_ok=True)
        grey = np.round(scan * (255 / 16)).astype("uint8")  # scans count 0 to 16
        Image.fromarray(grey).save(os.path.join(folder, path))
        lines.append(f"{path} {label}\n")
    _write_ready_lists(folder, lines)


SOLAR_CLASSES = ("functional", "defective")
SOLAR_LISTS = {
    "train": LIST_FILES[True],
    "val": LIST_FILES[False],
    "test": os.path.join("test", LIST_FILES[False]),
}
# Where each of eight cells of a kind goes.
SOLAR_PARTS = ("test", "train", "val", "train", "test", "train", "train", "train")


def make_solar_cells(folder: str) -> None:
    """Copy elpv-dataset's photographs of solar cells below `folder`, and write their lists.

    A cell is defective where its label, the probability of a defect, is above a half. 5/8 of the
    cells are for training, 1/8 for validation and 2/8 for the test, stratified by that probability
    and the type of the silicon. The test set is the validation list of a data folder of its own.
    """
    source = os.path.join(os.path.dirname(import_extra("elpv_dataset", "solar").__file__), "data")
    with open(os.path.join(source, "labels.csv"), encoding="utf-8") as file:
        cells = [line.split() for line in file]  # path, probability, mono or poly
    shuffled = [cells[i] for i in np.random.default_rng(0).permutation(len(cells))]
    by_kind = sorted(shuffled, key=lambda cell: cell[1:])
    images = []
    for i, (cell, probability, _) in enumerate(by_kind):
        label, part = int(float(probability) > 0.5), SOLAR_PARTS[i % len(SOLAR_PARTS)]
        path = os.path.join(part, SOLAR_CLASSES[label], os.path.basename(cell))
        os.makedirs(os.path.join(folder, os.path.dirname(path)), exist_ok=True)
        shutil.copyfile(os.path.join(source, cell), os.path.join(folder, path))
        images.append((part, path, label))
    for part, name in SOLAR_LISTS.items():
        data = os.path.dirname(name)
        lines = [f"{os.path.relpath(path, data)} {y}\n" for p, path, y in images if p == part]
        names = os.path.join(folder, data, CLASS_NAMES_FILE)
        write_text(names, class_names_text(SOLAR_CLASSES))
        write_text(os.path.join(folder, name), "".join(sorted(lines)))


SHAPES = ("background", "circle", "square", "triangle")
SIDE = 64  # pixels of an image of shapes


def make_shapes(folder: str, *, count: int = 200, seed: int = 0) -> None:
    """Write images of shapes with their labels, to try segmentation on, and the lists."""
    lines = []
    for kind in ("images", "labels"):
        os.makedirs(os.path.join(folder, kind), exist_ok=True)
    for i in range(count):
        paths = [f"{kind}/{i:04d}.png" for kind in ("images", "labels")]
        for path, image in zip(paths, draw_shapes(np.random.default_rng((seed, i)))):
            image.save(os.path.join(folder, path))
        lines.append(" ".join(paths) + "\n")
    write_text(os.path.join(folder, CLASS_NAMES_FILE), class_names_text(SHAPES))
    _write_ready_lists(folder, lines)


def _write_ready_lists(folder: str, lines: list[str]) -> None:
    """Write the lists of a ready set at last, so that a folder that has both is complete."""
    for is_train, name in LIST_FILES.items():
        part = [line for i, line in enumerate(lines) if (i % VAL_EVERY != 0) == is_train]
        write_text(os.path.join(folder, name), "".join(part))


def draw_shapes(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return a noisy grey image of two to four shapes, and its labels; outlines are ignored.

    A class has a range of hues: green circles, blue squares, red triangles.
    """
    image = Image.new("RGB", (SIDE, SIDE), (int(rng.integers(40, 216)),) * 3)
    labels = Image.new("L", (SIDE, SIDE), 0)
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(SHAPES)))
        hue = 120 * label + rng.uniform(-20, 20)  # degrees
        colour = colorsys.hsv_to_rgb(hue % 360 / 360, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
        radius = int(rng.integers(11, 21))
        x, y = rng.integers(radius, SIDE - radius, 2).tolist()
        box = (x - radius, y - radius, x + radius, y + radius)
        corners = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
        for picture, fill, outline in (
            (image, tuple(round(255 * channel) for channel in colour), None),
            (labels, label, IGNORED),
        ):
            canvas = ImageDraw.Draw(picture)
            if SHAPES[label] == "triangle":
                canvas.polygon(corners, fill, outline)
            elif SHAPES[label] == "circle":
                canvas.ellipse(box, fill, outline)
            else:
                canvas.rectangle(box, fill, outline)
    pixels = np.array(image) + rng.normal(0, 12, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), labels
