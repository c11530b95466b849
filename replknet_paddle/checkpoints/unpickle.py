"""Reading a pickle as data: Python's own unpickler, which here has nothing to call.

`pickle.load` (and `paddle.load`, `torch.load` through it) looks up any function that a file
names and calls it with arguments from the file, so opening a file can run any program. Here
`find_class` looks nothing up: a name stays text, and calling it reaches an entry of a table, whose
functions build plain data: arrays, dictionaries, numbers. All other names are refused, and named
in the error.

Everything built is charged to the `MappedFile` it comes from, which allows about twice the file's
size in all, and large byte strings are views of the memory-mapped file, not copies.

The opcodes are those of `pickle._Unpickler`, which is `pickle.Unpickler` in Python and has been the
same from Python 3.10 to 3.13. The one in C also has `find_class` and `persistent_load`, but some of
its opcodes need more care and cannot be replaced: LONG_BINPUT in a file of 9 bytes fills up to
64 GiB with zeros (index 2**26: 1 GiB, measured), a key made of nested tuples takes twice the time
to hash with every 5 bytes more (0.1 s for 127 bytes), and BUILD sets attributes of any object.
"""

import codecs
import math
import pickle as op  # for its opcodes and `_Unpickler`; `load` itself is used nowhere
from collections.abc import Callable
from struct import calcsize, unpack

import numpy as np

from replknet_paddle.checkpoints.mapped_file import DTYPES, MappedFile
from replknet_paddle.runtime.errors import InputError

# The largest object that one opcode makes is an empty set of 216 bytes; and its place on the stack.
_BYTES_PER_OPCODE = 256

# Longer strings stay in the file until something needs their content.
_LARGE_BYTES = 4 * 2**10


class Name(str):
    """The full name of a class or function that a pickle mentions; nothing is looked up."""


class Attributes(dict):
    """The attributes of an object such as `argparse.Namespace`, as a dictionary."""


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
    build = PLAIN_GLOBALS.get(cls) if isinstance(cls, Name) else None
    if build not in (_attributes, _mapping) or state is not None:
        raise InputError("holds an object of a form that is not known")
    return build(file)


def _set(file: MappedFile, items=()) -> set:
    return {checked_key(item) for item in _counted(file, items)}


def _counted(file: MappedFile, items):
    """`items`, charged for the copy that is about to be made of them."""
    file.spend(_BYTES_PER_OPCODE * len(items))
    return items


def _bytes(file: MappedFile, text="", encoding="latin1") -> bytes:
    """`bytes` and `_codecs.encode`: how protocol 2 writes byte strings."""
    if isinstance(text, str) and encoding == "latin1":
        file.spend(len(text))
        return text.encode("latin1")
    if isinstance(text, bytes) and encoding == "latin1":  # by `Unpickler.load_text`
        return text
    raise InputError(f"encodes text as {shown(encoding)}; only bytes in latin1 are known")


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
    if isinstance(data, str):  # a short string of Python 2, which had one type for text and bytes
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
    """`key` if it may be one, that is, if it is flat."""
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


# What a pickle may mention -> what builds it; None: it may be mentioned, as a type is, not called.
# Both names of a thing that moved: Python 2 and 3 (protocol 2 writes Python 2's), numpy 1 and 2.
PLAIN_GLOBALS: dict[str, Callable | None] = {
    'collections.OrderedDict': _mapping,
    'collections.Counter': _mapping,
    'collections.defaultdict': _default_dict,
    'argparse.Namespace': _attributes,
    'types.SimpleNamespace': _attributes,
    'copyreg._reconstructor': _reconstructed,
    'copy_reg._reconstructor': _reconstructed,
    '_codecs.encode': _bytes,
    **{f'{module}.{name}': None for module in ('builtins', '__builtin__')
       for name in ('object', 'dict', 'list', 'int', 'float', 'str', 'bool')},
    **{f'{module}.{name}': build for module in ('builtins', '__builtin__')
       for name, build in (('set', _set), ('frozenset', _set), ('bytes', _bytes))},
    'numpy.ndarray': None,
    'numpy.dtype': _dtype,
    **{f'numpy.{core}.{name}': build for core in ('core', '_core')
       for name, build in (
           ('multiarray._reconstruct', _late_array),
           ('multiarray.scalar', _scalar),
           ('numeric._frombuffer', _array),
       )},
}  # fmt: skip


