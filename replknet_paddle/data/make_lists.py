"""Writing datasets' list files: from folders, from one tree that is split, and small ready sets."""

import colorsys
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.data.class_names import CLASS_NAMES_FILE
from replknet_paddle.data.lists import IGNORED, LIST_FILES
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file, file_sha256, write_text
from replknet_paddle.runtime.packages import import_extra

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
VAL_EVERY = 5  # every fifth image of a ready set goes to validation

Labelled = tuple[str, int]  # path of an image below the data folder, class

logger = logging.getLogger(__name__)


def make_lists(
    root: str, *, train: str, val: str, devkit: str | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Write train_list.txt and val_list.txt into `root`, and class_names.txt.

    Classes are the folders in `train`, numbered in the sorted order of their names, which for
    ImageNet's synsets is that of the published weights. Their names become class_names.txt, unless
    they are synsets: for those the project has better ones. The folder `val` has some or all of the
    same classes; or, with `devkit` (ImageNet's ILSVRC2012_devkit_t12, whose ground truth has the
    labels), ImageNet-1K's 50,000 validation images. Return the number of lines of each file.
    """
    classes = _class_folders(os.path.join(root, train))
    train_images = _tree_images(root, train, classes)
    if devkit is None:
        val_images = _tree_images(root, val, classes)
    else:
        val_images = _ground_truth_images(root, val, classes, devkit)
    return _write_lists(root, train_images, val_images, classes, overwrite=overwrite)


def split_lists(
    root: str, *, folder: str, share: float, seed: int = 0, overwrite: bool = False
) -> dict[str, int]:
    """Write the files of `make_lists` over one tree of class folders, `folder` below `root`.

    Of each class, `share` (between 0 and 1) of the images goes to validation, rounded, at least one
    and never all. Files with the same bytes stay together, and in training if they are in several
    classes. The choice depends on nothing but the seed, the paths and identical files.
    """
    classes = _class_folders(os.path.join(root, folder))
    if len(classes) == 1:
        raise InputError(
            f"{os.path.join(root, folder)} holds one folder, {classes[0]}, which would be the only "
            f"class; if the classes are in it, add -train {classes[0]}"
        )
    images = _tree_images(root, folder, classes)
    labels = [label for _, label in images]
    groups = identical_files([os.path.join(root, path) for path, _ in images])
    in_val = choose_validation(labels, groups, share=share, seed=seed)
    counts, represented = Counter(labels), {labels[i] for i in in_val}
    for label, name in enumerate(classes):
        if label not in represented:
            logger.warning(
                "class %s has no validation image: it has too few images that differ (%d in all)",
                name,
                counts[label],
            )
    train = [image for i, image in enumerate(images) if i not in in_val]
    val = [image for i, image in enumerate(images) if i in in_val]
    return _write_lists(root, train, val, classes, overwrite=overwrite)


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


def _write_lists(
    root: str, train: list[Labelled], val: list[Labelled], classes: list[str], *, overwrite: bool
) -> dict[str, int]:
    """Write both lists and, unless they are synsets, the classes; return the lines of each file."""
    for path, _ in train + val:
        if path != path.strip() or "\n" in path or "\r" in path:
            raise InputError(
                f"{path!r}: a list cannot hold names with line breaks, or white space at "
                "their start; rename it"
            )
    lists = {
        name: [f"{path} {label}" for path, label in images]
        for name, images in zip(LIST_FILES.values(), (train, val))
    }
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


def _class_folders(folder: str) -> list[str]:
    """Return the names of the folders in `folder`, sorted."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder}; it should hold a folder for each class")
    with os.scandir(folder) as entries:
        classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} holds no folders; it should hold one for each class")
    return classes


def _tree_images(root: str, part: str, classes: list[str]) -> list[Labelled]:
    """Return all images in the class folders of `part`, a folder below `root`."""
    labels = {name: label for label, name in enumerate(classes)}
    images = []
    for name in _class_folders(os.path.join(root, part)):
        if name not in labels:
            raise InputError(f"{os.path.join(root, part, name)}: no such class in training")
        images += [(path, labels[name]) for path in _images(root, os.path.join(part, name))]
    return images


def _images(root: str, part: str) -> Iterator[str]:
    """Yield the image files in a folder and those below, sorted, as paths relative to `root`."""
    for folder, folders, files in os.walk(os.path.join(root, part)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _ground_truth_images(root: str, part: str, classes: list[str], devkit: str) -> list[Labelled]:
    """Return ImageNet's validation images, which its ground truth labels in sorted order."""
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
    write_text(os.path.join(folder, CLASS_NAMES_FILE), "\n".join(SHAPES) + "\n")
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
