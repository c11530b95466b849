"""What the evaluation and the training pipeline share: RGB conversion and normalization.

Everything geometric and photometric happens on 8-bit images; `normalize` is the last step
and stands alone, so that a loader may ship 8-bit batches and do this step on the device.
"""

import os
import stat
from typing import IO

import numpy as np
from PIL import Image

from replknet_paddle.data.transforms.png import SIGNATURE, decode_png, zlib_is_broken
from replknet_paddle.runtime.errors import InputError

# What data sets hold. Pillow reads many more, some of them by starting other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

# Pillow's own threshold for a warning: 270 MB as RGB. ImageNet's largest have 60 million.
MAX_PIXELS = 89_478_485


def open_image(path: str | IO[bytes]) -> Image.Image:
    """Open an image file, by path or opened, as a context manager; nothing is decoded yet.

    Raises:
        OSError: there is none, or it cannot be read.
        InputError: no image of `FORMATS`, a damaged one, or one of more than `MAX_PIXELS`.
    """
    if isinstance(path, str) and not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("not a regular file")  # opening a pipe would wait for somebody to write
    if zlib_is_broken() and (data := png_bytes(path)) is not None:
        return decode_png(data, max_pixels=MAX_PIXELS)
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise InputError(f"cannot identify it as any of {', '.join(FORMATS)}") from None
    except OSError:
        raise
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise InputError(f"damaged: {error or type(error).__name__}") from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise InputError(f"{size} pixels may be a decompression bomb; allowed: {MAX_PIXELS:,}")
    return image


def png_bytes(path: str | IO[bytes]) -> bytes | None:
    """The bytes of a PNG file; None for another one, which is left where it was."""
    if isinstance(path, str):
        with open(path, "rb") as file:
            return png_bytes(file)
    start = path.tell()
    is_png = path.read(len(SIGNATURE)) == SIGNATURE
    path.seek(start)
    return path.read() if is_png else None


def load(image: Image.Image) -> None:
    """Decode an opened image.

    Raises:
        InputError: it is damaged.
    """
    try:
        image.load()
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise InputError(f"damaged: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB; an RGB image is returned as it is, not copied.

    Grey is repeated over the channels, CMYK converted by Pillow's formula without a colour
    profile, a palette looked up, and alpha dropped (not blended). The EXIF orientation is
    ignored: the published accuracies were measured without it.

    Raises:
        InputError: a mode with more than 8 bits per channel, or one that Pillow does not
            convert to RGB.
    """
    if image.mode == "RGB":
        return image
    # Pillow would clip these at 255, which turns an ordinary 16-bit photograph white.
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(
            f"image mode {image.mode!r} has more than 8 bits per channel; scale it to 8 bits first"
        )
    load(image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise InputError(f"image mode {image.mode!r} cannot be converted to RGB") from error


def normalize(pixels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Scale to [0, 1], subtract `mean`, divide by `std`, and put the channels first.

    Args:
        pixels: (H, W, 3) uint8.
        mean, std: (3,) per channel, in units of the [0, 1] scale.

    Returns:
        (3, H, W) float32, contiguous; bit for bit what the same three steps give in float32.
    """
    channels = np.empty((3, *pixels.shape[:2]), np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=channels)
    channels -= np.asarray(mean, np.float32).reshape(3, 1, 1)
    channels /= np.asarray(std, np.float32).reshape(3, 1, 1)
    return channels