class _Stream:
    """The file as the unpickler reads it, from a position on."""

    def __init__(self, file: MappedFile, position: int):
        self.file = file
        self.position = position

    def read(self, length: int) -> bytes | memoryview:
        view = self.file.view(self.position, length)
        self.position += length
        return view if length > _LARGE_BYTES else bytes(view)

    def readline(self) -> bytes:
        end = self.file.find(b"\n", self.position)
        if end < 0 or end - self.position > 1000:
            raise InputError("holds a name without an end")
        return self.read(end + 1 - self.position)


class _Memo(dict):
    """What later parts of the pickle refer to."""

    def __getitem__(self, index: int) -> object:
        value = super().__getitem__(index)
        if not isinstance(value, _LateArray):
            return value
        if value.value is None:
            raise InputError("uses a numpy array before its content is known")
        return value.value


class _Steps(dict):
    """Opcode -> method; each use is charged."""

    def __init__(self, file: MappedFile):
        super().__init__(_STEPS)
        self.file = file

    def __getitem__(self, opcode: int) -> Callable:
        self.file.spend(_BYTES_PER_OPCODE)
        if opcode not in self:
            raise InputError(
                f"uses pickle opcode {bytes([opcode])}, which no known program writes into a "
                "checkpoint"
            )
        return super().__getitem__(opcode)


class Unpickler(op._Unpickler):
    """Reads one pickle of protocol 2 to 5.

    Containers come back as dict, list, tuple and set; byte strings over 4 KiB as read-only
    views of the file; arrays as read-only numpy arrays; names of classes as text.

    Args:
        file: where the pickle is.
        start: the byte it begins at.
        known: name -> builder or None, for all that it may mention.
        persistent_load: makes the value of a persistent id (PyTorch: a reference to a tensor's
            storage). None: such references are refused.
    """

    def __init__(
        self,
        file: MappedFile,
        start: int,
        known: dict[str, Callable | None],
        persistent_load: Callable[[object], object] | None = None,
    ):
        self.file = file
        self.stream = _Stream(file, start)
        super().__init__(self.stream)
        self.memo = _Memo()
        self.dispatch = _Steps(file)
        self.known = known
        self.late_arrays: list[_LateArray] = []
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def load(self) -> object:
        """The pickle's value; `position` is then the byte after it.

        Raises:
            InputError: it names something that is not in the table, or needs too much memory.
            ValueError, TypeError, KeyError, IndexError and others: it is damaged. Callers turn
                these into InputError.
        """
        try:
            value = super().load()
        except op.UnpicklingError as error:
            raise ValueError(error) from None
        if any(array.value is None for array in self.late_arrays):
            raise InputError("uses a numpy array before its content is known")
        return value

    @property
    def position(self) -> int:
        return self.stream.position

    def find_class(self, module: str, name: str) -> Name:
        full_name = Name(f"{module}.{name}")
        if full_name not in self.known:
            raise InputError(
                f"asks for {shown(full_name)}, which is not plain data; the usual way of loading "
                "would run code that the file chose. Nothing was run. If you trust the author of "
                "the file, ask for one that holds the weights alone (a state dict)"
            )
        return full_name

    def persistent_load(self, reference: object) -> object:
        raise InputError("refers to data outside of the pickle, which this format does not do")

    # ---- opcodes that do something else than in Python's unpickler

    def load_reduce(self) -> None:
        """A call, or an object of a class: an entry of the table builds the value."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise InputError("calls something that is not a function")
        build = self.known[function]
        if build is None:
            raise InputError(f"makes a {function}, which is not plain data")
        value = build(self.file, *arguments)
        if isinstance(value, _LateArray):
            self.late_arrays.append(value)
        self.append(value)

    def load_build(self) -> None:
        """The state of the object on top; in a genuine pickle it was made just before."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _LateArray):
            if type(state) is not tuple or len(state) not in (4, 5):
                raise InputError("holds a numpy array of a form that is not known")
            shape, dtype, fortran, data = state[-4:]
            target.value = _array(self.file, data, dtype, shape, "F" if fortran else "C")
            self.stack[-1] = target.value
        elif isinstance(target, np.dtype):
            plain = type(state) is tuple and len(state) >= 5 and state[2:5] == (None, None, None)
            if not plain or state[1] not in ("<", "|", "="):
                raise InputError("holds numpy arrays that are big-endian or have fields")
        elif isinstance(target, Attributes) and isinstance(state, dict):
            target.update(state)
        elif not (type(target) is dict and isinstance(state, dict)):
            # On an ordered dict the state is PyTorch's `_metadata`: versions of its layers.
            raise InputError(f"sets the state of a {type(target).__name__}")

    def load_text(self, layout: str) -> None:
        (length,) = unpack(layout, self.read(calcsize(layout)))
        raw = self.read(length)
        if length > _LARGE_BYTES and self._is_top("_codecs.encode"):
            # Bytes that protocol 2 disguises as text, for want of an opcode. As text they would
            # stay in the memo, next to the bytes. (Short ones are text: Python shares its strings
            # of one character, so a key of that name may refer to the memo.)
            self.file.spend(length)
            decoder = codecs.getincrementaldecoder("utf-8")()
            parts = [
                decoder.decode(raw[at : at + 2**20], at + 2**20 >= length).encode("latin1")
                for at in range(0, length, 2**20)
            ]
            self.append(b"".join(parts))
            self.file.release(self.position - length, length)
        else:
            self.file.spend(4 * length)
            self.append(str(raw, "utf-8", "surrogatepass"))

    def _is_top(self, name: str) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1], Name) and self.stack[-1] == name

    def _decode_string(self, value: bytes | memoryview) -> str | memoryview:
        """Python 2's only type of strings: text if it is short, else an array's content."""
        return value if len(value) > _LARGE_BYTES else str(value, "latin1")


