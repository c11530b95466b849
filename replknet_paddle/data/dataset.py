"""ImageNet in list files, or anything else in that layout, and the loaders over it.

    DATA_PATH/train_list.txt    one image a line: path relative to DATA_PATH, white space, label
    DATA_PATH/val_list.txt

The label is what follows the last white space, so paths may hold spaces. Training samples are
named by (epoch, index), and all that is random in one depends on nothing but the seed and that
name: neither the number of workers nor a restart changes what the network sees.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import paddle

from replknet_paddle.runtime.errors import InputError, SampleError
from replknet_paddle.data.loader import Loader, check_memory
from replknet_paddle.data.transforms import build_eval_transform, build_finish, build_train_transform
from replknet_paddle.data.transforms.image import open_image

LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the "
    "path of an image below that folder, a space and the number of its class, e.g. "
    '"train/n01440764/n01440764_10026.JPEG 0"; replknet make-lists writes them'
)
LIST_FILES = {True: "train_list.txt", False: "val_list.txt"}
CLASS_NAMES_FILE = "class_names.txt"
IMAGENET_NAMES = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "configs", "imagenet1k_class_names.txt"
)


class ListDataset(paddle.io.Dataset):
    """The images of a list file.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that no image may lie outside of.
        transform: (PIL image, random generator) -> float32 array (3, H, W).
        num_classes: labels must be in [0, num_classes).
        seed: of the random generators.
        allow_outside: let images lie anywhere else, after all.

    Raises:
        FileNotFoundError: no such folder or list.
        InputError: a line that cannot be right; the message has the file and the line number.
    """

    def __init__(
        self,
        list_file: str,
        root: str,
        transform: Callable,
        *,
        num_classes: int,
        seed: int = 0,
        allow_outside: bool = False,
    ):
        super().__init__()
        if not os.path.isdir(root):
            raise FileNotFoundError(f"no data folder {root}; {LAYOUT}")
        if not os.path.isfile(list_file):
            raise FileNotFoundError(f"no list file {list_file}; {LAYOUT}")
        self.list_file = list_file
        self.root = root
        self.transform = transform
        self.seed = seed
        self.allow_outside = allow_outside
        # Bytes and arrays rather than lists of str: reading a list's items writes to their
        # reference counts, and that copies the whole list into every worker process.
        self._paths, self._ends, self._lines, self.labels = read_list(
            list_file, num_classes, allow_outside=allow_outside
        )

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of image `index`, relative to the data folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        """The image (3, H, W) and label of sample (epoch, index)."""
        return self.read(*sample, self.transform), self.labels[sample[1]]

    def read(self, epoch: int, index: int, transform: Callable):
        """What `transform` makes of image `index`.

        Raises:
            SampleError: it cannot be read.
        """
        path = self.path(index)
        try:
            full = resolve(self.root, path, allow_outside=self.allow_outside)
            with open_image(full) as image:
                return transform(image, np.random.default_rng((self.seed, epoch, index)))
        except (OSError, InputError) as error:
            reason = error
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror.lower()  # without the path, which is named already
            raise SampleError(
                f"{self.list_file}, line {self._lines[index]}: cannot read image "
                f"{_printable(path)}: {_printable(str(reason))}"
            ) from None


def resolve(root: str, path: str, *, allow_outside: bool) -> str:
    """Where the image `path` of the data folder `root` lies.

    Raises:
        InputError: it leads out of the data folder, which `allow_outside` does not allow.
    """
    if allow_outside:
        return os.path.join(root, path)
    folder, name = os.path.split(path)
    full = os.path.join(_real_folder(root, folder), name)
    if os.path.islink(full):
        full = os.path.realpath(full)
        _check_inside(full, root)
    return full


def _printable(text: str) -> str:
    """`text` on one line, whatever bytes a file's name was made of."""
    return text if text.isprintable() else ascii(text)[1:-1]


