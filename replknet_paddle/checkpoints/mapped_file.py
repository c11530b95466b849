"""A file's bytes in memory, and a bound on what may be built out of them."""

import mmap
import struct
from pathlib import Path

import numpy as np

from replknet_paddle.runtime.errors import InputError

# Python objects weigh more than the bytes that describe them: an opcode of one byte can make an
# empty set of 216. The allowance lets small files through, whose objects outweigh their tensors.
_ALLOWANCE_BYTES = 16 * 2**20

BFLOAT16 = "bfloat16"  # in place of a numpy type, which numpy does not have

# Everything that numpy could read from a pickle, except objects, structures and text.
DTYPES = {
    code: np.dtype("<" + code)
    for code in ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
}


class MappedFile:
    """A file's bytes, memory-mapped, with a bound on what may be built out of them.

    A process that shortens the file while it is mapped ends this one with SIGBUS. Programs that
    write checkpoints therefore have to replace the old file, as this one does, not overwrite it.

    Args:
        path: a regular file that is not empty.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: `path` is a directory, empty or not readable.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: there is no such file; docs/model_zoo.md lists the published ones"
            )
        if not path.is_file():
            raise InputError("is not a file; give the checkpoint file itself")
        try:
            with path.open("rb") as file:
                if path.stat().st_size == 0:
                    raise InputError("the file is empty; copy or download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}") from error
        self.path = path
        self.size = len(self._map)
        self._bytes = memoryview(self._map)
        self._left = 2 * self.size + _ALLOWANCE_BYTES

    def spend(self, nbytes: int) -> None:
        """Charge memory that is about to be used; raise InputError when it would be too much."""
        self._left -= nbytes
        if self._left < 0:
            raise InputError(
                f"would take more than twice its {self.size} bytes in memory, which no honest "
                "checkpoint does; get the file from its publisher again"
            )

    def view(self, start: int, length: int) -> memoryview:
        """The bytes [start, start + length) without copying them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise InputError(
                f"ends too early: {length} bytes are announced at byte {start} of "
                f"{self.size}; copy or download it again"
            )
        return self._bytes[start : start + length]

    def unpack(self, layout: str, start: int) -> tuple:
        """Numbers in the `struct` module's notation, read at byte `start`."""
        return struct.unpack(layout, self.view(start, struct.calcsize(layout)))

    def find(self, needle: bytes, start: int) -> int:
        """Where `needle` first occurs from `start` on; -1 if it does not."""
        return self._map.find(needle, start)

    def release(self, start: int, length: int) -> None:
        """Let the system drop these bytes from memory; they are read again when needed."""
        if not hasattr(self._map, "madvise"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def numbers(self, dtype: object, start: int, count: int) -> np.ndarray:
        """`count` numbers from byte `start` on: a view of the file, or float32 for bfloat16.

        Args:
            dtype: one of `DTYPES`, or BFLOAT16.
        """
        nbytes = count * itemsize(dtype)
        raw = np.frombuffer(self.view(start, nbytes), DTYPES["u2"] if dtype is BFLOAT16 else dtype)
        if dtype is not BFLOAT16:
            return raw
        self.spend(2 * nbytes)
        widened = np.empty(count, np.uint32)
        # bfloat16 is the upper half of a float32.
        np.left_shift(raw, 16, out=widened, dtype=np.uint32)
        self.release(start, nbytes)
        widened.flags.writeable = False
        return widened.view(np.float32)


def itemsize(dtype: object) -> int:
    """Bytes per number of one of `DTYPES`, or of BFLOAT16."""
    return 2 if dtype is BFLOAT16 else dtype.itemsize
