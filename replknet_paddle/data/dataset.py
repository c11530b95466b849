"""The images of a list file, which of them make which batch, and the dataloaders over them.

Samples are named by (epoch, index), and all that is random in one depends on nothing but the seed
and that name: neither the number of workers nor a restart changes what the network sees.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeVar

import numpy as np
import paddle
from PIL import Image
from yacs.config import CfgNode

from replknet_paddle.data.lists import (
    LAYOUT,
    Line,
    describe,
    get_list_path,
    parse_labelled,
    read_list,
    resolve,
    retry_io,
    scan_labelled,
)
from replknet_paddle.data.loader import Loader
from replknet_paddle.data.transforms import build_eval_transform, build_train_transform
from replknet_paddle.data.transforms.finish import FinishBatch, RawSample
from replknet_paddle.data.transforms.image import open_image
from replknet_paddle.runtime.errors import InputError, SampleError, counted
from replknet_paddle.runtime.files import searched
from replknet_paddle.runtime.terminal import printable

Result = TypeVar("Result")


class ListedFiles(paddle.io.Dataset):
    """The lines of a list file, and the files below the folder `root` that they name.

    A child has `parse`, the grammar of a line, and `layout`, what to prepare if there is no list.
    Lines that cannot be right are an error, or are left out and added to `problems`.
    """

    def __init__(
        self,
        list_file: str,
        root: str,
        transform: Callable,
        *,
        num_classes: int | None,
        seed: int = 0,
        allow_outside: bool = False,
        problems: list[Line] | None = None,
    ):
        super().__init__()
        if not os.path.isdir(root):
            raise FileNotFoundError(f"no data folder {searched(root)}; {self.layout}")
        if not os.path.isfile(list_file):
            raise FileNotFoundError(f"no list file {list_file}; {self.layout}")
        if not os.access(list_file, os.R_OK):
            raise InputError(f"no permission to read {list_file}")
        self.list_file = list_file
        self.root = root
        self.transform = transform
        self.num_classes = num_classes
        self.seed = seed
        self.allow_outside = allow_outside
        self.failures: list[str] = []  # of the system, cured by a repetition; a `Loader` empties it
        # Bytes and arrays rather than lists of str: reading a list's items writes to their
        # reference counts, and that copies the whole list into every worker process.
        self._paths, self._ends, self._lines, self._labels = retry_io(
            lambda: read_list(list_file, self.parse, self.scan, problems=problems), list_file
        )

    def __len__(self) -> int:
        return len(self._ends)

    def scan(self, block: bytes) -> None:
        """Return None: `parse` reads each line of the list."""

    def path(self, index: int) -> str:
        """Return the path in line `index`, relative to the data folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._paths[start : self._ends[index]]))

    def files(self, index: int) -> list[str]:
        """Return the paths of the files that line `index` names, the image's first."""
        return [self.path(index)]

    def line(self, index: int) -> Line:
        """Return the line of sample `index`, as it was parsed."""
        path = os.fsencode(self.path(index))
        return Line(int(self._lines[index]), path, int(self._labels[index]))

    def where(self, index: int) -> str:
        """Return what names sample `index`: the list and the number of the line."""
        return f"{self.list_file}, line {self._lines[index]}"

    def describe(self, index: int) -> str:
        """Return the path of image `index`, and the line that names it."""
        return f"image {printable(self.path(index))} ({self.where(index)})"

    def open(self, path: str) -> Image.Image:
        """Open the image file that a line names by `path`."""
        return open_image(resolve(self.root, path, allow_outside=self.allow_outside))

    def read_file(
        self, index: int, path: str, use: Callable[[Image.Image], Result], *, kind: str = ""
    ) -> Result:
        """Return what `use` makes of the opened image file `path`, which line `index` names.

        A SampleError says which `kind` of file cannot be read, and why.
        """

        def read():
            with self.open(path) as image:
                return use(image)

        try:
            return retry_io(read, self.describe(index), self.failures)
        except (OSError, InputError) as error:
            hint = ""
            if isinstance(error, OSError) and "\\" in path:
                hint = "; folders are separated by / in a list, not by a backslash"
            raise SampleError(
                f"{self.where(index)}: cannot read {printable(kind + path)}: "
                f"{printable(describe(error))}{hint}"
            ) from error

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """Return the random generator of sample (epoch, index)."""
        return np.random.default_rng((self.seed, epoch, index))


