"""PNG files where neither Pillow nor Python can decompress them.

Paddle 2.6 exports functions of a zlib of its own. In a process that has loaded Paddle before the
system's zlib, that library calls some of Paddle's in the place of its own, the two differ, and
Pillow and Python fail or crash on compressed data. There, PNG files are decompressed by Paddle's
zlib, which is whole in itself, and decoded here. Everything in this package imports zlib before
Paddle; this is for programs that import Paddle first.
"""

import binascii
import ctypes
import functools
import struct
import sys
import zlib

import numpy as np
from PIL import Image

from replknet_paddle.runtime.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PADDLE_LIBRARY = "paddle.base.libpaddle"
ZLIB_USERS = ("zlib", "binascii", "PIL._imaging")  # any of which loads the system's zlib
HINT = "import replknet_paddle or zlib before paddle to read it"

# Colour type of the header: Pillow's mode and bytes per pixel at 8 bits.
MODES = {0: ("L", 1), 2: ("RGB", 3), 3: ("P", 1), 4: ("LA", 2), 6: ("RGBA", 4)}


@functools.cache
def zlib_is_broken() -> bool:
    """Whether Paddle 2 was loaded before the system's zlib: modules are listed as imported."""
    order = {name: place for place, name in enumerate(sys.modules)}
    if sys.platform != "linux" or PADDLE_LIBRARY not in order:
        return False
    version = getattr(sys.modules["paddle"], "__version__", "")
    first = min(order[name] for name in ZLIB_USERS if name in order)
    return version.startswith("2.") and order[PADDLE_LIBRARY] < first


class _Stream(ctypes.Structure):
    """zlib's z_stream."""

    _fields_ = [
        ("next_in", ctypes.c_char_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    ]


def inflate_by_paddle(data: bytes, size: int) -> bytes:
    """Decompress `data`, at most `size` bytes, by the zlib within Paddle's library."""
    library = ctypes.CDLL(sys.modules[PADDLE_LIBRARY].__file__)
    result = ctypes.create_string_buffer(size)
    stream = _Stream(
        next_in=data, avail_in=len(data), next_out=ctypes.addressof(result), avail_out=size
    )
    if library.inflateInit_(ctypes.byref(stream), b"1.2.8", ctypes.sizeof(stream)) != 0:
        raise InputError(f"it cannot be decompressed in this process; {HINT}")
    finish = 4  # Z_FINISH
    library.inflate(ctypes.byref(stream), finish)
    written = stream.total_out
    library.inflateEnd(ctypes.byref(stream))
    return result.raw[:written]


def inflate(data: bytes, size: int) -> bytes:
    """Decompress `data`, at most `size` bytes."""
    if zlib_is_broken():
        return inflate_by_paddle(data, size)
    return zlib.decompressobj().decompress(data, size)


def decode_png(data: bytes, *, max_pixels: int) -> Image.Image:
    """The image in the bytes of a PNG file: 8 bits a channel or less, not interlaced.

    Raises:
        InputError: it is another one, damaged, or larger than `max_pixels`.
    """
    try:
        chunks = list(_chunks(data))
        header = next(body for name, body in chunks if name == b"IHDR")
        width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        mode, channels = MODES[colour]
    except (StopIteration, struct.error, KeyError) as error:
        raise InputError(f"damaged: {error or type(error).__name__}") from None
    if depth == 16 or interlaced:
        kind = "interlaced" if interlaced else "of 16 bits per channel"
        raise InputError(f"a PNG file {kind}; {HINT}")
    if width * height > max_pixels:
        raise InputError(
            f"{width} x {height} pixels may be a decompression bomb; allowed: {max_pixels:,}"
        )
    row_bytes = -(-width * channels * depth // 8)
    packed = b"".join(body for name, body in chunks if name == b"IDAT")
    raw = inflate(packed, height * (row_bytes + 1))
    if len(raw) != height * (row_bytes + 1) or not width:
        raise InputError("damaged: the image data end early")
    rows = np.frombuffer(raw, np.uint8).reshape(height, row_bytes + 1)
    if rows[:, 0].max() > 4:
        raise InputError("damaged: an unknown filter")
    pixels = unfilter(rows[:, 1:].reshape(height, -1, channels), rows[:, 0])
    if depth < 8:
        pixels = _unpack(pixels.reshape(height, row_bytes), depth)[:, :width]
        if mode == "L":  # Pillow spreads grey over the whole range, and has a mode for one bit
            pixels = pixels * np.uint8(255 // (2**depth - 1))
    image = Image.frombytes(mode, (width, height), np.ascontiguousarray(pixels).tobytes())
    if mode == "P":
        image.putpalette(next((body for name, body in chunks if name == b"PLTE"), b""))
    return image.convert("1") if (mode, depth) == ("L", 1) else image


def _chunks(data: bytes):
    """Name and body of each chunk, checked."""
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        checksum = data[place + 8 + length : place + 12 + length]
        if checksum != struct.pack(">I", binascii.crc32(name + body)):
            raise InputError(f"damaged: the checksum of a {name!r} chunk is wrong")
        yield name, body
        place += 12 + length


def _unpack(rows: np.ndarray, depth: int) -> np.ndarray:
    """Numbers of `depth` bits out of bytes, row by row."""
    bits = np.unpackbits(rows, axis=1).reshape(len(rows), -1, depth)
    return (bits << np.arange(depth - 1, -1, -1, dtype=np.uint8)).sum(axis=2).astype(np.uint8)


def unfilter(filtered: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Undo PNG's filters (RFC 2083, 6): (H, W, bytes per pixel) and one filter per row.

    A pixel needs those to its left, above, and above that to its left. All pixels of a diagonal
    are computed at once, from the upper left corner to the lower right one.
    """
    height, width, _ = filtered.shape
    done = np.zeros((height + 1, width + 1, filtered.shape[2]), np.int16)
    for diagonal in range(height + width - 1):
        rows = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        columns = diagonal - rows
        left, up, corner = done[rows + 1, columns], done[rows, columns + 1], done[rows, columns]
        kind = filters[rows][:, None]
        guess = left + up - corner
        to_left, to_up, to_corner = (np.abs(guess - near) for near in (left, up, corner))
        nearest = np.where(to_up <= to_corner, up, corner)
        nearest = np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
        predicted = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4], [left, up, (left + up) // 2, nearest]
        )
        done[rows + 1, columns + 1] = (filtered[rows, columns] + predicted) & 255
    return done[1:, 1:].astype(np.uint8)
