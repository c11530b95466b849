"""Reading a pickle as data: an interpreter of pickle's opcodes that has nothing to call.

`pickle.load` (and `paddle.load`, `torch.load` through it) looks up any function that a file
names and calls it with arguments from the file, so opening a file can run any program. Here a
file may only name entries of a table, and each entry is a function of this package that builds
plain data: arrays, dictionaries, numbers. Every other name is refused, and named in the error.

The size of a result is bounded as well. Everything built is charged to the `MappedFile` it
came from, which allows about twice the file's size in all, and large byte strings are views of
the memory-mapped file rather than copies.
"""

import codecs
import math
import mmap
import pickle as op  # for the names of the opcodes only: nothing in this package unpickles with it
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replknet_paddle.runtime.errors import InputError

# Python objects weigh more than the bytes that describe them: an opcode of one byte can make an
# empty set of 200. The allowance lets small files through, whose objects outweigh their tensors.
_BYTES_PER_OPCODE = 128
_ALLOWANCE_BYTES = 8 * 2**20

# Longer strings stay in the file until something needs their content.
_LARGE_BYTES = 4 * 2**10

# Everything that numpy could read from a pickle, less objects, structures and text.
DTYPES = {
    code: np.dtype("<" + code)
    for code in ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
}


class MappedFile:
    """A file's bytes, memory-mapped, with a bound on what may be built out of them.

    A file that is cut short by another process while it is mapped ends the process with SIGBUS;
    writers therefore have to replace checkpoints, not overwrite them, as this project's do.

    Args:
        path: a regular file that is not empty.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: `path` is a directory, empty or not readable.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: there is no such file; docs/model_zoo.md has the published ones"
            )
        if not path.is_file():
            raise InputError("is not a file; give the checkpoint file itself")
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                if self.size == 0:
                    raise InputError("the file is empty; copy or download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror or error}") from error
        self.size = len(self._map)
        self._bytes = memoryview(self._map)
        self._left = 2 * self.size + _ALLOWANCE_BYTES

    def spend(self, nbytes: int) -> None:
        """Charges memory that is about to be used; raises InputError when it would be too much."""
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

    def rfind(self, needle: bytes, start: int) -> int:
        """Where `needle` last occurs at or after `start`; -1 if it does not."""
        return self._map.rfind(needle, max(start, 0))

    def release(self, start: int, length: int) -> None:
        """Lets the system drop these bytes from memory; they are read again when needed."""
        if not hasattr(self._map, "madvise"):
            return
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (start + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)


@dataclass(frozen=True, eq=False)
class Global:
    """What stands for a class or function that a pickle names.

    `build` makes the value when the pickle calls it: `build(file, *arguments)`. None: the name
    may be mentioned (as the type of a storage is) but not called.
    """

    name: str
    build: Callable | None = None


class Attributes(dict):
    """The attributes of an object such as `argparse.Namespace`, as a dictionary."""


@dataclass(frozen=True, eq=False)
class _LargeText:
    """A long string that is still in the file: UTF-8 at [start, start + length)."""

    file: MappedFile
    start: int
    length: int

    def decode(self) -> str:
        self.file.spend(4 * self.length)
        return str(self.file.view(self.start, self.length), "utf-8", "surrogatepass")

    def latin1(self) -> bytes:
        """The bytes that pickle protocol 2 disguises as text, for want of an opcode for bytes."""
        self.file.spend(self.length)
        decoder = codecs.getincrementaldecoder("utf-8")()
        raw = self.file.view(self.start, self.length)
        parts = [
            decoder.decode(raw[at : at + 2**20], at + 2**20 >= self.length).encode("latin1")
            for at in range(0, self.length, 2**20)
        ]
        self.file.release(self.start, self.length)
        return b"".join(parts)


class _LateArray:
    """A numpy array as pickles make it: in a first step without content, which a second adds."""

    value: np.ndarray | None = None


# ---- what the table's entries build: build(file, *arguments from the pickle)


def _mapping(file: MappedFile, items=()) -> dict:
    pairs = items.items() if isinstance(items, dict) else items
    return {checked_key(key): value for key, value in _counted(file, pairs)}


def _default_dict(file: MappedFile, factory=None, items=()) -> dict:
    return _mapping(file, items)


def _attributes(file: MappedFile) -> Attributes:
    return Attributes()


def _reconstructed(file: MappedFile, cls, base, state) -> object:
    """`copyreg._reconstructor`: how protocols 0 and 1 begin an object."""
    if not isinstance(cls, Global) or cls.build not in (_attributes, _mapping) or state is not None:
        raise InputError("holds an object of a form that is not known")
    return cls.build(file)


def _set(file: MappedFile, items=()) -> set:
    return {checked_key(item) for item in _counted(file, items)}


def _counted(file: MappedFile, items):
    """`items`, charged for the copy that is about to be made of them."""
    file.spend(_BYTES_PER_OPCODE * len(items))
    return items


def _bytes(file: MappedFile, text="", encoding="latin1") -> bytes:
    """`bytes` and `_codecs.encode`: how protocol 2 writes byte strings."""
    if encoding != "latin1" or not isinstance(text, (str, _LargeText)):
        raise InputError(f"encodes text as {shown(encoding)}; only bytes in latin1 are known")
    if isinstance(text, _LargeText):
        return text.latin1()
    file.spend(len(text))
    return text.encode("latin1")


def _dtype(file: MappedFile, code, align=False, copy=False) -> np.dtype:
    if not isinstance(code, str) or code.lstrip("<|=") not in DTYPES:
        raise InputError(f"holds a numpy array of type {shown(code)}; only numbers are read")
    return DTYPES[code.lstrip("<|=")]


def _late_array(file: MappedFile, cls, shape, code) -> _LateArray:
    return _LateArray()


def _array(file: MappedFile, data, dtype, shape, order="C") -> np.ndarray:
    """A numpy array over `data`, which is not copied.

    Raises:
        InputError: the type is not known, or shape and length of the data do not agree.
    """
    if isinstance(data, _LargeText):  # Python 2 wrote byte strings with the opcode of text
        data = data.latin1()
    elif isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(dtype, np.dtype) or not isinstance(data, (bytes, memoryview)):
        raise InputError("holds a numpy array whose content is not plain numbers")
    count = math.prod(checked_sizes(shape))
    if count * dtype.itemsize != len(data):
        raise InputError(
            f"holds a numpy array of shape {shown(shape)} and type {dtype} with {len(data)} bytes "
            "of data; copy or download the file again"
        )
    file.spend(len(data))
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(file: MappedFile, dtype, data) -> object:
    return _array(file, data, dtype, (1,))[0].item()


def checked_sizes(sizes: object) -> tuple[int, ...]:
    """`sizes` if it is a tuple of at most 32 non-negative integers, else InputError."""
    plain = isinstance(sizes, tuple) and len(sizes) <= 32
    if not plain or not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise InputError(f"holds a tensor of impossible shape {shown(sizes)}")
    return sizes


def checked_key(key: object) -> object:
    """`key` if it may be one, which is to say if it is flat."""
    if not _is_flat(key):
        raise InputError(f"uses a {type(key).__name__} as a key; only text and numbers are read")
    return key


def _is_flat(value: object) -> bool:
    """Whether it is a scalar or a tuple of scalars.

    Hashing or printing tuples of tuples takes time without a bound: each can hold the last twice.
    """
    scalars = (str, int, float, bool, bytes, type(None))
    return isinstance(value, scalars) or (
        type(value) is tuple and all(isinstance(part, scalars) for part in value)
    )


def shown(value: object) -> str:
    """A value from a file as it may appear in a message: short, and safe to make."""
    return f"{value!r:.80}" if _is_flat(value) else f"a {type(value).__name__}"


def table(*entries: tuple[str, Callable | None]) -> dict[str, Global]:
    """Name -> what stands for it, from (name, builder) pairs."""
    return {name: Global(name, build) for name, build in entries}


# Both names of a thing that moved: Python 2 and 3 (protocol 2 writes Python 2's), numpy 1 and 2.
PLAIN_GLOBALS = table(
    ('collections.OrderedDict', _mapping),
    ('collections.Counter', _mapping),
    ('collections.defaultdict', _default_dict),
    ('argparse.Namespace', _attributes),
    ('types.SimpleNamespace', _attributes),
    ('copyreg._reconstructor', _reconstructed),
    ('copy_reg._reconstructor', _reconstructed),
    ('_codecs.encode', _bytes),
    *((f'{module}.{name}', None) for module in ('builtins', '__builtin__')
      for name in ('object', 'dict', 'list', 'int', 'float', 'str', 'bool')),
    *((f'{module}.{name}', build) for module in ('builtins', '__builtin__')
      for name, build in (('set', _set), ('frozenset', _set), ('bytes', _bytes))),
    ('numpy.ndarray', None),
    ('numpy.dtype', _dtype),
    *((f'numpy.{core}.{name}', build) for core in ('core', '_core')
      for name, build in (
          ('multiarray._reconstruct', _late_array),
          ('multiarray.scalar', _scalar),
          ('numeric._frombuffer', _array),
      )),
)  # fmt: skip

_CONSTANTS = {op.NONE: None, op.NEWTRUE: True, op.NEWFALSE: False}
_EMPTY = {op.EMPTY_LIST: list, op.EMPTY_DICT: dict, op.EMPTY_TUPLE: tuple, op.EMPTY_SET: set}
_NUMBERS = {op.BININT1: "<B", op.BININT2: "<H", op.BININT: "<i", op.BINFLOAT: ">d"}
_LONGS = {op.LONG1: "<B", op.LONG4: "<i"}
_TEXTS = {op.SHORT_BINUNICODE: "<B", op.BINUNICODE: "<I", op.BINUNICODE8: "<Q"}
_BYTESTRINGS = {op.SHORT_BINBYTES: "<B", op.BINBYTES: "<I", op.BINBYTES8: "<Q", op.BYTEARRAY8: "<Q"}
_PYTHON2_STRINGS = {op.SHORT_BINSTRING: "<B", op.BINSTRING: "<i"}
_TUPLES = {op.TUPLE1: 1, op.TUPLE2: 2, op.TUPLE3: 3}
_GETS = {op.BINGET: "<B", op.LONG_BINGET: "<I"}
_PUTS = {op.BINPUT: "<B", op.LONG_BINPUT: "<I"}
_SKIPPED = {op.PROTO: 1, op.FRAME: 8}


class Unpickler:
    """Reads one pickle of protocol 2 to 5.

    Containers come back as dict, list, tuple and set; byte strings over 4 KiB as read-only
    views of the file; arrays as read-only numpy arrays.

    Args:
        file: where the pickle is.
        start: the byte it begins at.
        known: name -> stand-in, for all that it may mention.
        persistent_load: makes the value of a persistent id (PyTorch: a reference to a tensor's
            storage). None: such references are refused.
    """

    def __init__(
        self,
        file: MappedFile,
        start: int,
        known: dict[str, Global],
        persistent_load: Callable[[object], object] | None = None,
    ):
        self.file = file
        self.position = start
        self.known = known
        self.persistent_load = persistent_load
        self.memo: dict[int, object] = {}
        self.stack: list = []
        self.marks: list[list] = []  # the stacks that were set aside at each MARK

    def load(self) -> object:
        """The pickle's value; `position` is then the byte after it.

        Raises:
            InputError: it names something that is not in the table, or needs too much memory.
            ValueError, TypeError, KeyError, IndexError and others: it is damaged. Callers turn
                these into InputError.
        """
        while True:
            self.file.spend(_BYTES_PER_OPCODE)
            code = bytes(self.file.view(self.position, 1))
            self.position += 1
            if code == op.STOP:
                return self._pop_value()
            self._step(code)

    def _step(self, code: bytes) -> None:
        stack = self.stack
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _LONGS:
            raw = self._take(self._number(_LONGS[code]))
            stack.append(int.from_bytes(raw, "little", signed=True))
        elif code in _TEXTS:
            stack.append(self._text(self._number(_TEXTS[code])))
        elif code in _BYTESTRINGS:
            raw = self._take(self._number(_BYTESTRINGS[code]))
            stack.append(raw if len(raw) > _LARGE_BYTES else bytes(raw))
        elif code in _PYTHON2_STRINGS:
            raw = self._take(self._number(_PYTHON2_STRINGS[code]))
            self.file.spend(2 * len(raw))
            stack.append(str(raw, "latin1"))
        elif code in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[code])]
            stack.append(tuple(reversed(items)))
        elif code in _GETS:
            stack.append(self._finished(self.memo[self._number(_GETS[code])]))
        elif code in _PUTS:
            self.memo[self._number(_PUTS[code])] = stack[-1]
        elif code == op.MEMOIZE:
            self.memo[len(self.memo)] = stack[-1]
        elif code in _SKIPPED:
            self._take(_SKIPPED[code])
        elif code in self._STEPS:
            self._STEPS[code](self)
        else:
            raise InputError(
                f"uses pickle opcode {code!r}, which no known program writes into a checkpoint"
            )

    # ---- arguments, and values from the stack

    def _take(self, length: int) -> memoryview:
        view = self.file.view(self.position, length)
        self.position += length
        return view

    def _number(self, layout: str):
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, length: int):
        raw = self._take(length)
        if length > _LARGE_BYTES:
            return _LargeText(self.file, self.position - length, length)
        text = str(raw, "utf-8", "surrogatepass")
        self.file.spend(sys.getsizeof(text))
        return text

    def _line(self) -> str:
        end = self.file.find(b"\n", self.position)
        if end < 0 or end - self.position > 1000:
            raise InputError("holds a name without an end")
        text = str(self._take(end - self.position), "utf-8")
        self.position += 1
        return text

    def _finished(self, value: object) -> object:
        """`value`, or the array that it became."""
        if not isinstance(value, _LateArray):
            return value
        if value.value is None:
            raise InputError("uses a numpy array before its content is known")
        return value.value

    def _pop(self) -> object:
        return self._finished(self.stack.pop())

    def _pop_value(self) -> object:
        """A value to keep: no stand-ins, and long text decoded."""
        return self._kept(self.stack.pop())

    def _kept(self, value: object) -> object:
        if isinstance(value, Global):
            return value.name
        if isinstance(value, _LargeText):
            return value.decode()
        return self._finished(value)

    def _pop_mark(self) -> list:
        items = self.stack
        self.stack = self.marks.pop()
        return [self._finished(item) for item in items]

    # ---- opcodes with a method of their own

    def _mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _append(self) -> None:
        value = self._pop_value()
        self._top(list).append(value)

    def _appends(self) -> None:
        items = [self._kept(item) for item in self._pop_mark()]
        self._top(list).extend(items)

    def _set_item(self) -> None:
        value, key = self._pop_value(), self._pop()
        self._top(dict)[checked_key(key)] = value

    def _set_items(self) -> None:
        items = self._pop_mark()
        self._fill(self._top(dict), items)

    def _fill(self, target: dict, items: list) -> None:
        if len(items) % 2:
            raise InputError("holds a dictionary with a key that has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = self._kept(value)

    def _add_items(self) -> None:
        items = self._pop_mark()
        self._top(set).update(checked_key(item) for item in items)

    def _new_list(self) -> None:
        items = self._pop_mark()
        self.stack.append([self._kept(item) for item in items])

    def _new_dict(self) -> None:
        items, target = self._pop_mark(), {}
        self._fill(target, items)
        self.stack.append(target)

    def _new_set(self) -> None:
        items = self._pop_mark()
        self.stack.append({checked_key(item) for item in items})

    def _new_tuple(self) -> None:
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def _top(self, kind: type):
        if not isinstance(self.stack[-1], kind):
            raise InputError(f"adds items to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _find(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise InputError("asks for something whose name is not text")
        full_name = f"{module}.{name}"
        if full_name not in self.known:
            raise InputError(
                f"asks for {shown(full_name)}, which is not plain data; the usual way of loading "
                "would run code that the file chose. Nothing was run. If you trust the author of "
                "the file, ask for one that holds the weights alone (a state dict)"
            )
        return self.known[full_name]

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self.stack.append(self._find(module, name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(self._find(module, name))

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise InputError("calls something that is not a function")
        if function.build is None:
            raise InputError(f"makes a {function.name}, which is not plain data")
        return function.build(self.file, *arguments)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        self.stack.append(self._call(function, arguments))

    def _new_object(self) -> None:
        arguments, cls = self._pop(), self._pop()
        self.stack.append(self._call(cls, arguments))

    def _new_object_with_keywords(self) -> None:
        keywords = self._pop()
        if keywords != {}:
            raise InputError("makes an object with keyword arguments")
        self._new_object()

    def _instance(self) -> None:
        module, name = self._line(), self._line()
        arguments = self._pop_mark()
        self.stack.append(self._call(self._find(module, name), tuple(arguments)))

    def _build(self) -> None:
        """Gives the object on top its state; in a genuine pickle it was made just before."""
        state, target = self._pop(), self.stack[-1]
        if isinstance(target, _LateArray):
            self.stack[-1] = target.value = self._filled(state)
        elif isinstance(target, np.dtype):
            self._check_dtype_state(state)
        elif isinstance(target, Attributes) and isinstance(state, dict):
            target.update(state)
        elif not (type(target) is dict and isinstance(state, dict)):
            # On an ordered dict the state is PyTorch's `_metadata`: versions of its layers.
            raise InputError(f"sets the state of a {type(target).__name__}")

    def _filled(self, state: object) -> np.ndarray:
        if type(state) is not tuple or len(state) not in (4, 5):
            raise InputError("holds a numpy array of a form that is not known")
        shape, dtype, fortran, data = state[-4:]
        return _array(self.file, data, dtype, shape, "F" if fortran else "C")

    def _check_dtype_state(self, state: object) -> None:
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", "|", "="):
            raise InputError("holds numpy arrays that are big-endian or have fields")

    def _persistent(self) -> None:
        if self.persistent_load is None:
            raise InputError("refers to data outside of the pickle, which this format does not do")
        self.stack.append(self.persistent_load(self._pop()))

    _STEPS = {
        op.MARK: _mark,
        op.POP: lambda self: self.stack.pop() if self.stack else self._pop_mark(),
        op.POP_MARK: _pop_mark,
        op.DUP: lambda self: self.stack.append(self._finished(self.stack[-1])),
        op.APPEND: _append,
        op.APPENDS: _appends,
        op.SETITEM: _set_item,
        op.SETITEMS: _set_items,
        op.ADDITEMS: _add_items,
        op.LIST: _new_list,
        op.DICT: _new_dict,
        op.FROZENSET: _new_set,
        op.TUPLE: _new_tuple,
        op.GLOBAL: _global,
        op.STACK_GLOBAL: _stack_global,
        op.REDUCE: _reduce,
        op.NEWOBJ: _new_object,
        op.NEWOBJ_EX: _new_object_with_keywords,
        op.INST: _instance,
        op.BUILD: _build,
        op.BINPERSID: _persistent,
    }
