"""RandAugment (arXiv 1909.13719) and AutoAugment (arXiv 1805.09501), with timm's meaning.

An operation is a function `(px, image, argument, fill)`, with the elementary operations `px` of
pixels.py, and a rule that turns a magnitude on timm's scale of 0 to 10 into that argument. Where
timm has several scales for one operation, the names tell them apart: the plain one, and
`...Increasing`, whose effect grows with the magnitude throughout. timm writes the official recipe's
setting `rand-m9-mstd0.5-inc1`: magnitude 9, its noise of standard deviation 0.5, the increasing
scales.

timm draws bilinear or bicubic resampling at random unless stated otherwise. The official
recipe tells it bicubic, and so it is here. Every operation gives the pixels that Pillow's function
of that name gives.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from replknet_paddle.data.transforms.pixels import Pixels

MAX_MAGNITUDE = 10.0

Color = tuple[int, int, int]
Drawn = tuple[str, float, int]  # operation, magnitude, and the sign it takes if it has a direction


def fill_color(mean: Sequence[float]) -> Color:
    """Return the 8-bit colour, of the [0, 1] mean, for pixels from outside the image."""
    return tuple(min(255, round(255 * float(channel))) for channel in mean)


_VALUES = np.arange(256)


def auto_contrast(px, image, _, fill):
    """Stretch each channel over the whole range."""
    table = np.empty((3, 256), np.uint8)
    for channel, counts in enumerate(px.histogram(image)):
        present = np.flatnonzero(counts)
        low, high = int(present[0]), int(present[-1])
        if high == low:
            table[channel] = _VALUES
        else:
            scale = 255.0 / (high - low)
            table[channel] = np.clip((_VALUES * scale + -low * scale).astype(int), 0, 255)
    return px.lookup(image, table)


def equalize(px, image, _, fill):
    """Make all values of each channel about equally frequent."""
    table = np.empty((3, 256), np.uint8)
    for channel, counts in enumerate(px.histogram(image)):
        present = np.flatnonzero(counts)
        step = int(counts.sum() - counts[present[-1]]) // 255
        if step == 0:  # one value, or too few pixels
            table[channel] = _VALUES
        else:
            below = np.cumsum(counts) - counts
            table[channel] = np.minimum((step // 2 + below) // step, 255)
    return px.lookup(image, table)


def invert(px, image, _, fill):
    return px.lookup(image, 255 - _VALUES)


def rotate(px, image, degrees, fill):
    """Turn counterclockwise around the centre."""
    angle = -math.radians(degrees % 360.0)
    # 15 digits, as Pillow has it: a quarter turn shall have zeros in its matrix.
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return px.affine(
        image, (cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y), fill
    )


def posterize(px, image, bits, fill):
    """Keep the `bits` highest bits; none leaves a black image, which Pillow's own refuses."""
    return px.lookup(image, _VALUES & (0xFF00 >> bits))


def solarize(px, image, threshold, fill):
    """Invert the values from `threshold` on."""
    return px.lookup(image, np.where(_VALUES < threshold, _VALUES, 255 - _VALUES))


def solarize_add(px, image, amount, fill):
    """Brighten the dark half of the range by `amount`, and leave the bright half alone."""
    return px.lookup(image, np.where(_VALUES < 128, np.minimum(255, _VALUES + amount), _VALUES))


def color(px, image, factor, fill):
    return px.blend(px.grey(image), image, factor)


def contrast(px, image, factor, fill):
    mean = int(px.grey(image)[..., 0].mean() + 0.5)
    return px.lookup(image, _away_from(mean, factor))


def brightness(px, image, factor, fill):
    return px.lookup(image, _away_from(0, factor))


def _away_from(value: int, factor: float) -> np.ndarray:
    """Return a table for what `blend` from an image of this one value would give."""
    moved = value + np.float32(factor) * (_VALUES - value).astype(np.float32)
    return np.clip(moved, 0, 255).astype(np.uint8)


def sharpness(px, image, factor, fill):
    return px.blend(px.smooth(image), image, factor)


def shear_x(px, image, slope, fill):
    return px.affine(image, (1, slope, 0, 0, 1, 0), fill)


def shear_y(px, image, slope, fill):
    return px.affine(image, (1, 0, 0, slope, 1, 0), fill)


def translate_x(px, image, share, fill):
    return px.affine(image, (1, 0, share * image.shape[1], 0, 1, 0), fill)


def translate_y(px, image, share, fill):
    return px.affine(image, (1, 0, 0, 0, 1, share * image.shape[0]), fill)


def _no_argument(level, sign):
    return None


def _up_to(most: float) -> Callable:
    return lambda level, sign: sign * (level * most)


def _enhance(level, sign):
    return level * 1.8 + 0.1


def _enhance_increasing(level, sign):
    # 1 - 0.9 is a little below 0.1 in floating point
    return max(0.1, 1.0 + sign * (level * 0.9))


class Operation(NamedTuple):
    """`apply(px, image, argument, fill)`, where argument = `argument(magnitude / 10, +1 or -1)`."""

    apply: Callable
    argument: Callable