class ListDataset(ListedFiles):
    """The images of a list file, and their labels.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that nothing may lie outside of.
        transform: (PIL image, random generator) -> float32 array (3, H, W); for a `Loader` with
            `raw`, which gives the `RawSample`.
        num_classes: labels must be in [0, num_classes); None: any that is not negative.
        seed: of the random generators.
        allow_outside: let files lie anywhere else, after all.

    Raises:
        FileNotFoundError: no such folder or list.
        InputError: a line that cannot be right; the message has the file and the line number.
        SystemFault: the list cannot be read, time and again.
    """

    layout = LAYOUT

    def parse(self, line: bytes) -> Line:
        """Return the path and label of a line."""
        return parse_labelled(line, self.num_classes, allow_outside=self.allow_outside)

    def scan(self, block: bytes) -> tuple[bytes, np.ndarray, np.ndarray] | None:
        """Return what `parse` finds in a block of lines; None where a line is odd."""
        return scan_labelled(block, self.num_classes, allow_outside=self.allow_outside)

    @property
    def labels(self) -> np.ndarray:
        """The label of each image, int64 (number of images,)."""
        return self._labels

    def paths_and_labels(self) -> Iterator[tuple[bytes, int]]:
        """Yield the path below the data folder and the label of each image."""
        start = 0
        for first in range(0, len(self), 2**16):  # lists of all numbers would take a gigabyte
            part = slice(first, first + 2**16)
            for end, label in zip(self._ends[part].tolist(), self.labels[part].tolist()):
                yield bytes(self._paths[start:end]), label
                start = end

    def absent_classes(self, count: int, **_) -> list[int]:
        """Return the classes in [0, count) that no image belongs to."""
        return np.flatnonzero(np.bincount(self.labels, minlength=count) == 0).tolist()

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        """Return the image (3, H, W) and label of sample (epoch, index)."""
        return self.read(*sample, self.transform), self.labels[sample[1]]

    def read_sample(self, epoch: int, index: int) -> tuple[RawSample, np.int64]:
        """Return what a `Loader` makes batches of: the raw image and its label."""
        return self.read(epoch, index, self.transform.raw), self.labels[index]

    def read(self, epoch: int, index: int, transform: Callable):
        """Return what `transform` makes of image `index`; raise as `read_file` does."""

        def use(image: Image.Image):
            return transform(image, self.rng(epoch, index))  # a new one in each attempt to read

        return self.read_file(index, self.path(index), use, kind="image ")


@dataclass(eq=False)
class TrainBatches(paddle.io.Sampler):
    """The (epoch, index) names of one rank's training batches, epoch by epoch.

    All ranks shuffle alike, and each takes its part of every global batch, so two ranks with
    batch b see in each step what one rank with batch 2b sees. An epoch has whole optimizer steps
    only, as in the official code: the images beyond them are left out of that epoch.
    """

    length: int  # of the list
    batch_size: int  # of one rank
    _: KW_ONLY
    rank: int
    world_size: int
    seed: int
    accum_iter: int = 1  # batches of an optimizer step
    epoch: int = field(default=0, init=False)
    first_batch: int = field(default=0, init=False)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration give this epoch, from this batch on."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Return the batches of a whole epoch, for this rank as for any other."""
        step_images = self.batch_size * self.world_size * self.accum_iter
        return self.length // step_images * self.accum_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        step = self.batch_size * self.world_size
        for batch in range(self.first_batch, len(self)):
            start = batch * step + self.rank * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


@dataclass(eq=False, kw_only=True)
class StepBatches(TrainBatches):
    """The (pass, index) names of one rank's training batches, in epochs of a given number.

    Whole passes over the dataset, each shuffled anew, follow one another without regard to epochs:
    a batch may end one pass and begin the next, and no image is left out.
    """

    batches: int  # of an epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of, order = -1, None
        for batch in range(self.first_batch, self.batches):
            global_batch = self.epoch * self.batches + batch
            start = (global_batch * self.world_size + self.rank) * self.batch_size
            names = []
            for place in range(start, start + self.batch_size):
                number, position = divmod(place, self.length)
                if number != order_of:
                    order = np.random.default_rng((self.seed, number)).permutation(self.length)
                    order_of = number
                names.append((number, int(order[position])))
            yield names


