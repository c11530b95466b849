"""Random erasing (arXiv 1708.04896) of one normalized image, with timm's meaning of its settings.

Where to erase and with what are two steps, so that a loader which normalizes on the device
can draw the boxes with the sample and fill them in the batch.
"""

import math

import numpy as np

from replknet_paddle.runtime.errors import InputError

MODES = ("pixel", "rand", "const")

MIN_AREA, MAX_AREA = 0.02, 1 / 3  # of the image, shared out when several boxes are erased
MIN_ASPECT, MAX_ASPECT = 0.3, 1 / 0.3  # height / width
MAX_TRIES = 10  # draws of a box that fits before it is given up


def noise_shape(mode: str, height: int, width: int) -> tuple[int, ...] | None:
    """The shape of the standard normal values that fill a box; None: it is filled with zeros."""
    return {"pixel": (3, height, width), "rand": (3, 1, 1), "const": None}[mode]


class RandomErasing:
    """Overwrite random boxes of a normalized image.

    Args:
        prob: chance that an image is touched at all, [0, 1].
        mode: the filling, in units of the normalized image: `pixel` a standard normal value
            for each channel and pixel, `rand` one for each channel of a box, `const` zero.
        max_count: an image to be erased gets 1 to `max_count` boxes, uniformly; each one's
            area is divided by how many there are.

    Raises:
        InputError: an argument outside its legal values.
    """

    def __init__(self, *, prob: float, mode: str, max_count: int = 1):
        if mode not in MODES:
            raise InputError(f"random erasing mode {mode!r}: must be one of {', '.join(MODES)}")
        if not 0 <= prob <= 1:
            raise InputError(f"random erasing probability {prob}: must be in [0, 1]")
        if max_count < 1:
            raise InputError(f"random erasing count {max_count}: must be at least 1")
        self.prob = prob
        self.mode = mode
        self.max_count = max_count

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Erase in `image`, (3, H, W) float32, in place; returns it."""
        for box in self.boxes(*image.shape[1:], rng):
            self.fill(image, box, rng)
        return image

    def boxes(self, height: int, width: int, rng: np.random.Generator) -> list[tuple]:
        """Draw the boxes (top, left, bottom, right) to erase from an image; often none."""
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

    def fill(self, image: np.ndarray, box: tuple, rng: np.random.Generator) -> None:
        """Overwrite one box of `image`, (3, H, W) float32, in place."""
        top, left, bottom, right = box
        shape = noise_shape(self.mode, bottom - top, right - left)
        value = rng.standard_normal(shape, np.float32) if shape else 0.0
        image[:, top:bottom, left:right] = value