OPERATIONS = {
    "AutoContrast": Operation(auto_contrast, _no_argument),
    "Equalize": Operation(equalize, _no_argument),
    "Invert": Operation(invert, _no_argument),
    "Rotate": Operation(rotate, _up_to(30.0)),  # degrees
    "Posterize": Operation(posterize, lambda level, sign: int(level * 4)),  # bits kept
    "PosterizeIncreasing": Operation(posterize, lambda level, sign: 4 - int(level * 4)),
    "PosterizeOriginal": Operation(posterize, lambda level, sign: 4 + int(level * 4)),
    "Solarize": Operation(solarize, lambda level, sign: int(level * 256)),  # inverted from here
    "SolarizeIncreasing": Operation(solarize, lambda level, sign: 256 - int(level * 256)),
    "SolarizeAdd": Operation(solarize_add, lambda level, sign: int(level * 110)),
    "Color": Operation(color, _enhance),
    "ColorIncreasing": Operation(color, _enhance_increasing),
    "Contrast": Operation(contrast, _enhance),
    "ContrastIncreasing": Operation(contrast, _enhance_increasing),
    "Brightness": Operation(brightness, _enhance),
    "BrightnessIncreasing": Operation(brightness, _enhance_increasing),
    "Sharpness": Operation(sharpness, _enhance),
    "SharpnessIncreasing": Operation(sharpness, _enhance_increasing),
    "ShearX": Operation(shear_x, _up_to(0.3)),  # pixels per pixel
    "ShearY": Operation(shear_y, _up_to(0.3)),
    "TranslateXRel": Operation(translate_x, _up_to(0.45)),  # of the side
    "TranslateYRel": Operation(translate_y, _up_to(0.45)),
}

RAND_AUGMENT = (
    'AutoContrast', 'Equalize', 'Invert', 'Rotate', 'Posterize', 'Solarize', 'SolarizeAdd',
    'Color', 'Contrast', 'Brightness', 'Sharpness',
    'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel',
)  # fmt: skip

RAND_AUGMENT_INCREASING = tuple(
    f"{name}Increasing" if f"{name}Increasing" in OPERATIONS else name for name in RAND_AUGMENT
)

# Sub-policies of (operation, chance, magnitude): table 9 of the AutoAugment paper, ImageNet.
# Five of them occur twice there too.
AUTO_AUGMENT = (
    (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    (("PosterizeOriginal", 0.6, 7), ("PosterizeOriginal", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
    (("PosterizeOriginal", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 8), ("PosterizeOriginal", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
)


def operation_argument(name: str, magnitude: float, sign: int):
    """Return the argument of an operation for a magnitude, clipped to [0, 10], and a sign."""
    level = min(max(magnitude, 0.0), MAX_MAGNITUDE) / MAX_MAGNITUDE
    return OPERATIONS[name].argument(level, sign)


def apply_operations(px: Pixels, image: np.ndarray, drawn: list[Drawn], fill: Color) -> np.ndarray:
    """Apply what a policy has drawn, in order; (H, W, 3) uint8 -> the same."""
    for name, magnitude, sign in drawn:
        image = OPERATIONS[name].apply(px, image, operation_argument(name, magnitude, sign), fill)
    return image


def _random_sign(rng: np.random.Generator) -> int:
    return 1 if rng.random() < 0.5 else -1


@dataclass(kw_only=True)
class RandAugment:
    """`layers` operations drawn with replacement, each of them applied with chance 0.5."""

    prob: ClassVar = 0.5
    layers: int
    magnitude: float  # mean of a normal distribution, which is clipped to the scale of 0 to 10
    magnitude_std: float
    names: Sequence[str]  # of the operations: `RAND_AUGMENT` or `RAND_AUGMENT_INCREASING`
    fill: Color  # of pixels that come from outside the image

    def __call__(self, px: Pixels, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> the same."""
        return apply_operations(px, image, self.draw(rng), self.fill)

    def draw(self, rng: np.random.Generator) -> list[Drawn]:
        """Draw the operations for one image, in order: none to `layers` of them."""
        drawn = []
        for index in rng.integers(len(self.names), size=self.layers):
            if rng.random() < self.prob:
                magnitude = rng.normal(self.magnitude, self.magnitude_std)
                drawn.append((self.names[index], magnitude, _random_sign(rng)))
        return drawn


@dataclass(kw_only=True)
class AutoAugment:
    """One of the 25 sub-policies of `AUTO_AUGMENT`, its two operations by their chances."""

    fill: Color  # of pixels that come from outside the image

    def __call__(self, px: Pixels, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> the same."""
        return apply_operations(px, image, self.draw(rng), self.fill)

    def draw(self, rng: np.random.Generator) -> list[Drawn]:
        """Draw the operations for one image, in order: none to two of them."""
        drawn = []
        for name, prob, magnitude in AUTO_AUGMENT[rng.integers(len(AUTO_AUGMENT))]:
            if rng.random() < prob:
                drawn.append((name, magnitude, _random_sign(rng)))
        return drawn
