"""Datasets of images and label images, named by list files, and the dataloaders over them.

    DATA_PATH/train_list.txt    one image a line: its path, white space, the path of its labels
    DATA_PATH/val_list.txt

Paths are relative to DATA_PATH. A line whose paths hold spaces separates them by a tab.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
from PIL import Image

from replknet_paddle.data.lists import LIST_FILES, check_list, printable, resolve, unreadable
from replknet_paddle.data.loader import Loader, check_memory
from replknet_paddle.data.samplers import EvalBatches, StepBatches
from replknet_paddle.data.storage import read_patiently
from replknet_paddle.data.transforms.finish import FinishBatch, Unfinished
from replknet_paddle.data.transforms.image import (
    asks_for_a_quarter_turn,
    load,
    open_image,
    to_rgb,
)
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import available_cores, processes_on_this_machine
from replknet_paddle.segmentation.transforms import TrainCrop, read_labels, whole_image

LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the path of "
    "an image below that folder, a space and the path of its label image, e.g. "
    '"images/1.jpg annotations/1.png"; docs/segmentation.md says how to write them'
)
MAX_LISTED_PROBLEMS = 10
LABELS_AT_ONCE = 64


class SegmentationDataset(paddle.io.Dataset):
    """The images and label images of a list file.

    Args:
        list_file: path of the list.
        root: folder that the list's paths are relative to, and that nothing may lie outside of.
        transform: (image (H, W, 3), label map (H, W), random generator) -> a sample and its map.
        num_classes, zero_is_ignored: as for `read_labels`.
        seed: of the random generators.
        allow_outside: let files lie anywhere else, after all.

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
        zero_is_ignored: bool = False,
        seed: int = 0,
        allow_outside: bool = False,
    ):
        super().__init__()
        check_list(list_file, root, LAYOUT)
        self.list_file = list_file
        self.root = root
        self.transform = transform
        self.num_classes = num_classes
        self.zero_is_ignored = zero_is_ignored
        self.seed = seed
        self.allow_outside = allow_outside
        self.pairs, self.lines = read_patiently(
            lambda: read_pairs(list_file, allow_outside=allow_outside), list_file
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self, index: int) -> str:
        """The paths of image and labels `index`, and the line that names them."""
        image, labels = map(printable, self.pairs[index].split("\t"))
        return f"image {image} with labels {labels} ({self.list_file}, line {self.lines[index]})"

    def read_sample(
        self,
        epoch: int,
        index: int,
        *,
        unfinished: bool = True,
        failures: list[str] | None = None,
    ) -> tuple[Unfinished, np.ndarray]:
        """Sample (epoch, index) before normalization, and its label map (H, W) uint8.

        Args:
            unfinished: True; the loader finishes batches.
            failures: gets a message for each failure of the system that a repetition cured.

        Raises:
            SampleError: it cannot be read, or image and labels do not belong together.
            SystemFault: the system fails, time and again.
        """
        path, labels_path = self.pairs[index].split("\t")

        def read_image():
            with self.open(path) as image:
                load(image)
                return np.array(to_rgb(image)), asks_for_a_quarter_turn(image)

        def read_classes():
            with self.open(path) as labels:
                return read_labels(
                    labels,
                    pixels.shape[1::-1],
                    num_classes=self.num_classes,
                    zero_is_ignored=self.zero_is_ignored,
                    is_turned=is_turned,
                )

        try:
            pixels, is_turned = read_patiently(read_image, self.describe(index), failures)
            path = labels_path
            classes = read_patiently(read_classes, self.describe(index), failures)
        except (OSError, InputError) as error:
            raise unreadable(self.list_file, self.lines[index], path, error) from None
        return self.transform(pixels, classes, np.random.default_rng((self.seed, epoch, index)))

    def absent_classes(self, count: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """The classes in [0, count) that no label image of a rank's share has.

        Label images are read until each class has been seen. Those that cannot be read are passed
        over, for training reports them.
        """
        absent = set(range(count))
        paths = [pair.split("\t")[1] for pair in self.pairs[rank::world_size]]
        with ThreadPoolExecutor(available_cores()) as pool:
            for start in range(0, len(paths), LABELS_AT_ONCE):
                for present in pool.map(self._classes_in, paths[start : start + LABELS_AT_ONCE]):
                    absent.difference_update(present)
                if not absent:
                    break
        return sorted(absent)

    def _classes_in(self, path: str) -> list[int]:
        try:
            with self.open(path) as labels:
                classes = read_labels(
                    labels,
                    labels.size,
                    num_classes=self.num_classes,
                    zero_is_ignored=self.zero_is_ignored,
                )
        except (OSError, InputError):
            return []
        return np.unique(classes).tolist()

    def open(self, path: str) -> Image.Image:
        """An image file of the list, opened."""
        return open_image(resolve(self.root, path, allow_outside=self.allow_outside))


def read_pairs(list_file: str, *, allow_outside: bool) -> tuple[list[str], list[int]]:
    """The paths of a list file, `image TAB labels` each, and their line numbers.

    Raises:
        InputError: the first lines that cannot be right, up to ten, with their numbers.
    """
    pairs, numbers, problems = [], [], []
    with open(list_file, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            paths = [path.strip() for path in line.split("\t" if "\t" in line else None)]
            problem = pair_problem(paths, allow_outside=allow_outside)
            if problem is None:
                pairs.append("\t".join(paths))
                numbers.append(number)
                continue
            shown = printable(line.strip()[:200])
            problems.append(f"{list_file}, line {number}: {problem}, got '{shown}'")
            if len(problems) == MAX_LISTED_PROBLEMS:
                break
    if problems:
        raise InputError("\n".join(problems))
    if not pairs:
        raise InputError(f"{list_file} lists no image")
    return pairs, numbers


def pair_problem(paths: list[str], *, allow_outside: bool) -> str | None:
    """What is wrong with the paths of a line, if anything is."""
    if len(paths) != 2 or not all(paths):
        return (
            "expected the paths of an image and of its labels, with a tab between them where they "
            "hold spaces"
        )
    if any("\0" in path for path in paths):
        return "a path cannot hold a NUL byte"
    leads_out = any(path.startswith("/") or ".." in path.split("/") for path in paths)
    if leads_out and not allow_outside:
        return (
            "paths must be relative and stay inside the data folder (DATA.ALLOW_OUTSIDE True "
            "allows others)"
        )
    return None


def get_dataset(config, is_train: bool) -> SegmentationDataset:
    """The training or the validation set that `config` names."""
    settings, root = config.SEGMENTATION, config.DATA.DATA_PATH
    transform = whole_image
    if is_train:
        transform = TrainCrop(crop_size=config.DATA.IMAGE_SIZE, scale=settings.RESIZE)
    return SegmentationDataset(
        os.path.join(root, LIST_FILES[is_train]),
        root,
        transform,
        num_classes=config.MODEL.NUM_CLASSES,
        zero_is_ignored=settings.ZERO_IS_IGNORED,
        seed=config.SEED,
        allow_outside=config.DATA.ALLOW_OUTSIDE,
    )


def get_dataloader(config, is_train: bool, *, rank: int = 0, world_size: int = 1) -> Loader:
    """Batches (images (N, 3, H, W) float32, label maps (N, H, W) uint8) of one rank.

    Training images are crops; in evaluation a batch is one image at its own size.

    Raises:
        InputError: less memory than the workers' batches need.
    """
    dataset = get_dataset(config, is_train)
    # An evaluation image may be larger: it then takes the slower way from its worker.
    image_bytes = 3 * config.DATA.IMAGE_SIZE**2 * (1 if is_train else 4)
    if is_train:
        batches = StepBatches(
            len(dataset),
            config.DATA.BATCH_SIZE,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            batches=config.SEGMENTATION.EPOCH_STEPS * config.TRAIN.ACCUM_ITER,
        )
    else:
        batches = EvalBatches(len(dataset), 1, rank=rank, world_size=world_size)
    batch_bytes = batches.batch_size * image_bytes
    if config.DATA.NUM_WORKERS:
        check_memory(
            batch_bytes=batch_bytes,
            workers=config.DATA.NUM_WORKERS,
            processes=processes_on_this_machine(),
        )
    return Loader(
        dataset,
        batches,
        workers=config.DATA.NUM_WORKERS,
        batch_bytes=batch_bytes,
        # "const" erases with 0: the official padding of normalized images.
        finish=FinishBatch(
            mean=config.DATA.IMAGENET_MEAN, std=config.DATA.IMAGENET_STD, erase_mode="const"
        ),
        max_bad_images=config.DATA.MAX_BAD_IMAGES if is_train else None,
        timeout_seconds=config.DATA.WORKER_TIMEOUT,
    )
