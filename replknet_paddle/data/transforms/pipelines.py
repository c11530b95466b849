"""The pipelines of training and evaluation, from a Pillow image to what the network sees.

Evaluation gives pixel for pixel what the published accuracies were measured with. Two ways lead to
a square of `image_size` pixels, both with Pillow's antialiased bicubic:

- `short_crop`: the short side to `floor(image_size / crop_pct)`, then a centre crop;
- `warp`: both sides to `image_size`, the aspect ratio given up. The official 384-pixel
  accuracies of RepLKNet need this one.

Rounding follows torchvision's Resize and CenterCrop on Pillow images: the long side is
truncated, and crop offsets are rounded half to even.

Training: random resized crop, flips, one photometric policy, normalize, erase. But for vertical
flips and quarter turns, which are off by default, the steps, their order and their distributions
are those of the official recipe (timm's `create_transform` with bicubic interpolation). Every
random number comes from the generator passed with the image, so a sample depends on nothing but the
seed of that generator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from PIL import Image

from replknet_paddle.data.transforms.augment import brightness, color, contrast
from replknet_paddle.data.transforms.finish import RandomErasing, RawSample
from replknet_paddle.data.transforms.image import load, normalize, to_rgb
from replknet_paddle.data.transforms.pixels import Box, Pixels, Size, get_pixels
from replknet_paddle.runtime.errors import InputError

MAX_TRIES = 10  # draws of a crop that fits before falling back to the centre
REDUCED_MARGIN = 1.5  # pixels of a reduced crop over pixels wanted, on either side

# A 1 x 60000 strip brought to 256 pixels across would need 15 GiB.
MAX_RESIZED_PIXELS = 1 << 26


def short_side_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height where the short side is `short_side`, the long side truncated."""
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def center_offset(length: int, size: int) -> int:
    """Return where the central `size` of `length` pixels begin; negative where there are fewer."""
    # round() takes halves to even, which decides the offset of every second odd margin.
    # Short of pixels, the odd one of padding goes to the right and the bottom.
    return round((length - size) / 2) if length > size else -((size - length) // 2)


@dataclass(kw_only=True)
class EvalTransform:
    """One image to the array the network is evaluated on."""

    image_size: int  # side of the result, pixels
    crop_pct: float  # in `short_crop`, the share of the resized short side that the crop keeps
    mode: str  # `short_crop` or `warp`
    mean: Sequence[float]  # per RGB channel, in units of the [0, 1] scale, as `std`
    std: Sequence[float]
    px: Pixels = field(default_factory=get_pixels)

    def __call__(self, image: Image.Image, _rng: object = None) -> np.ndarray:
        """Any Pillow image -> (3, image_size, image_size) float32, normalized."""
        return normalize(self.pixels(image), self.mean, self.std)

    def raw(self, image: Image.Image, _rng: object = None) -> RawSample:
        """The same sample as pixels, which `FinishBatch` normalizes on the device."""
        return RawSample(self.pixels(image))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Any Pillow image -> (image_size, image_size, 3) uint8 RGB, before normalization."""
        load(image)
        image = to_rgb(image)
        wanted = self.image_size
        (width, height), (left, top) = self._placed(*image.size)
        keep = (max(left, 0), max(top, 0), min(left + wanted, width), min(top + wanted, height))
        pixels = self._resize(image, (width, height), keep)
        if pixels.shape[:2] == (wanted, wanted):
            return pixels
        padded = np.zeros((wanted, wanted, 3), np.uint8)  # a crop_pct above 1: centred on black
        top, left = keep[1] - top, keep[0] - left
        padded[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
        return padded

    def region(self, width: int, height: int) -> Box:
        """Return the box (left, top, right, bottom) that the network sees of an image of this size,
        in the image's pixels. It goes beyond the image where `pixels` pads."""
        size, (left, top) = self._placed(width, height)
        right, bottom = left + self.image_size, top + self.image_size
        return (
            left * width / size[0],
            top * height / size[1],
            right * width / size[0],
            bottom * height / size[1],
        )

    def _placed(self, width: int, height: int) -> tuple[Size, tuple[int, int]]:
        """Return the size that an image of this size is resized to, and left and top of the square
        that is kept of it."""
        wanted = self.image_size
        if self.mode == "warp":
            return (wanted, wanted), (0, 0)
        size = short_side_size(width, height, math.floor(wanted / self.crop_pct))
        return size, (center_offset(size[0], wanted), center_offset(size[1], wanted))

    def _resize(self, image: Image.Image, size: tuple[int, int], keep: tuple) -> np.ndarray:
        # Pillow, where it does the work, computes more than `keep`.
        if size[0] * size[1] > MAX_RESIZED_PIXELS:
            raise InputError(
                f"image of {image.width} x {image.height} pixels is too elongated: "
                f"resized to {size[0]} x {size[1]} it exceeds {MAX_RESIZED_PIXELS}"
            )
        return self.px.resize(image, size, keep=keep)


def sample_crop(
    width: int, height: int, scale: tuple, ratio: tuple, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the box (left, top, right, bottom) of a random resized crop.

    Its share of the image's area is uniform in `scale`, its width / height log-uniform in `ratio`;
    after `MAX_TRIES` draws that do not fit, the largest central box whose shape lies within
    `ratio`, whatever its area.
    """
    for _ in range(MAX_TRIES):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height, endpoint=True))
            left = int(rng.integers(0, width - crop_width, endpoint=True))
            return left, top, left + crop_width, top + crop_height
    # A strip one pixel thin would round to nothing at extreme ratios.
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


@dataclass(kw_only=True)
class ColorJitter:
    """Brightness, contrast and saturation by random factors, in random order."""

    enhancers: ClassVar = (brightness, contrast, color)
    strength: float  # each factor is uniform in [max(0, 1 - strength), 1 + strength]

    def __call__(self, px: Pixels, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> the same."""
        for i in rng.permutation(len(self.enhancers)):
            factor = rng.uniform(max(0.0, 1 - self.strength), 1 + self.strength)
            image = self.enhancers[i](px, image, factor, None)
        return image


@dataclass(kw_only=True)
class TrainTransform:
    """One image and one generator to one training sample."""

    image_size: int  # side of the result, pixels
    crop_scale: Sequence[float]  # as for `sample_crop`
    crop_ratio: Sequence[float]
    hflip_prob: float  # chance of a left-right flip
    vflip_prob: float = 0.0  # chance of a top-bottom flip
    quarter_turns: bool = False  # turn by 0, 90, 180 or 270 degrees, each as likely
    photometric: Callable | None  # (elementary operations, RGB pixels, generator) -> such pixels
    erasing: RandomErasing | None  # applied last, to the normalized image
    mean: Sequence[float]  # per RGB channel, in units of the [0, 1] scale, as `std`
    std: Sequence[float]
    px: Pixels = field(default_factory=get_pixels)
    # Decode a JPEG at a half, a quarter or an eighth of its size where the crop still has
    # `REDUCED_MARGIN` times the pixels wanted, on either side.
    reduced_decode: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Any Pillow image -> (3, image_size, image_size) float32, normalized and erased."""
        sample = normalize(self.pixels(image, rng), self.mean, self.std)
        return self.erasing(sample, rng) if self.erasing else sample

    def raw(self, image: Image.Image, rng: np.random.Generator) -> RawSample:
        """The same sample before its last two steps, which `FinishBatch` does on the device."""
        pixels = self.pixels(image, rng)
        boxes = self.erasing.boxes(*pixels.shape[:2], rng) if self.erasing else ()
        return RawSample(pixels, boxes, int(rng.integers(2**31)) if boxes else 0)

    def pixels(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Any Pillow image -> (image_size, image_size, 3) uint8 RGB, all but the last two steps."""
        box = sample_crop(*image.size, self.crop_scale, self.crop_ratio, rng)
        if self.reduced_decode:
            box = _reduce(image, box, self.image_size)
        load(image)
        # Nothing from outside the crop may bleed into its border. Where the crop ends within a
        # pixel of a reduced image, that pixel counts, by the share that the box says.
        left, top, right, bottom = box
        left, top = math.floor(left), math.floor(top)
        crop = left, top, math.ceil(right), math.ceil(bottom)
        if image.mode != "RGB":  # convert only what is kept
            image, crop = to_rgb(image.crop(crop)), None
        pixels = self.px.resize(
            image,
            (self.image_size, self.image_size),
            crop=crop,
            box=(box[0] - left, box[1] - top, box[2] - left, box[3] - top),
            flip=rng.random() < self.hflip_prob,
        )
        # The official recipe has neither, so where they are off they draw no number.
        if self.vflip_prob and rng.random() < self.vflip_prob:
            pixels = np.ascontiguousarray(pixels[::-1])
        if self.quarter_turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, rng.integers(4)))
        return self.photometric(self.px, pixels, rng) if self.photometric else pixels


def _reduce(image: Image.Image, box: tuple, image_size: int) -> tuple:
    """Have a JPEG decoded at a lower resolution if `box` is large; return the box in its pixels.

    The decoder then computes fewer pixels from the same coefficients, which is averaging: what is
    lost is detail that resizing would average away as well.
    """
    side = min(box[2] - box[0], box[3] - box[1])
    factor = int(side // (image_size * REDUCED_MARGIN))
    if image.format != "JPEG" or factor < 2:
        return box
    width, height = image.size
    image.draft("RGB", (-(-width // factor), -(-height // factor)))
    if image.size == (width, height):
        return box
    ratio = round(width / image.size[0])  # 2, 4 or 8; sizes are rounded up
    return tuple(min(edge / ratio, limit) for edge, limit in zip(box, image.size * 2))
