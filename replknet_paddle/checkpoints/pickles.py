"""Reading a pickle as data: Python's own unpickler, which here has nothing to call.

`pickle.load` (and `paddle.load`, `torch.load` through it) calls any function that a file names with
arguments from the file, so opening a file can run any program. Here `find_class` looks nothing up:
a name gives an entry of a table, which builds arrays, dictionaries and numbers. Whatever is not in
the table is refused, and named in the error. All that the opcode BUILD could change has a
`__setstate__` of its own, so that no attribute of an entry can be set. Before a pickle is read, one
pass over its opcodes bounds what they can make.
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from replknet_paddle.runtime.errors import InputError

BFLOAT16 = np.dtype("V2")  # which numpy lacks: two bytes
_CODES = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
DTYPES = {code: np.dtype("<" + code) for code in _CODES}

# What reading may take: so many times the file, and this much for a small one, whose objects weigh
# more than the bytes that describe them.
_TIMES_ITS_SIZE = 4
_ALLOWANCE_BYTES = 256 * 2**20

_OPCODE_BYTES = 256  # at most, in memory: an empty set of 216 and its places on stack and in memo

# Tuples inside one tuple, counted as often as they are mentioned: hashing takes a step for each.
_TUPLES_INSIDE = 10_000


class SourceFile(io.BufferedReader):
    """A file that is opened once: mapped for its arrays, and a stream for pickles."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        if self.size == 0:
            raise InputError("the file is empty; copy or download it again")
        self._bytes = memoryview(mmap.mmap(self.fileno(), 0, access=mmap.ACCESS_READ))
        self._limit = max(_TIMES_ITS_SIZE * self.size, _ALLOWANCE_BYTES)
        self._spent = 0
        self.times = 0  # what each byte that is read takes in memory

    def spend(self, nbytes: int) -> None:
        """Charge memory that is about to be used; raise InputError when it would be too much."""
        self._spent += nbytes
        if self._spent > self._limit:
            raise InputError(
                f"would take more than {self._limit / 2**20:.0f} MiB of memory, which no honest "
                f"checkpoint of {self.size} bytes does; get the file from its publisher again"
            )

    def copied(self, items):
        """Return `items`, charged for the container that is about to be made of them."""
        self.spend(_OPCODE_BYTES * len(items))
        return items

    def read(self, size: int = -1) -> bytes:
        left = max(self.size - self.tell(), 0)
        size = left if size is None or size < 0 else min(size, left)
        self.spend(self.times * size)
        return super().read(size)

    def view(self, start: int, length: int) -> memoryview:
        """Return the bytes [start, start + length) without copying them."""
        if start < 0 or length < 0 or start + length > self.size:
            raise InputError(
                f"ends too early: {length} bytes are announced at byte {start} of "
                f"{self.size}; copy or download it again"
            )
        return self._bytes[start : start + length]

    def integer(self, start: int, length: int) -> int:
        """Return the little-endian integer in `length` bytes."""
        return int.from_bytes(self.view(start, length), "little")

    def numbers(self, dtype: np.dtype, start: int, count: int) -> np.ndarray:
        """Return `count` numbers from byte `start`: a view of the file, or float32 for bfloat16."""
        raw = self.view(start, count * dtype.itemsize)
        if dtype != BFLOAT16:
            return np.frombuffer(raw, dtype)
        self.spend(4 * count)
        return widened(np.frombuffer(raw, DTYPES["u2"]))


