"""Operations on 8-bit RGB images: in compiled code where there is a C++ compiler, else by Pillow.

Both give the same bits, so which one runs is a matter of speed alone. Images are uint8 arrays
(H, W, 3); only `resize`, which comes first, takes a Pillow image.

Pillow 13 resizes the rows before the columns where that is cheaper, older releases never do, and
since there are 8 bits in between the results differ. Here the order is always that of Pillow 13,
so a photograph becomes the same pixels whichever release decoded it.
"""

import contextlib
import ctypes
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from replknet_paddle.runtime.compiler import BuildError, SharedLibrary
from replknet_paddle.runtime.machines import processor_flags

SOURCE = Path(__file__).resolve().with_name("pixels.cpp")
BICUBIC = Image.Resampling.BICUBIC

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom

logger = logging.getLogger(__name__)


def rows_first(size: Size, new_size: Size) -> bool:
    """Return whether Pillow 13 makes an image lower before it makes it narrower or wider."""
    fewer_rows = size[1] - new_size[1]
    return fewer_rows > 0 and fewer_rows > 2 * (size[0] - new_size[0])


class PillowPixels:
    """The operations, by Pillow. `NativePixels` has the same ones."""

    def resize(
        self,
        image: Image.Image,
        size: Size,
        *,
        crop: tuple[int, int, int, int] | None = None,
        box: Box | None = None,
        keep: tuple[int, int, int, int] | None = None,
        flip: bool = False,
    ) -> np.ndarray:
        """Resize `image`, of mode RGB, by antialiased bicubic interpolation.

        Nothing beyond `crop` counts. Of the crop, `box` becomes `size`; its edges may lie within
        pixels. Of the result, the box `keep` is wanted, mirrored by `flip`.
        """
        if crop:
            image = image.crop(crop)
        left, top, right, bottom = box or (0, 0, *image.size)
        width, height = size
        if rows_first(image.size, size):
            image = image.resize((image.width, height), BICUBIC, (0, top, image.width, bottom))
            image = image.resize(size, BICUBIC, (left, 0, right, height))
        else:
            image = image.resize((width, image.height), BICUBIC, (left, 0, right, image.height))
            image = image.resize(size, BICUBIC, (0, top, width, bottom))
        if keep:
            image = image.crop(keep)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)

    def affine(self, pixels: np.ndarray, matrix: Sequence, fill: Sequence) -> np.ndarray:
        """Give (x, y) the colour at (m0 x + m1 y + m2, m3 x + m4 y + m5), bicubic, or `fill`."""
        image = Image.fromarray(pixels)
        affine = Image.Transform.AFFINE
        moved = image.transform(image.size, affine, tuple(matrix), BICUBIC, fillcolor=tuple(fill))
        return np.array(moved)

    def lookup(self, pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Replace each value v of channel c by table[c, v]; a table (256,) is for all channels."""
        table = np.broadcast_to(table, (3, 256))
        return np.array(Image.fromarray(pixels).point(table.ravel().tolist()))

    def histogram(self, pixels: np.ndarray) -> np.ndarray:
        """Return how often each channel has each value: (3, 256) int64."""
        return np.array(Image.fromarray(pixels).histogram()).reshape(3, 256)

    def grey(self, pixels: np.ndarray) -> np.ndarray:
        """Return the luminance (ITU-R 601-2) in each channel."""
        return np.array(Image.fromarray(pixels).convert("L").convert("RGB"))

    def smooth(self, pixels: np.ndarray) -> np.ndarray:
        """Return the 3x3 average in which the centre counts five times; the border stays."""
        return np.array(Image.fromarray(pixels).filter(ImageFilter.SMOOTH))

    def blend(self, start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
        """Return start + factor * (end - start), cut to [0, 255]; above 1 it goes beyond `end`."""
        return np.array(Image.blend(Image.fromarray(start), Image.fromarray(end), factor))


class _ArrowArray(ctypes.Structure):
    """The struct of Arrow's C data interface, as far as it is read here."""


_ArrowArray._fields_ = [
    (name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")
] + [
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


@contextlib.contextmanager
def _memory(image: Image.Image) -> Iterator[int]:
    """Give the address of an RGB image's pixels, 4 bytes each, row by row; valid within."""
    try:
        # Pillow stores them so, and lends them in Arrow's interface from 11.2 on, unless the
        # image is so large that it lies in several pieces.
        capsules = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        copy = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8)
        yield copy.ctypes.data
    else:
        array = _ArrowArray.from_address(_capsule_pointer(capsules[1], b"arrow_array"))
        yield array.children[0].contents.buffers[1]


class NativePixels:
    """The operations of `PillowPixels`, in compiled code."""

    def __init__(self, library: ctypes.CDLL):
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        arguments = {
            "resize": [pointer, integer, integer, ctypes.c_int64, pointer, integer, integer]
            + [pointer, integer, integer, pointer],
            "affine": [pointer, integer, integer, pointer, pointer, pointer],
            "lookup": [pointer, integer, pointer, pointer],
            "histogram": [pointer, integer, pointer],
            "grey": [pointer, integer, pointer],
            "smooth": [pointer, integer, integer, pointer],
            "blend": [pointer, pointer, ctypes.c_int64, ctypes.c_float, pointer],
        }
        for name, types in arguments.items():
            getattr(library, name).argtypes = types
            getattr(library, name).restype = None
        self._library = library

    def __reduce__(self):
        return get_pixels, ()  # where workers are started afresh instead of forked

    def resize(self, image, size, *, crop=None, box=None, keep=None, flip=False):
        left, top, right, bottom = crop or (0, 0, *image.size)
        cropped = right - left, bottom - top
        keep = keep or (0, 0, *size)
        corners = np.array(box or (0, 0, *cropped), np.float64)
        kept = np.array(keep, np.int32)
        result = np.empty((keep[3] - keep[1], keep[2] - keep[0], 3), np.uint8)
        stride = 4 * image.width
        with _memory(image) as address:
            first = address + stride * top + 4 * left
            last = kept, rows_first(cropped, size), flip, result
            self._call("resize", first, *cropped, stride, corners, *size, *last)
        return result

    def affine(self, pixels, matrix, fill):
        height, width, _ = pixels.shape
        matrix, fill = np.array(matrix, np.float64), np.array(fill, np.uint8)
        return self._map("affine", pixels, width, height, matrix, fill)

    def lookup(self, pixels, table):
        table = np.ascontiguousarray(np.broadcast_to(table, (3, 256)), np.uint8)
        return self._map("lookup", pixels, pixels.size // 3, table)

    def histogram(self, pixels):
        counts = np.empty((3, 256), np.int64)
        self._call("histogram", np.ascontiguousarray(pixels), pixels.size // 3, counts)
        return counts

    def grey(self, pixels):
        return self._map("grey", pixels, pixels.size // 3)

    def smooth(self, pixels):
        height, width, _ = pixels.shape
        return self._map("smooth", pixels, width, height)

    def blend(self, start, end, factor):
        return self._map("blend", start, np.ascontiguousarray(end), start.size, factor)

    def _map(self, name: str, pixels: np.ndarray, *arguments) -> np.ndarray:
        """Return the result of an operation that gives as many pixels as it gets."""
        pixels = np.ascontiguousarray(pixels)
        result = np.empty_like(pixels)
        self._call(name, pixels, *arguments, result)
        return result

    def _call(self, name: str, *arguments) -> None:
        """Call a compiled function with numbers and with the addresses of arrays."""
        getattr(self._library, name)(
            *(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments)
        )


Pixels = PillowPixels | NativePixels


@functools.cache
def get_pixels() -> Pixels:
    """Return the operations in compiled code where possible, else by Pillow.

    Compiles them on first use, which takes seconds; a warning says where it cannot.
    """
    try:
        return NativePixels(ctypes.CDLL(str(pixels_library().find_or_build())))
    except (BuildError, OSError) as error:
        logger.warning(
            "no compiled image operations, so Pillow does them: the same pixels at a third to "
            "half the speed. CXX names a C++ compiler. The reason: %s",
            error,
        )
        return PillowPixels()


def pixels_library() -> SharedLibrary:
    """Return the library of compiled operations, for this machine's processor alone."""
    processor = processor_flags()  # no other kind may run what was compiled for this one
    native = ("-march=native",) if "avx2" in processor.split() else ()
    return SharedLibrary(
        name="pixels",
        sources=(SOURCE,),
        flags=(
            *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-Wno-psabi"),
            *native,
        ),
        must_match=processor.encode(),
    )