def _with_checked_keys(opcode: bytes, keys: slice) -> Callable:
    """Python's method for an opcode that hashes these values of the stack."""
    step = op._Unpickler.dispatch[opcode[0]]

    def load(self: Unpickler) -> None:
        for key in self.stack[keys]:
            checked_key(key)
        step(self)

    return load


_PYTHONS_OWN = b"".join(
    (
        op.PROTO, op.STOP, op.MARK, op.POP, op.POP_MARK, op.NONE, op.NEWTRUE, op.NEWFALSE,
        op.BININT, op.BININT1, op.BININT2, op.LONG1, op.LONG4, op.BINFLOAT, op.BINBYTES,
        op.SHORT_BINBYTES, op.BINBYTES8, op.BINSTRING, op.SHORT_BINSTRING, op.SHORT_BINUNICODE,
        op.EMPTY_LIST, op.EMPTY_DICT, op.EMPTY_SET, op.EMPTY_TUPLE, op.TUPLE, op.TUPLE1, op.TUPLE2,
        op.TUPLE3, op.LIST, op.APPEND, op.APPENDS, op.BINPUT, op.LONG_BINPUT, op.MEMOIZE, op.BINGET,
        op.LONG_BINGET, op.GLOBAL, op.STACK_GLOBAL, op.INST, op.BINPERSID,
    )
)  # fmt: skip

# What is left out, Python writes in protocols 0 and 1 or for extensions and buffers elsewhere.
_STEPS: dict[int, Callable] = {
    **{code: op._Unpickler.dispatch[code] for code in _PYTHONS_OWN},
    op.FRAME[0]: lambda self: self.read(8),  # a hint for readers of streams
    op.BYTEARRAY8[0]: op._Unpickler.load_binbytes8,
    op.BINUNICODE[0]: lambda self: self.load_text("<I"),
    op.BINUNICODE8[0]: lambda self: self.load_text("<Q"),
    op.SETITEM[0]: _with_checked_keys(op.SETITEM, slice(-2, -1)),
    op.SETITEMS[0]: _with_checked_keys(op.SETITEMS, slice(None, None, 2)),
    op.DICT[0]: _with_checked_keys(op.DICT, slice(None, None, 2)),
    op.ADDITEMS[0]: _with_checked_keys(op.ADDITEMS, slice(None)),
    op.FROZENSET[0]: _with_checked_keys(op.FROZENSET, slice(None)),
    op.REDUCE[0]: Unpickler.load_reduce,
    op.NEWOBJ[0]: Unpickler.load_reduce,
    op.BUILD[0]: Unpickler.load_build,
}