def widened(bits: np.ndarray) -> np.ndarray:
    """Return the float32 numbers whose upper halves are these bits of bfloat16."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def checked_sizes(sizes: object) -> tuple[int, ...]:
    """Return `sizes` if it is a tuple of at most 32 non-negative integers, else InputError."""
    plain = isinstance(sizes, tuple) and len(sizes) <= 32
    if not plain or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise InputError(f"holds a tensor of impossible shape {shown(sizes)}")
    return sizes


def shown(value: object) -> str:
    """Return a value from a file as it may appear in a message: short, and quick to make."""
    parts = value if type(value) is tuple else (value,)
    is_flat = all(isinstance(part, (str, int, float, bytes, type(None))) for part in parts)
    return f"{value!r:.80}" if is_flat else f"a {type(value).__name__}"


# All that Python 3, PyTorch and Paddle write in protocols 2 to 5.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT",
    "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "EMPTY_LIST", "EMPTY_DICT",
    "EMPTY_SET", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "FROZENSET", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
}  # fmt: skip


def _check_opcodes(file: SourceFile) -> None:
    """Bound what the pickle at the stream's position can make; leave the stream after it.

    Python's unpickler makes room for any index of the memo that a file names, for a string of any
    length that it announces, and takes 2**n steps to hash n tuples that hold each other twice. So
    each opcode is charged, an index may not exceed the number of opcodes, and the number of tuples
    inside a tuple is followed through stack and memo. (Only tuples hash what they hold each time,
    and the table builds no tuples of tuples.)
    """
    stack: list[int] = []  # of each value the tuples inside it, and itself if it is one
    marks: list[int] = []
    memo: dict[int, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if name not in _OPCODES:
            raise InputError(
                f"uses pickle opcode {name}, which no known program writes into a checkpoint"
            )
        file.spend(_OPCODE_BYTES + sys.getsizeof(argument))
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise InputError(f"has entry {argument} of its memo after {count} opcodes")
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            if name == "POP" and marks and marks[-1] == len(stack):
                raise InputError("takes a mark for a value")
            above, below = [], len(opcode.stack_before)
            if pickletools.markobject in opcode.stack_before:
                below = opcode.stack_before.index(pickletools.markobject)
                start = marks.pop()
                above = stack[start:]
                del stack[start:]
            taken = [stack.pop() for _ in range(below)]
            if opcode.stack_after:
                tuples = 1 + sum(above) + sum(taken) if "TUPLE" in name else 0
                if tuples > _TUPLES_INSIDE:
                    raise InputError(f"holds more than {_TUPLES_INSIDE} tuples inside one another")
                stack.append(tuples)


class _Unpickler(pickle.Unpickler):
    """Python's unpickler over a table of what a pickle may name, and of nothing else."""

    def __init__(self, file: SourceFile, known: Mapping[str, object], storage: Callable | None):
        super().__init__(file)
        self.known, self.storage = known, storage

    def find_class(self, module: str, name: str) -> object:
        full_name = f"{module}.{name}"
        if full_name not in self.known:
            raise InputError(
                f"asks for {shown(full_name)}, which is not plain data; the usual way of loading "
                "would run code that the file chose. Nothing was run. If you trust the author of "
                "the file, ask for one that holds the weights alone (a state dict)"
            )
        return self.known[full_name]

    def persistent_load(self, reference: object) -> np.ndarray:
        if self.storage is None:
            raise InputError("refers to data outside of the pickle, which this format does not do")
        return self.storage(reference)


def unpickle(file: SourceFile, start: int, known: Mapping[str, object], storage=None) -> Any:
    """Return the value of the pickle at byte `start`, after which the stream then is.

    `known` is what the pickle may name, and `storage` makes the value of a persistent id.
    """
    file.seek(start)
    _check_opcodes(file)
    end = file.tell()
    file.seek(start)
    value = _Unpickler(file, known, storage).load()
    file.seek(end)
    return value


class Global(str):
    """The name of a class or function in a pickle; calling it builds plain data, or fails."""

    __slots__ = ("build",)

    def __new__(cls, name: str, build: Callable | None = None):
        self = super().__new__(cls, name)
        self.build = build
        return self

    def __call__(self, *arguments):
        if self.build is None:  # it may be mentioned, as a type is
            raise InputError(f"makes a {self}, which is not plain data")
        return self.build(*arguments)

    def __setstate__(self, state):
        raise InputError(f"sets the state of {self}")


