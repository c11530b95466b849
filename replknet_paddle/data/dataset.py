"""The images of a list file, and the dataloaders over them."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import paddle

from replknet_paddle.data.lists import (
    LIST_FILES,
    check_list,
    printable,
    read_list,
    resolve,
    unreadable,
)
from replknet_paddle.data.loader import Loader, check_memory
from replknet_paddle.data.samplers import EvalBatches, TrainBatches
from replknet_paddle.data.storage import read_patiently
from replknet_paddle.data.transforms import (
    build_eval_transform,
    build_finish,
    build_train_transform,
)
from replknet_paddle.data.transforms.image import open_image
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import processes_on_this_machine


class ListDataset(paddle.io.Dataset):
    """The images of a list file.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that no image may lie outside of.
        transform: (PIL image, random generator) -> float32 array (3, H, W).
        num_classes: labels must be in [0, num_classes); None: any that is not negative.
        seed: of the random generators.
        allow_outside: let images lie anywhere else, after all.

    Raises:
        FileNotFoundError: no such folder or list.
        InputError: a line that cannot be right; the message has the file and the line number.
        SystemFault: the list cannot be read, time and again.
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
    ):
        super().__init__()
        check_list(list_file, root)
        self.list_file = list_file
        self.root = root
        self.transform = transform
        self.seed = seed
        self.allow_outside = allow_outside
        # Bytes and arrays rather than lists of str: reading a list's items writes to their
        # reference counts, and that copies the whole list into every worker process.
        self._paths, self._ends, self._lines, self.labels = read_patiently(
            lambda: read_list(list_file, num_classes, allow_outside=allow_outside), list_file
        )

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """The path of image `index`, relative to the data folder."""
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._paths[start : self._ends[index]])

    def paths_and_labels(self) -> Iterator[tuple[bytes, int]]:
        """The path below the data folder and the label of each image."""
        start = 0
        for end, label in zip(self._ends.tolist(), self.labels.tolist()):
            yield self._paths[start:end], label
            start = end

    def absent_classes(self, count: int, **_) -> list[int]:
        """The classes in [0, count) that no image belongs to."""
        return np.flatnonzero(np.bincount(self.labels, minlength=count) == 0).tolist()

    def __getitem__(self, sample: tuple[int, int]) -> tuple[np.ndarray, np.int64]:
        """The image (3, H, W) and label of sample (epoch, index)."""
        return self.read(*sample, self.transform), self.labels[sample[1]]

    def describe(self, index: int) -> str:
        """The path of image `index`, and the line that names it."""
        where = f"{self.list_file}, line {self._lines[index]}"
        return f"image {printable(self.path(index))} ({where})"

    def read_sample(
        self, epoch: int, index: int, *, unfinished: bool, failures: list[str] | None = None
    ):
        """What a `Loader` makes batches of: the image and its label.

        Args:
            unfinished: without the last steps, which `FinishBatch` does.
            failures: as of `read`.
        """
        transform = self.transform.unfinished if unfinished else self.transform
        return self.read(epoch, index, transform, failures=failures), self.labels[index]

    def read(
        self, epoch: int, index: int, transform: Callable, *, failures: list[str] | None = None
    ):
        """What `transform` makes of image `index`.

        Args:
            failures: gets a message for each failure of the system that a repetition cured.

        Raises:
            SampleError: it does not exist, or cannot be decoded.
            SystemFault: the system fails, time and again.
        """
        path = self.path(index)

        def sample():
            full = resolve(self.root, path, allow_outside=self.allow_outside)
            with open_image(full) as image:
                return transform(image, np.random.default_rng((self.seed, epoch, index)))

        try:
            return read_patiently(sample, self.describe(index), failures)
        except (OSError, InputError) as error:
            place = self.list_file, self._lines[index], f"image {path}"
            raise unreadable(*place, error) from None


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
        InputError: fewer training images than one global batch, or less shared memory than
            the workers' batches need.
    """
    if is_train:
        batches = TrainBatches(
            len(dataset),
            config.DATA.BATCH_SIZE,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            accum_iter=config.TRAIN.ACCUM_ITER,
        )
        if len(batches) == 0:
            raise InputError(
                f"{dataset.list_file} lists {len(dataset)} images, fewer than one global batch "
                f"(DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x TRAIN.ACCUM_ITER "
                f"{config.TRAIN.ACCUM_ITER} x {world_size} processes); "
                "give a smaller -batch_size or -accum_iter"
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
    if hasattr(dataset.transform, "unfinished"):
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
            processes=processes_on_this_machine(),
        )
    return Loader(
        dataset,
        batches,
        workers=workers,
        batch_bytes=batch_bytes,
        finish=finish,
        max_bad_images=config.DATA.MAX_BAD_IMAGES if is_train else None,
        timeout_seconds=config.DATA.WORKER_TIMEOUT,
    )
