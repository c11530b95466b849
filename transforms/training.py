"""Training pipeline: random resized crop, flip, one photometric policy, normalize, erase.

The steps, their order and their distributions are those of the official recipe (timm's
`create_transform` with bicubic interpolation). Every random number comes from the generator
passed with the image, so a sample depends on nothing but the seed of that generator.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance

from errors import InputError
from transforms.erasing import RandomErasing
from transforms.image import normalize, to_rgb

MAX_TRIES = 10  # draws of a crop that fits before falling back to the centre


def sample_crop(
    width: int, height: int, scale: tuple, ratio: tuple, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the box (left, top, right, bottom) of a random resized crop.

    Args:
        width, height: of the image, pixels.
        scale: (least, most) share of the image's area; uniform in between.
        ratio: (least, most) width / height; log-uniform in between.

    After `MAX_TRIES` draws that do not fit, the largest central box whose shape lies within
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


class ColorJitter:
    """Brightness, contrast and saturation by random factors, in random order.

    Args:
        strength: each factor is uniform in [max(0, 1 - strength), 1 + strength].
    """

    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

    def __init__(self, *, strength: float):
        if strength < 0:
            raise InputError(f"colour jitter {strength}: must not be negative")
        self.strength = strength

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """RGB image -> RGB image of the same size."""
        for i in rng.permutation(len(self.enhancers)):
            factor = rng.uniform(max(0.0, 1 - self.strength), 1 + self.strength)
            image = self.enhancers[i](image).enhance(factor)
        return image


class TrainTransform:
    """One image and one generator to one training sample.

    Args:
        image_size: side of the result, pixels.
        crop_scale, crop_ratio: see `sample_crop`.
        hflip_prob: chance of a left-right flip.
        photometric: called with (RGB image, generator), returns an RGB image of the same
            size; or None.
        erasing: applied last, to the normalized image; or None.
        mean, std: three each, per RGB channel, in units of the [0, 1] scale.

    Raises:
        InputError: an argument outside its legal values.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        hflip_prob: float,
        photometric: Callable | None,
        erasing: RandomErasing | None,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        if image_size < 1:
            raise InputError(f"image_size {image_size}: must be at least 1")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop scale {crop_scale}: must be 0 < least <= most <= 1")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(f"crop ratio {crop_ratio}: must be 0 < least <= most")
        if not 0 <= hflip_prob <= 1:
            raise InputError(f"flip probability {hflip_prob}: must be in [0, 1]")
        self.image_size = image_size
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.hflip_prob = hflip_prob
        self.photometric = photometric
        self.erasing = erasing
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Any Pillow image -> (3, image_size, image_size) float32, normalized and erased."""
        sample = normalize(self.pixels(image, rng), self.mean, self.std)
        return self.erasing(sample, rng) if self.erasing else sample

    def pixels(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Any Pillow image -> (image_size, image_size, 3) uint8 RGB, all but the last two steps."""
        box = sample_crop(*image.size, self.crop_scale, self.crop_ratio, rng)
        # Cropping first converts and filters only what is kept. resize(box=...) would do
        # without the copy, but lets pixels from outside the crop bleed into its border.
        image = to_rgb(image.crop(box))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        if rng.random() < self.hflip_prob:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.photometric:
            image = self.photometric(image, rng)
        return np.array(image)
