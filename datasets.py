"""ImageNet in list files, or anything else in that layout, and the loaders over it.

    DATA_PATH/train_list.txt    one image a line: path relative to DATA_PATH, white space, label
    DATA_PATH/val_list.txt

The label is what follows the last white space, so paths may hold spaces. Training samples are
named by (epoch, index), and all that is random in one depends on nothing but the seed and that
name: neither the number of workers nor a restart changes what the network sees.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from errors import InputError
from transforms import build_eval_transform, build_finish, build_train_transform
from transforms.finish import FinishBatch
from transforms.image import open_image

LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the "
    "path of an image below that folder, a space and the number of its class, e.g. "
    '"train/n01440764/n01440764_10026.JPEG 0"; tools.make_lists writes them'
)
LIST_FILES = {True: "train_list.txt", False: "val_list.txt"}
CLASS_NAMES_FILE = "class_names.txt"
IMAGENET_NAMES = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "configs", "imagenet1k_class_names.txt"
)

# How many images after an unreadable one are tried in its place.
MAX_REPLACEMENTS = 10

# Batches that each worker is given ahead: Paddle's default.
PREFETCH_FACTOR = 2
# Slots beside those: of the batch that is copied to the device, and one to be safe.
SPARE_SLOTS = 2

SHUTDOWN_SECONDS = 5

logger = logging.getLogger(__name__)


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


class SampleError(InputError):
    """An image that cannot be read; the message has the list, the line and the path."""


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
    problem: why the line cannot be used, or None.
    """

    number: int
    path: bytes
    label: int
    problem: str | None


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


def _parse_line(
    line: bytes, num_classes: int | None, allow_outside: bool
) -> tuple[bytes, int, str | None]:
    """Path, label, and what is wrong with the line, if anything."""
    shown = _shortened(line.strip())
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2:
        return b"", 0, f"expected a path and a label, got '{shown}'"
    path, text = parts
    # int() alone would also take 1_000, and digits of other scripts.
    if not text.removeprefix(b"-").isdigit():
        return path, 0, (f"no label after the path: '{shown}' ends with '{_shortened(text)}'")
    label = int(text) if len(text) < 18 else sys.maxsize
    if label < 0 or (num_classes is not None and label >= num_classes):
        reason = (
            "negative"
            if num_classes is None
            else f"outside [0, {num_classes}); MODEL.NUM_CLASSES sets the number of classes"
        )
        return path, label, f"label {_shortened(text)} is {reason}"
    if b"\0" in path:
        return path, label, f"a path cannot hold a NUL byte: '{shown}'"
    if not allow_outside and (path.startswith(b"/") or b".." in path.split(b"/")):
        return (
            path,
            label,
            (
                f"path '{shown}' must be relative and stay inside the data folder; "
                "DATA.ALLOW_OUTSIDE True allows others"
            ),
        )
    return path, label, None


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


class Slots:
    """Memory that workers write batches into and their parent reads them from, used in turn.

    It is there before the workers are, so they share it by being forked: nothing is copied through
    a pipe, nothing is left behind by a process that is killed, and no limit of /dev/shm applies.
    """

    def __init__(self, count: int, slot_bytes: int):
        self.count = count
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(-1, count * slot_bytes)

    def array(self, slot: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An array in one of the slots."""
        return np.frombuffer(
            self._memory, dtype, int(np.prod(shape)), slot * self.slot_bytes
        ).reshape(shape)


@dataclass(frozen=True)
class Notes:
    """What a worker says of a batch.

    Attributes:
        images: the images, or where they are: slot, shape and dtype.
        erasures: for `FinishBatch`.
        unreadable: index of each image that another took the place of, and what is wrong with it.
        failure: why there is no batch. A worker that raised an exception would make Paddle's
            loader wait for ever, or raise another one.
    """

    images: np.ndarray | tuple[int, tuple[int, ...], str] = ()
    erasures: list[tuple] = ()
    unreadable: list[tuple[int, str]] = ()
    failure: Exception | None = None


class Loader:
    """The batches of one rank, read by worker processes and finished on this process's device.

    Iterating gives (images (N, 3, H, W) float32, labels (N,) int64) for what `batch_sampler`
    names; the workers stay for the next time.

    Args:
        dataset: where the images come from.
        batch_sampler: `TrainBatches` or `EvalBatches`.
        workers: processes; 0: read in this one.
        batch_bytes: of the images of a batch, which go through shared memory up to this size.
        finish: last steps of the pipeline, on the device; None: the workers do them.
        max_bad_images: how many different unreadable images to replace by the next readable one
            of the list, each with a warning, before the run stops; None: to stop at the first.

    Raises (while iterating):
        SampleError: an image cannot be read and none may take its place.
    """

    def __init__(
        self,
        dataset: ListDataset,
        batch_sampler: paddle.io.Sampler,
        *,
        workers: int,
        batch_bytes: int,
        finish: FinishBatch | None,
        max_bad_images: int | None,
    ):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        self.finish = finish
        self.max_bad_images = max_bad_images
        self.bad_images: set[int] = set()
        self.slots = None
        if workers:
            self.slots = Slots(workers * PREFETCH_FACTOR + SPARE_SLOTS, batch_bytes)
        samples = _Samples(
            dataset,
            slots=self.slots,
            unfinished=finish is not None,
            replace=max_bad_images is not None,
        )
        # Without Paddle's own shared memory, workers make no Paddle tensors: making one has been
        # seen to wait for a lock of Paddle's that another thread of the parent held when the
        # worker was forked.
        self._batches = paddle.io.DataLoader(
            samples,
            batch_sampler=_WithSlots(batch_sampler, self.slots),
            collate_fn=samples.collate,
            num_workers=workers,
            prefetch_factor=PREFETCH_FACTOR,
            persistent_workers=workers > 0,
            use_shared_memory=False,
            worker_init_fn=functools.partial(_set_up_worker, os.getpid()),
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[paddle.Tensor, paddle.Tensor]]:
        for labels, notes in self._batches:
            try:
                images = self._images(notes)
            except Exception:
                self.close()
                raise
            yield images, labels

    def close(self) -> None:
        """End the workers, and the threads that a worker forked later might wait for."""
        iterator = getattr(self._batches, "_iterator", None)  # only with persistent workers
        if iterator is not None:
            iterator._try_shutdown_all(timeout=SHUTDOWN_SECONDS)
            self._batches._iterator = None

    def _images(self, notes: Notes) -> paddle.Tensor:
        if notes.failure is not None:
            raise notes.failure
        for index, message in notes.unreadable:
            self._count_bad_image(index, message)
        images = notes.images
        if isinstance(images, tuple):
            images = self.slots.array(*images)
        images = paddle.to_tensor(images)  # a copy: the slot will be used again
        return images if self.finish is None else self.finish(images, notes.erasures)

    def _count_bad_image(self, index: int, message: str) -> None:
        if index in self.bad_images:
            return
        self.bad_images.add(index)
        count, limit = len(self.bad_images), self.max_bad_images
        if count > limit:
            raise SampleError(
                f"{message}. This is unreadable image number {count}; "
                f"DATA.MAX_BAD_IMAGES allows {limit}"
            )
        logger.warning(
            "%s; another image takes its place (%d of DATA.MAX_BAD_IMAGES %d)",
            message,
            count,
            limit,
        )


class _WithSlots(paddle.io.Sampler):
    """A sampler's batches, each with the number of the slot it goes through in front."""

    def __init__(self, batch_sampler: paddle.io.Sampler, slots: Slots | None):
        self.batch_sampler = batch_sampler
        self.count = slots.count if slots else 1

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list]:
        for number, batch in enumerate(self.batch_sampler):
            yield [number % self.count, *batch]


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


