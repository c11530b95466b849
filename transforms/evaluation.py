"""Evaluation pipelines, pixel for pixel those with which the published accuracies were measured.

Two ways to reach a square of `image_size` pixels, both with Pillow's antialiased bicubic:

- `short_crop`: the short side to `floor(image_size / crop_pct)`, then a centre crop;
- `warp`: both sides to `image_size`, the aspect ratio given up. The official 384-pixel
  accuracies of RepLKNet need this one.

Rounding follows torchvision's Resize and CenterCrop on Pillow images: the long side is
truncated, and crop offsets are rounded half to even.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from errors import InputError
from transforms.image import normalize, to_rgb

MODES = ("short_crop", "warp")

# A 1 x 60000 strip brought to 256 pixels across would need 15 GiB.
MAX_RESIZED_PIXELS = 1 << 26


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling the short side to `short_side`, the long side truncated."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut the central `size` x `size` pixels; a smaller image is centred on black."""
    width, height = image.size
    # round() takes halves to even, which decides the offset of every second odd margin.
    # Short of pixels, the odd one of padding goes to the right and the bottom.
    left = round((width - size) / 2) if width > size else -((size - width) // 2)
    top = round((height - size) / 2) if height > size else -((size - height) // 2)
    return image.crop((left, top, left + size, top + size))


class EvalTransform:
    """One image to the array the network is evaluated on.

    Args:
        image_size: side of the result, pixels.
        crop_pct: in `short_crop`, the share of the resized short side that the crop keeps;
            without effect in `warp`.
        mode: one of `MODES`.
        mean, std: three each, per RGB channel, in units of the [0, 1] scale.

    Raises:
        InputError: an argument outside its legal values.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_pct: float,
        mode: str,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        if mode not in MODES:
            raise InputError(f"resize mode {mode!r}: must be one of {', '.join(MODES)}")
        if image_size < 1:
            raise InputError(f"image_size {image_size}: must be at least 1")
        if mode == "short_crop" and not crop_pct > 0:
            raise InputError(f"crop_pct {crop_pct}: must be above 0")
        self.image_size = image_size
        self.mode = mode
        self.short_side = math.floor(image_size / crop_pct) if mode == "short_crop" else None
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> (3, image_size, image_size) float32, normalized."""
        return normalize(self.pixels(image), self.mean, self.std)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> (image_size, image_size, 3) uint8 RGB, before normalization.

        Raises:
            InputError: the image cannot become RGB, or is so elongated that its resized
                form would hold more than `MAX_RESIZED_PIXELS`.
        """
        image = to_rgb(image)
        if self.mode == "warp":
            return np.array(self._resize(image, (self.image_size, self.image_size)))
        size = short_side_size(*image.size, self.short_side)
        return np.array(center_crop(self._resize(image, size), self.image_size))

    @staticmethod
    def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise InputError(
                f"image of {image.width} x {image.height} pixels is too elongated: "
                f"resized to {size[0]} x {size[1]} it exceeds {MAX_RESIZED_PIXELS}"
            )
        return image.resize(size, Image.Resampling.BICUBIC)