class _Mapping(dict):
    """A dictionary of another class."""

    __slots__ = ()

    def __setstate__(self, state):
        if not isinstance(state, dict):  # PyTorch's `_metadata`: versions of its layers
            raise InputError("sets the state of a dictionary")


class _DType:
    """A numpy type of plain little-endian numbers."""

    __slots__ = ("value",)

    def __init__(self, code, align=False, copy=False):
        if not isinstance(code, str) or code.lstrip("<|=") not in DTYPES:
            raise InputError(f"holds a numpy array of type {shown(code)}; only numbers are read")
        self.value = DTYPES[code.lstrip("<|=")]

    def __setstate__(self, state):
        plain = type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", "|", "="):
            raise InputError("holds numpy arrays that are big-endian or have fields")


def _check_array(data, dtype, shape) -> None:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise InputError("holds a numpy array whose content is not plain numbers")
    if math.prod(checked_sizes(shape)) * dtype.value.itemsize != len(data):
        raise InputError(
            f"holds a numpy array of shape {shown(shape)} and type {dtype.value} with "
            f"{len(data)} bytes of data; copy or download the file again"
        )


def _array(data, dtype, shape, order="C") -> np.ndarray:
    _check_array(data, dtype, shape)
    return np.frombuffer(data, dtype.value).reshape(shape, order="F" if order == "F" else "C")


def known_globals(file: SourceFile, more: Mapping[str, Callable | None]) -> dict[str, object]:
    """Return what a pickle may name: containers, byte strings, numpy's arrays and scalars, and
    `more` of its format, with what builds each."""

    class Attributes(_Mapping):
        """The attributes of an object such as `argparse.Namespace`."""

        __slots__ = ()

        def __init__(self):
            super().__init__()

        def __setstate__(self, state):
            super().__setstate__(state)
            self.update(file.copied(state))

    class Array(np.ndarray):
        """A numpy array as pickles make it: first without content, which BUILD adds, once."""

        __slots__ = ("is_filled",)

        def __setstate__(self, state):
            if hasattr(self, "is_filled") or type(state) is not tuple or len(state) not in (4, 5):
                raise InputError("holds a numpy array of a form that is not known")
            shape, dtype, fortran, data = state[-4:]
            _check_array(data, dtype, shape)
            self.is_filled = True
            super().__setstate__((1, shape, dtype.value, fortran is True, data))

    def mapping(items=()) -> _Mapping:
        return _Mapping(file.copied(items))

    def encoded(text="", encoding="latin1") -> bytes:
        """`bytes` and `_codecs.encode`: how protocol 2 writes byte strings."""
        if not isinstance(text, str) or encoding != "latin1":
            raise InputError(f"encodes text as {shown(encoding)}; only bytes in latin1 are known")
        file.spend(len(text))
        return text.encode("latin1")

    builders = {
        "collections.OrderedDict": mapping,
        "collections.Counter": mapping,
        "collections.defaultdict": lambda factory=None, items=(): mapping(items),
        "_codecs.encode": encoded,
        "numpy.dtype": _DType,
        "numpy.ndarray": None,
    }
    for module in ("builtins", "__builtin__"):  # Python 3 and 2
        types = ("object", "dict", "list", "int", "float", "str", "bool")
        builders |= {
            **{f"{module}.{name}": None for name in types},
            f"{module}.set": lambda items=(): set(file.copied(items)),
            f"{module}.frozenset": lambda items=(): frozenset(file.copied(items)),
            f"{module}.bytes": encoded,
        }
    for core in ("core", "_core"):  # numpy 1 and 2
        builders |= {
            f"numpy.{core}.multiarray._reconstruct": lambda *_: np.ndarray.__new__(Array, 0, "u1"),
            f"numpy.{core}.multiarray.scalar": lambda dtype, data: _array(data, dtype, (1,)).item(),
            f"numpy.{core}.numeric._frombuffer": _array,
        }
    known = {name: Global(name, build) for name, build in (builders | more).items()}
    # NEWOBJ takes nothing but classes.
    return known | dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), Attributes)