class _Samples(paddle.io.Dataset):
    """What a loader's workers read, and how they make a batch of it."""

    def __init__(
        self, dataset: ListDataset, *, slots: Slots | None, unfinished: bool, replace: bool
    ):
        super().__init__()
        self.dataset = dataset
        self.slots = slots
        self.transform = dataset.transform.unfinished if unfinished else dataset.transform
        self.unfinished = unfinished
        self.candidates = 1 + MAX_REPLACEMENTS if replace else 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: int | tuple[int, int]):
        """(image, label, what to say of the image it stands for, if any), or an exception; for a
        slot's number, itself."""
        if isinstance(sample, int):
            return sample
        epoch, index = sample
        problem = None
        try:
            for candidate in range(index, index + self.candidates):
                candidate %= len(self)
                try:
                    image = self.dataset.read(epoch, candidate, self.transform)
                    return image, self.dataset.labels[candidate], problem
                except SampleError as error:
                    problem = problem or (index, str(error))
            return SampleError(problem[1])
        except Exception:  # a defect, which must not hang the loader either
            return RuntimeError(f"while reading a batch: {traceback.format_exc()}")

    def collate(self, items: list) -> list:
        """Labels (N,) and `Notes` of the samples of a batch, whose images it puts into the slot."""
        slot, *samples = items
        for sample in samples:
            if isinstance(sample, Exception):
                return [np.zeros(1, "int64"), Notes(failure=sample)]
        images, labels, problems = zip(*samples)
        erasures = []
        if self.unfinished:
            erasures = [
                (i, image.boxes, image.seed) for i, image in enumerate(images) if image.boxes
            ]
            images = [image.pixels for image in images]
        shape, dtype = (len(images), *images[0].shape), images[0].dtype
        if self.slots and len(images) * images[0].nbytes <= self.slots.slot_bytes:
            np.stack(images, out=self.slots.array(slot, shape, dtype))
            images = (slot, shape, dtype.str)
        else:
            images = np.stack(images)
        unreadable = [problem for problem in problems if problem is not None]
        return [np.array(labels, "int64"), Notes(images, erasures, unreadable)]


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
    batch_bytes = batches.batch_size * 3 * config.DATA.IMAGE_SIZE**2 * value_bytes
    if workers:
        check_memory(
            batch_bytes=batch_bytes,
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


def check_memory(*, batch_bytes: int, workers: int, processes: int) -> None:
    """Find out before training whether the workers' batches fit into the memory.

    Args:
        workers: of each process.
        processes: of the run, on this machine.

    Raises:
        InputError: they do not fit.
    """
    needed = processes * (workers * PREFETCH_FACTOR + SPARE_SLOTS) * batch_bytes
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"{processes} process(es) with {workers} loader workers each share {needed / 1e9:.1f} "
            f"GB of memory with them, and {available / 1e9:.1f} GB are available; lower "
            "DATA.NUM_WORKERS or the batch size (-batch_size, -batch_size_eval)"
        )


def available_memory_bytes() -> int | None:
    """What this machine, or the container that this is, has left; None where it does not say."""
    limits = []
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        limits += [1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no such files, or no limit
        used, most = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.current", "memory.max")
        )
        limits.append(most - used)
    return min(limits, default=None)


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