@functools.lru_cache(maxsize=65536)  # ImageNet-22K has 21,841 folders
def _real_folder(root: str, folder: str) -> str:
    real = os.path.realpath(os.path.join(root, folder))
    _check_inside(real, root)
    return real


def _check_inside(real: str, root: str) -> None:
    real_root = os.path.realpath(root)
    if os.path.commonpath([real, real_root]) != real_root:
        raise InputError(
            f"it leads to {_printable(real)}, outside the data folder; "
            "DATA.ALLOW_OUTSIDE True allows that"
        )


class Line(NamedTuple):
    """A line of a list file; blank lines are none.

    number: counted from 1, blank lines included.
    path: relative to the data folder.
    kind: of problem that the line cannot be used for: "line", "label", "outside", or None.
    problem: what it is.
    """

    number: int
    path: bytes
    label: int
    kind: str | None = None
    problem: str | None = None


def parse_list(
    list_file: str, num_classes: int | None, *, allow_outside: bool = False
) -> Iterator[Line]:
    """The lines of a list file, good and bad.

    Args:
        num_classes: labels must be below; None: they need not.
        allow_outside: accept paths that are absolute or hold `..`.
    """
    with open(list_file, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Line(number, *_parse_line(line, num_classes, allow_outside))


def read_list(list_file: str, num_classes: int, *, allow_outside: bool = False):
    """Read a list file of which every line must be good.

    Returns:
        All paths as one bytes object, the end of each path in it, the line number of each image,
        and the labels: int64 arrays (number of images,).

    Raises:
        InputError: the first lines that cannot be right, up to ten, with their numbers.
    """
    paths, ends, lines, labels, problems = [], [], [], [], []
    end = 0
    for line in parse_list(list_file, num_classes, allow_outside=allow_outside):
        if line.problem:
            problems.append(f"{list_file}, line {line.number}: {line.problem}")
            if len(problems) == 10:
                break
            continue
        paths.append(line.path)
        end += len(line.path)
        ends.append(end)
        lines.append(line.number)
        labels.append(line.label)
    if problems:
        raise InputError("\n".join(problems))
    if not paths:
        raise InputError(f"{list_file} lists no image")
    return (
        b"".join(paths),
        np.array(ends, dtype="int64"),
        np.array(lines, dtype="int64"),
        np.array(labels, dtype="int64"),
    )


def _parse_line(line: bytes, num_classes: int | None, allow_outside: bool) -> tuple:
    """Path, label and, if anything is wrong with the line, the kind of problem and what it is."""
    shown = _shortened(line.strip())
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2:
        return b"", 0, "line", f"expected a path and a label, got '{shown}'"
    path, text = parts
    # int() alone would also take 1_000, and digits of other scripts.
    digits = text.removeprefix(b"-")
    if not digits.isdigit():
        reason = f"no label after the path: '{shown}' ends with '{_shortened(text)}'"
        return path, 0, "line", reason
    label = int(digits) if len(digits) < 18 else sys.maxsize
    if digits != text:
        label = -label
    if label < 0 or (num_classes is not None and label >= num_classes):
        reason = (
            "negative"
            if num_classes is None
            else f"outside [0, {num_classes}); MODEL.NUM_CLASSES sets the number of classes"
        )
        return path, label, "label", f"label {_shortened(text)} is {reason}"
    if b"\0" in path:
        return path, label, "line", f"a path cannot hold a NUL byte: '{shown}'"
    if not allow_outside and (path.startswith(b"/") or b".." in path.split(b"/")):
        reason = (
            f"path '{shown}' must be relative and stay inside the data folder; "
            "DATA.ALLOW_OUTSIDE True allows others"
        )
        return path, label, "outside", reason
    return path, label


def _shortened(text: bytes) -> str:
    """The beginning and end of `text`, for a message."""
    text = text.decode("utf-8", "replace")
    return _printable(text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}")


class TrainBatches(paddle.io.Sampler):
    """The (epoch, index) names of one rank's training batches, epoch by epoch.

    All ranks shuffle alike, and each takes its part of every global batch, so two ranks with
    batch b see in each step what one rank with batch 2b sees. The images of an incomplete last
    global batch wait for another epoch.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int, seed: int):
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """What the next iteration gives: this epoch, from this batch on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, for this rank as for any other."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        step = self.batch_size * self.world_size
        for batch in range(self.first_batch, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


class EvalBatches(paddle.io.Sampler):
    """The names of one rank's evaluation batches: every image once over all ranks, none twice."""

    def __init__(self, length: int, batch_size: int, *, rank: int, world_size: int):
        self.indices = range(rank, length, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


def get_dataset(config, is_train: bool) -> ListDataset:
    """The training or the validation set that `config` names."""
    transform = build_train_transform(config) if is_train else build_eval_transform(config)
    root = config.DATA.DATA_PATH
    return ListDataset(
        os.path.join(root, LIST_FILES[is_train]),
        root,
        transform,
        num_classes=config.MODEL.NUM_CLASSES,
        seed=config.SEED,
        allow_outside=config.DATA.ALLOW_OUTSIDE,
    )


def get_dataloader(
    config, dataset: ListDataset, is_train: bool, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Batches (images (N, 3, H, W) float32, labels (N,) int64) of one rank.

    Raises:
        InputError: fewer training images than one batch of all ranks, or less shared memory than
            the workers' batches need.
    """
    if is_train:
        batches = TrainBatches(
            len(dataset), config.DATA.BATCH_SIZE, rank=rank, world_size=world_size, seed=config.SEED
        )
        if len(batches) == 0:
            raise InputError(
                f"{dataset.list_file} lists {len(dataset)} images, fewer than one batch "
                f"(DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x {world_size} processes); "
                "give a smaller -batch_size"
            )
    else:
        batches = EvalBatches(
            len(dataset),
            config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE,
            rank=rank,
            world_size=world_size,
        )
    workers = config.DATA.NUM_WORKERS
    finish = None
    if config.DATA.FINISH_ON_DEVICE and hasattr(dataset.transform, "unfinished"):
        finish = build_finish(config)
    value_bytes = 4 if finish is None else 1
    image_bytes = 3 * config.DATA.IMAGE_SIZE**2 * value_bytes
    batch_bytes = batches.batch_size * image_bytes
    if workers:
        both = 0  # whoever trains evaluates as well, by a loader that stays
        if is_train:
            both = image_bytes * (config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE)
        check_memory(
            batch_bytes=batch_bytes + both,
            workers=workers,
            processes=int(os.environ.get("PADDLE_LOCAL_SIZE", world_size)),
        )
    return Loader(
        dataset,
        batches,
        workers=workers,
        batch_bytes=batch_bytes,
        finish=finish,
        max_bad_images=config.DATA.MAX_BAD_IMAGES if is_train else None,
    )


def get_class_names(config) -> list[str] | None:
    """The names of the classes: DATA.CLASS_NAMES, or class_names.txt beside the lists, or, where
    there are 1000 classes, those of ImageNet-1K; None where nothing names them.

    Raises:
        FileNotFoundError: no file DATA.CLASS_NAMES.
        InputError: a file that does not have one name per class.
    """
    beside = os.path.join(config.DATA.DATA_PATH, CLASS_NAMES_FILE)
    path = config.DATA.CLASS_NAMES
    if path is None and os.path.isfile(beside):
        path = beside
    if path is None and config.MODEL.NUM_CLASSES == 1000:
        path = IMAGENET_NAMES
    return None if path is None else read_class_names(path, config.MODEL.NUM_CLASSES)


def read_class_names(path: str, num_classes: int) -> list[str]:
    """The lines of a text file, one name each."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of class names {path}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    if len(names) != num_classes or not all(names):
        raise InputError(
            f"{path} has {len(names)} lines, {names.count('')} of them empty; "
            f"allowed: one name for each of the {num_classes} classes"
        )
    return names
