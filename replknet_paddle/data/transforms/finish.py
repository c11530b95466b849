"""The last steps of both pipelines, normalizing and random erasing, for a batch on its device.

8-bit batches are a quarter of the size on their way from the workers through shared memory to the
device, and a device normalizes in no time. Random erasing (arXiv 1708.04896) has timm's meaning of
its settings; the boxes are drawn with the sample and filled in the batch.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import paddle

from replknet_paddle.runtime.processes import on_gpu

MIN_AREA, MAX_AREA = 0.02, 1 / 3  # of the image, shared out when several boxes are erased
MIN_ASPECT, MAX_ASPECT = 0.3, 1 / 0.3  # height / width
MAX_TRIES = 10  # draws of a box that fits before it is given up

Box = tuple[int, int, int, int]  # top, left, bottom, right

_WHITE = np.array([255], np.float32)

# Pinned memory that a GPU may still be reading, with the event that it records afterwards. Paddle's
# allocator would give it to the next array as soon as its tensor is gone.
_in_flight: deque[tuple[paddle.Tensor, object]] = deque()


class RawSample(NamedTuple):
    """A sample before normalization and erasing."""

    pixels: np.ndarray  # (H, W, 3) uint8
    boxes: Sequence[Box] = ()  # what to erase, often nothing
    seed: int = 0  # of what the boxes are filled with


@dataclass(kw_only=True)
class RandomErasing:
    """Overwrite random boxes of a normalized image.

    The filling is in units of the normalized image: by `mode`, `pixel` is a standard normal value
    for each channel and pixel, `rand` one for each channel of a box, `const` zero.
    """

    prob: float  # chance that an image is touched at all
    mode: str
    max_count: int = 1  # 1 to so many boxes, uniformly; the area is shared out among them

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Erase in `image`, (3, H, W) float32, in place; return it."""
        for box in self.boxes(*image.shape[1:], rng):
            fill(image, box, self.mode, rng)
        return image

    def boxes(self, height: int, width: int, rng: np.random.Generator) -> list[Box]:
        """Draw the boxes to erase from an image; often none."""
        if rng.random() >= self.prob:
            return []
        count = int(rng.integers(1, self.max_count, endpoint=True))
        boxes = []
        for _ in range(count):
            for _ in range(MAX_TRIES):
                area = rng.uniform(MIN_AREA, MAX_AREA) * height * width / count
                aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), math.log(MAX_ASPECT)))
                box_height = round(math.sqrt(area * aspect))
                box_width = round(math.sqrt(area / aspect))
                if box_height < height and box_width < width:
                    top = int(rng.integers(0, height - box_height, endpoint=True))
                    left = int(rng.integers(0, width - box_width, endpoint=True))
                    boxes.append((top, left, top + box_height, left + box_width))
                    break
        return boxes


def fill(image: np.ndarray, box: Box, mode: str, rng: np.random.Generator) -> None:
    """Overwrite one box of `image`, (3, H, W) float32, in place, by a mode of `RandomErasing`."""
    top, left, bottom, right = box
    shape = {"pixel": (3, bottom - top, right - left), "rand": (3, 1, 1), "const": None}[mode]
    value = rng.standard_normal(shape, np.float32) if shape else 0.0
    image[:, top:bottom, left:right] = value


class FinishBatch:
    """Normalize a batch by `mean` and `std` on the [0, 1] scale, and erase in it."""

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], erase_mode: str):
        self.mean = np.asarray(mean, np.float32).reshape(3, 1, 1)
        self.std = np.asarray(std, np.float32).reshape(3, 1, 1)
        self.erase_mode = erase_mode
        self._constants: list[paddle.Tensor] = []  # 255, mean and std on the device, once used

    @paddle.no_grad()
    def __call__(
        self, pixels: paddle.Tensor, erasures: Sequence[tuple[int, Sequence[Box], int]] = ()
    ) -> paddle.Tensor:
        """(N, H, W, 3) uint8 -> (N, 3, H, W) float32; on CPU bit for bit what `normalize` gives.

        Of each image to erase in, `erasures` has (index in the batch, boxes, seed).
        """
        if not self._constants:
            self._constants = [paddle.to_tensor(c) for c in (_WHITE, self.mean, self.std)]
        white, mean, std = self._constants
        images = pixels.transpose([0, 3, 1, 2]).astype("float32")
        # By a tensor: Paddle 3.1 multiplies by the inverse of a number, which rounds differently.
        images = (images / white - mean) / std
        if not erasures:
            return images
        positions, values = self._fillings(erasures, *images.shape[2:])
        flat = images.reshape([-1]).scatter_(to_device(positions), to_device(values))
        return flat.reshape(images.shape)

    def _fillings(
        self, erasures: Sequence[tuple[int, Sequence[Box], int]], height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return places in the flat batch, int64 and each once, and the values to write there."""
        positions, values = [], []
        for index, boxes, seed in erasures:
            rng = np.random.default_rng(seed)
            image = np.zeros((3, height, width), np.float32)
            is_erased = np.zeros((height, width), bool)
            for box in boxes:  # a later one covers those before it
                fill(image, box, self.erase_mode, rng)
                is_erased[box[0] : box[2], box[1] : box[3]] = True
            where = np.flatnonzero(np.broadcast_to(is_erased, image.shape))
            positions.append(where + index * image.size)
            values.append(image.reshape(-1)[where])
        return np.concatenate(positions), np.concatenate(values)


def to_device(array: np.ndarray) -> paddle.Tensor:
    """Return a copy of `array` on the device; the array may be overwritten at once.

    For a GPU it goes through pinned memory: the copy takes its turn among the kernels that are
    queued, and this process does not wait for them, as it does in `paddle.to_tensor`.
    """
    if not on_gpu():
        return paddle.to_tensor(array)
    pinned = paddle.to_tensor(array, place=paddle.CUDAPinnedPlace())
    tensor = pinned.cuda(blocking=False)
    event = paddle.device.cuda.Event()
    event.record()
    _in_flight.append((pinned, event))
    while _in_flight and _in_flight[0][1].query():
        _in_flight.popleft()
    return tensor