@dataclass(eq=False, kw_only=True)
class BalancedBatches(TrainBatches):
    """The (pass, index) names of one rank's training batches, of each class equally often.

    The classes that have images take turns over the whole run, and each goes through its images in
    passes, every pass shuffled anew: no image comes again before all of its class, and none twice
    under one name. An epoch has its turns in random order; none is left out.
    """

    labels: np.ndarray  # int64 (length,)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ends = np.cumsum(np.bincount(self.labels))
        members = np.split(np.argsort(self.labels, kind="stable"), ends[:-1])  # of each class
        members = [indices for indices in members if len(indices)]

        @functools.cache
        def order(turn: int, number: int) -> np.ndarray:
            # The last number tells this from the generators of samples.
            rng = np.random.default_rng((self.seed, number, turn, 1))
            return rng.permutation(members[turn])

        step = self.batch_size * self.world_size
        used = len(self) * step
        places = np.random.default_rng((self.seed, self.epoch)).permutation(used)
        for batch in range(self.first_batch, len(self)):
            start = batch * step + self.rank * self.batch_size
            names = []
            for place in places[start : start + self.batch_size].tolist():
                taken, turn = divmod(self.epoch * used + place, len(members))
                number, position = divmod(taken, len(members[turn]))
                names.append((number, int(order(turn, number)[position])))
            yield names


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


def get_dataset(
    config: CfgNode, is_train: bool, *, problems: list[Line] | None = None
) -> ListDataset:
    """Return the training or the validation set that `config` names, by its good lines where the
    bad ones go to `problems`."""
    transform = build_train_transform(config) if is_train else build_eval_transform(config)
    return ListDataset(
        get_list_path(config, is_train),
        config.DATA.DATA_PATH,
        transform,
        num_classes=config.MODEL.NUM_CLASSES,
        seed=config.SEED,
        allow_outside=config.DATA.ALLOW_OUTSIDE,
        problems=problems,
    )


def get_dataloader(
    config: CfgNode, dataset: ListDataset, is_train: bool, *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Return the loader of one rank: images (N, 3, H, W) float32, labels (N,) int64.

    Raises:
        InputError: fewer training images than one global batch.
    """
    places = {"rank": rank, "world_size": world_size}
    if not is_train:
        batch_size = config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
        return make_loader(config, dataset, EvalBatches(len(dataset), batch_size, **places))
    order = {"seed": config.SEED, "accum_iter": config.TRAIN.ACCUM_ITER, **places}
    kind = TrainBatches
    if config.TRAIN.SAMPLER == "balanced":
        kind, order["labels"] = BalancedBatches, dataset.labels
    batches = kind(len(dataset), config.DATA.BATCH_SIZE, **order)
    if len(batches) == 0:
        images = counted(len(dataset), "image")
        raise InputError(
            f"{dataset.list_file} lists {images}, fewer than one global batch "
            f"(DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x TRAIN.ACCUM_ITER "
            f"{config.TRAIN.ACCUM_ITER} x {world_size} processes); "
            "give a smaller -batch_size or -accum_iter"
        )
    return make_loader(config, dataset, batches, erase_mode=config.TRAIN.RANDOM_ERASE_MODE)


def make_loader(
    config,
    dataset: ListedFiles,
    batches: TrainBatches | EvalBatches,
    *,
    erase_mode: str = "const",
    image_pixels: int | None = None,
) -> Loader:
    """Return the loader of a dataset, which in training may replace unreadable images.

    Images of up to `image_pixels`, by default DATA.IMAGE_SIZE squared, go through shared memory.
    """
    data = config.DATA
    return Loader(
        dataset,
        batches,
        workers=data.NUM_WORKERS,
        batch_bytes=3 * batches.batch_size * (image_pixels or data.IMAGE_SIZE**2),
        finish=FinishBatch(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD, erase_mode=erase_mode),
        max_bad_images=data.MAX_BAD_IMAGES if isinstance(batches, TrainBatches) else None,
        timeout_seconds=data.WORKER_TIMEOUT,
    )
