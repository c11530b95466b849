"""ImageNet in list files, or anything else in that layout, and the loaders over it.

    DATA_PATH/train_list.txt    one image a line: path relative to DATA_PATH, white space, label
    DATA_PATH/val_list.txt

The label is what follows the last white space, so paths may hold spaces. Training samples are
named by (epoch, index), and all that is random in one depends on nothing but the seed and that
name: neither the number of workers nor a restart changes what the network sees.
"""

import ctypes
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

import numpy as np
import paddle
from PIL import Image

from errors import InputError
from transforms import build_eval_transform, build_train_transform

LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the path of "
    "an image below that folder, a space and the number of its class, e.g. "
    '"train/n01440764/n01440764_10026.JPEG 0"'
)
LIST_FILES = {True: "train_list.txt", False: "val_list.txt"}


class ListDataset(paddle.io.Dataset):
    """The images of a list file.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that no image may lie outside of.
        transform: (PIL image, random generator) -> float32 array (3, H, W).
        num_classes: labels must be in [0, num_classes).
        seed: of the random generators.

    Raises:
        FileNotFoundError: no such folder or list.
        InputError: a line that cannot be right; the message has the file and the line number.
    """

    def __init__(
        self, list_file: str, root: str, transform: Callable, *, num_classes: int, seed: int = 0
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
        # Bytes and arrays rather than lists of str: reading a list's items writes to their
        # reference counts, and that copies the whole list into every worker process.
        self._paths, self._ends, self._lines, self.labels = read_list(list_file, num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of image `index`, relative to the data folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        """The image (3, H, W) and label of sample (epoch, index).

        Raises:
            SampleError: it cannot be read; the message has the list's line.
        """
        epoch, index = sample
        path = self.path(index)
        try:
            with Image.open(self._resolve(path)) as image:
                pixels = self.transform(image, np.random.default_rng((self.seed, epoch, index)))
        except (
            OSError,
            ValueError,
            RuntimeError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            # What Pillow's readers raise for broken files: PNG's SyntaxError, AVIF's RuntimeError.
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
            raise SampleError(
                f"{self.list_file}, line {self._lines[index]}: cannot read image {path}: {reason}"
            ) from None
        return pixels, self.labels[index]

    def _resolve(self, path: str) -> str:
        """The absolute path of an image, which must not lie outside the data folder."""
        folder, name = os.path.split(path)
        full = os.path.join(_real_folder(self.root, folder), name)
        if os.path.islink(full):
            full = os.path.realpath(full)
            _check_inside(full, self.root)
        return full


class SampleError(InputError):
    """An image that cannot be read."""


@functools.lru_cache(maxsize=65536)  # ImageNet-22K has 21,841 folders
def _real_folder(root: str, folder: str) -> str:
    real = os.path.realpath(os.path.join(root, folder))
    _check_inside(real, root)
    return real


def _check_inside(real: str, root: str) -> None:
    real_root = os.path.realpath(root)
    if os.path.commonpath([real, real_root]) != real_root:
        raise ValueError(f"it leads to {real}, outside the data folder")


def read_list(list_file: str, num_classes: int):
    """Parse a list file.

    Returns:
        All paths as one bytes object, the end of each path in it, the line number of each image
        (counted from 1; blank lines count), and the labels: int64 arrays (number of images,).

    Raises:
        InputError: the first lines that cannot be right, up to ten, with their numbers.
    """
    paths, ends, lines, labels, problems = [], [], [], [], []
    end = 0
    with open(list_file, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            path, label, problem = _parse_line(line, num_classes)
            if problem:
                problems.append(f"{list_file}, line {number}: {problem}")
                if len(problems) == 10:
                    break
                continue
            paths.append(path)
            end += len(path)
            ends.append(end)
            lines.append(number)
            labels.append(label)
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


def _parse_line(line: bytes, num_classes: int) -> tuple[bytes, int, str | None]:
    """Path, label, and what is wrong with the line, if anything."""
    shown = _shortened(line.strip())
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2:
        return b"", 0, f"expected a path and a label, got {shown!r}"
    path, label = parts
    if not re.fullmatch(rb"-?[0-9]+", label):
        return b"", 0, f"no label after the path: {shown!r} ends with {_shortened(label)!r}"
    if len(label) > 18 or not 0 <= int(label) < num_classes:
        return (
            b"",
            0,
            (
                f"label {_shortened(label)} is outside [0, {num_classes}); "
                "MODEL.NUM_CLASSES sets the number of classes"
            ),
        )
    if b"\0" in path or path.startswith(b"/") or b".." in path.split(b"/"):
        return b"", 0, f"path {shown!r} must be relative and stay inside the data folder"
    return path, int(label), None


def _shortened(text: bytes) -> str:
    """The beginning and end of `text`, for a message."""
    text = text.decode("utf-8", "replace")
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


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
    if is_train:
        transform = build_train_transform(config)
    else:
        evaluate = build_eval_transform(config)

        def transform(image, _):
            return evaluate(image)

    root = config.DATA.DATA_PATH
    return ListDataset(
        os.path.join(root, LIST_FILES[is_train]),
        root,
        transform,
        num_classes=config.MODEL.NUM_CLASSES,
        seed=config.SEED,
    )


class Loader:
    """Batches of a data set by worker processes, in the order of `batch_sampler`.

    Over Paddle's loader, which at an image that cannot be read waits for ever, without workers, or
    raises SystemError: here that image's SampleError is raised, in this process.

    Args:
        batch_sampler: lists of the names of samples.
        workers: processes, which live as long as the loader; 0 loads in this process.
    """

    def __init__(self, dataset: ListDataset, batch_sampler, *, workers: int):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        # Without shared memory, workers make no Paddle tensors: making one has been seen to wait
        # for a lock of Paddle's that another thread of the parent held when the worker was forked.
        self._batches = paddle.io.DataLoader(
            _ErrorsAsSamples(dataset),
            batch_sampler=batch_sampler,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            use_shared_memory=False,
            worker_init_fn=functools.partial(_set_up_worker, os.getpid()),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[paddle.Tensor]]:
        """Images (N, 3, H, W) and labels (N,)."""
        for batch in self._batches:
            if len(batch) == 1:
                raise SampleError(os.fsdecode(batch[0].numpy().tobytes()))
            yield batch


class _ErrorsAsSamples(paddle.io.Dataset):
    """The samples of a data set, with the SampleError in place of one that cannot be read."""

    def __init__(self, dataset: ListDataset):
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, int]):
        try:
            return self.dataset[sample]
        except SampleError as error:
            return error


def _collate(samples: list) -> list[np.ndarray]:
    """Images and labels of a batch; or, alone, the text of its first error."""
    for sample in samples:
        if isinstance(sample, SampleError):
            return [np.frombuffer(os.fsencode(str(sample)), dtype="uint8").copy()]
    images, labels = zip(*samples)
    return [np.stack(images), np.stack(labels)]


PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


def _set_up_worker(parent: int, _worker_id: int) -> None:
    """Let a worker live just as long as its parent.

    Ctrl-C and Paddle's launcher signal the whole group of a training process, which then needs its
    workers until it has saved: each leaves that group. And it dies with a parent that was killed.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before the kernel was told
        os._exit(1)


def get_dataloader(
    config, dataset: ListDataset, is_train: bool, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Batches (images (N, 3, H, W) float32, labels (N,) int64) of one rank.

    The loader's `batch_sampler` is a `TrainBatches` or an `EvalBatches`.

    Raises:
        InputError: fewer training images than one batch of all ranks.
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
    return Loader(dataset, batches, workers=config.DATA.NUM_WORKERS)
