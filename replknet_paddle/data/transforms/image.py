"""Opening, RGB conversion and normalization of images, for all pipelines.

Everything geometric and photometric happens on 8-bit images; `normalize` is the last step
and stands alone, so that a loader may ship 8-bit batches and do this step on the device.
"""

import importlib.util
import io
import os
import stat

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from replknet_paddle.runtime.errors import InputError

# What data sets hold. Pillow reads many more, some of them by starting other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
if importlib.util.find_spec("PIL.AvifImagePlugin") is not None:  # since Pillow 11.3
    FORMATS += ("AVIF",)

# Pillow's own threshold for a warning: 270 MB as RGB. ImageNet's largest have 60 million.
MAX_PIXELS = 89_478_485

# Files are read into memory. As many pixels of 32 bits, stored without compression, take a third.
MAX_FILE_BYTES = 2**30

# Pillow takes 1 MiB of text or colour profile in a PNG file for an attack. What it allows for all
# texts of a file, 64 MiB, may be a single one.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


def read_file(path: str) -> bytes:
    """Return the bytes of an image file; raise OSError or InputError for what is none."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError("not a regular file")  # opening a pipe would wait for somebody to write
    if status.st_size > MAX_FILE_BYTES:
        raise InputError(f"{status.st_size} bytes; allowed: {MAX_FILE_BYTES:,}")
    with open(path, "rb") as file:
        return file.read()


def open_image(source: str | bytes) -> Image.Image:
    """Open an image, of a path or of a file's bytes, as a context manager; nothing is decoded yet.

    A file is read as a whole first, so that only damaged content fails later, with InputError: an
    error of storage is an OSError with an error number, here.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise InputError(f"cannot identify it as any of {', '.join(FORMATS)}") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's readers raise almost anything
        raise InputError(_damage(error)) from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise InputError(f"{size} pixels may be a decompression bomb; allowed: {MAX_PIXELS:,}")
    return image


def _damage(error: Exception) -> str:
    """Return why Pillow does not read a file that it has identified."""
    if "MAX_TEXT" in str(error):
        limit = PngImagePlugin.MAX_TEXT_MEMORY >> 20
        return f"its text or colour profile is larger than {limit} MiB; save it without"
    return f"damaged: {error or type(error).__name__}"


def asks_for_a_quarter_turn(image: Image.Image) -> bool:
    """Return whether an opened image's EXIF orientation says that its sides are to be exchanged."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # damaged files make Pillow's readers raise almost anything
        return False


def load(image: Image.Image) -> None:
    """Decode an opened image; raise InputError if it is damaged."""
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise InputError(_damage(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in mode RGB; an RGB image is returned as it is, not copied.

    Grey is repeated over the channels, CMYK converted by Pillow's formula without a colour
    profile, a palette looked up, and alpha dropped (not blended). The EXIF orientation is
    ignored: the published accuracies were measured without it.
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
    """Scale to [0, 1], subtract `mean`, divide by `std`: (H, W, 3) uint8 -> (3, H, W) float32.

    The result is contiguous, and bit for bit what the same three steps give in float32.
    """
    channels = np.empty((3, *pixels.shape[:2]), np.float32)
    np.divide(pixels.transpose(2, 0, 1), np.float32(255), out=channels)
    channels -= np.asarray(mean, np.float32).reshape(3, 1, 1)
    channels /= np.asarray(std, np.float32).reshape(3, 1, 1)
    return channels
