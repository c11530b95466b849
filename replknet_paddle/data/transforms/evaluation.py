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

from replknet_paddle.data.transforms.finish import Unfinished
from replknet_paddle.data.transforms.image import load, normalize, to_rgb
from replknet_paddle.data.transforms.pixels import Pixels, get_pixels
from replknet_paddle.runtime.errors import InputError

MODES = ("short_crop", "warp")

# A 1 x 60000 strip brought to 256 pixels across would need 15 GiB.
MAX_RESIZED_PIXELS = 1 << 26


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """(width, height) after scaling the short side to `short_side`, the long side truncated."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def center_offset(length: int, size: int) -> int:
    """Where the central `size` of `length` pixels begin; negative where there are fewer."""
    # round() takes halves to even, which decides the offset of every second odd margin.
    # Short of pixels, the odd one of padding goes to the right and the bottom.
    return round((length - size) / 2) if length > size else -((size - length) // 2)


class EvalTransform:
    """One image to the array the network is evaluated on.

    Args:
        image_size: side of the result, pixels.
        crop_pct: in `short_crop`, the share of the resized short side that the crop keeps;
            without effect in `warp`.
        mode: one of `MODES`.
        mean, std: three each, per RGB channel, in units of the [0, 1] scale.
        pixels: the elementary operations; None: the compiled ones, where possible.

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
        pixels: Pixels | None = None,
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
        self.px = pixels or get_pixels(True)

    def __call__(self, image: Image.Image, _rng: object = None) -> np.ndarray:
        """Any Pillow image -> (3, image_size, image_size) float32, normalized."""
        return normalize(self.pixels(image), self.mean, self.std)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> (image_size, image_size, 3) uint8 RGB, before normalization.

        Raises:
            InputError: the image cannot become RGB, or is so elongated that its resized
                form would hold more than `MAX_RESIZED_PIXELS`.
        """
        load(image)
        image = to_rgb(image)
        wanted = self.image_size
        if self.mode == "warp":
            return self._resize(image, (wanted, wanted), (0, 0, wanted, wanted))
        width, height = short_side_size(*image.size, self.short_side)
        left, top = center_offset(width, wanted), center_offset(height, wanted)
        keep = (max(left, 0), max(top, 0), min(left + wanted, width), min(top + wanted, height))
        pixels = self._resize(image, (width, height), keep)
        if pixels.shape[:2] == (wanted, wanted):
            return pixels
        padded = np.zeros((wanted, wanted, 3), np.uint8)  # a crop_pct above 1: centred on black
        top, left = keep[1] - top, keep[0] - left
        padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return padded

    def unfinished(self, image: Image.Image, _rng: object = None) -> Unfinished:
        """The pixels alone, which `FinishBatch` normalizes on the device."""
        return Unfinished(self.pixels(image))

    def _resize(self, image: Image.Image, size: tuple[int, int], keep: tuple) -> np.ndarray:
        # Pillow, where it does the work, computes more than `keep`.
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise InputError(
                f"image of {image.width} x {image.height} pixels is too elongated: "
                f"resized to {size[0]} x {size[1]} it exceeds {MAX_RESIZED_PIXELS}"
            )
        return self.px.resize(image, size, keep=keep)
