"""Reading checkpoint files as plain data: numpy arrays in dictionaries, and no code is executed.

Four formats, told apart by their first bytes:

- PyTorch's zip archive: `data.pkl`, whose tensors refer to one archive member per storage;
- PyTorch's older file: five pickles in a row, then the storages;
- Paddle's `.pdparams` and `.pdopt`: one pickle with the arrays inside it;
- safetensors: a JSON header, then the arrays.

The file is memory-mapped and the arrays are read-only views of it, so that reading takes next to
no memory of its own and tensors come off the disk when they are used. Exceptions: bfloat16, which
numpy lacks, is widened to float32, and arrays in pickles of protocol 2 have to be decoded.
"""

import json
import math
import os
import pickle as op
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from replknet_paddle.checkpoints.unpickle import (
    DTYPES,
    PLAIN_GLOBALS,
    Global,
    MappedFile,
    Unpickler,
    checked_key,
    checked_sizes,
    shown,
    table,
)
from replknet_paddle.runtime.errors import InputError

BFLOAT16 = "bfloat16"  # stands where a numpy type would, if numpy had it

_FORMATS = "PyTorch (.pth, .pt), Paddle (.pdparams, .pdopt) and safetensors files"

# What people save by mistake under a checkpoint's name.
_KNOWN_STRANGERS = {
    b"<": "a web page; the download needs a confirmation or a login in a browser",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes",
}

# What damaged bytes raise on their way through the parsers below. A defect of this module would
# hide here too, but the parsers' tests run on whole files, which have to come back equal.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a checkpoint file, as plain data.

    Args:
        path: a file in one of the formats above; its suffix does not matter.

    Returns:
        What was saved, usually nested dictionaries. Tensors are read-only numpy arrays of their
        own type (bfloat16: float32). Objects such as `argparse.Namespace` are dictionaries of
        their attributes, numpy scalars are Python numbers. A safetensors file gives name ->
        array; its metadata are read with `read_safetensors_metadata`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: the file is none of these, damaged, would need more than about twice its size
            in memory, or asks for something that is not data. The message names the file.
    """
    return _read(path, _read_any)


def read_safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The free-form text entries of a safetensors file's header ({} if it has none).

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: it is not a safetensors file, or damaged.
    """

    def read(file: MappedFile) -> dict[str, str]:
        if not _is_safetensors(file):
            raise InputError("is not a safetensors file")
        return _safetensors_header(file)[1]

    return _read(path, read)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether the file begins as safetensors files do. Raises as `read_checkpoint`."""
    return _read(path, _is_safetensors)


def _read(path: str | os.PathLike, reader: Callable[[MappedFile], Any]) -> Any:
    """`reader`'s result; whatever goes wrong becomes an InputError which names the file."""
    path = Path(path)
    try:
        return reader(MappedFile(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except _DAMAGE as error:
        detail = f"{type(error).__name__}: {error!s:.120}"
        raise InputError(f"{path}: is damaged ({detail}); copy or download it again") from error


def _read_any(file: MappedFile) -> Any:
    head = bytes(file.view(0, min(file.size, 64)))
    if _is_safetensors(file):
        return _read_safetensors(file)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch_zip(file)
    if head[:1] == op.PROTO and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        # PyTorch's magic number comes first, as a pickle of its own.
        return _read_torch_legacy(file) if _TORCH_MAGIC in head else _read_paddle(file)
    for start, what in _KNOWN_STRANGERS.items():
        if head.lstrip().startswith(start):
            raise InputError(f"is not a checkpoint but {what}")
    raise InputError(f"is in no format that is known ({_FORMATS}); it begins with {head[:8]!r}")


# ---- safetensors

_SAFETENSORS_DTYPES = {
    "BOOL": DTYPES["b1"],
    **{f"U{8 * size}": DTYPES[f"u{size}"] for size in (1, 2, 4, 8)},
    **{f"I{8 * size}": DTYPES[f"i{size}"] for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": DTYPES[f"f{size}"] for size in (2, 4, 8)},
    "BF16": BFLOAT16,
}


def _is_safetensors(file: MappedFile) -> bool:
    if file.size < 10:
        return False
    (length,) = file.unpack("<Q", 0)
    return length <= file.size - 8 and bytes(file.view(8, 1)) == b"{"


def _safetensors_header(file: MappedFile) -> tuple[dict[str, Any], dict[str, str], int]:
    """(tensor entries, metadata, where the data begin)."""
    (length,) = file.unpack("<Q", 0)
    file.spend(24 * length)  # Python objects against the JSON text they come from
    header = json.loads(bytes(file.view(8, length)))
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise InputError("has metadata that are not text")
    return header, metadata, 8 + length


def _read_safetensors(file: MappedFile) -> dict[str, np.ndarray]:
    entries, _, data_start = _safetensors_header(file)
    tensors, expected = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        kind = entry["dtype"]
        if kind not in _SAFETENSORS_DTYPES:
            raise InputError(f"tensor {shown(name)} is of type {shown(kind)}, which is not read")
        dtype = _SAFETENSORS_DTYPES[kind]
        shape = checked_sizes(tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        # The format allows neither gaps nor overlaps, so every byte belongs to one tensor.
        if begin != expected or end - begin != math.prod(shape) * _itemsize(dtype):
            raise InputError(
                f"tensor {shown(name)} of shape {shown(shape)} does not fit its bytes "
                f"{begin}..{end}; copy or download the file again"
            )
        tensors[name] = _vector(file, dtype, data_start + begin, math.prod(shape)).reshape(shape)
        expected = end
    if data_start + expected != file.size:
        raise InputError(
            f"has {file.size} bytes where its header says {data_start + expected}; "
            "copy or download it again"
        )
    return {name: tensors[name] for name in entries}


# ---- Paddle


def _named_tensor(file: MappedFile, items=()) -> object:
    """`tuple((name, array))`: how Paddle pickles a tensor. The name is its internal one."""
    if type(items) is tuple and len(items) == 2 and isinstance(items[1], np.ndarray):
        return items[1]
    file.spend(16 * len(items))
    return tuple(items)


def _dense_tensor(file: MappedFile, *arguments) -> np.ndarray:
    """`eval('data', {'data': array})`: how Paddle pickles a DenseTensor. Nothing else passes."""
    match arguments:
        case "data", {"data": np.ndarray() as array, **others} if not others:
            return array
    raise InputError(
        "asks for Python's 'eval', which would run code that the file chose. Nothing was run; do "
        "not load this file with another program either"
    )


_PADDLE_GLOBALS = PLAIN_GLOBALS | table(
    *((f"{module}.tuple", _named_tensor) for module in ("builtins", "__builtin__")),
    *((f"{module}.eval", _dense_tensor) for module in ("builtins", "__builtin__")),
)

_SLICES_KEY = "UnpackBigParamInfor@@"


def _read_paddle(file: MappedFile) -> Any:
    unpickler = Unpickler(file, 0, _PADDLE_GLOBALS)
    content = unpickler.load()
    if unpickler.position != file.size:
        raise InputError(
            f"has {file.size - unpickler.position} bytes after its end: it is not one of {_FORMATS}"
        )
    if isinstance(content, dict) and _SLICES_KEY in content:
        _join_slices(file, content)
    return content


def _join_slices(file: MappedFile, content: dict) -> None:
    """Puts together the arrays over 1 GiB, which Paddle splits for pickle protocols 2 and 3."""
    for name, parts in content.pop(_SLICES_KEY).items():
        shape = checked_sizes(tuple(parts["OriginShape"]))
        slices = [content.pop(checked_key(part)) for part in parts["slices"]]
        if sum(piece.size for piece in slices) != math.prod(shape):
            raise InputError(f"holds slices of {shown(name)} that do not make up {shown(shape)}")
        file.spend(sum(piece.nbytes for piece in slices))
        content[name] = np.concatenate(slices).reshape(shape)


# ---- PyTorch

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

_TORCH_DTYPES = {
    "float32": DTYPES["f4"],
    "float64": DTYPES["f8"],
    "float16": DTYPES["f2"],
    "bfloat16": BFLOAT16,
    "uint8": DTYPES["u1"],
    "int8": DTYPES["i1"],
    "int16": DTYPES["i2"],
    "int32": DTYPES["i4"],
    "int64": DTYPES["i8"],
    "bool": DTYPES["b1"],
}

_STORAGE_DTYPES = {
    "torch.FloatStorage": _TORCH_DTYPES["float32"],
    "torch.DoubleStorage": _TORCH_DTYPES["float64"],
    "torch.HalfStorage": _TORCH_DTYPES["float16"],
    "torch.BFloat16Storage": BFLOAT16,
    "torch.ByteStorage": _TORCH_DTYPES["uint8"],
    "torch.CharStorage": _TORCH_DTYPES["int8"],
    "torch.ShortStorage": _TORCH_DTYPES["int16"],
    "torch.IntStorage": _TORCH_DTYPES["int32"],
    "torch.LongStorage": _TORCH_DTYPES["int64"],
    "torch.BoolStorage": _TORCH_DTYPES["bool"],
}


def _tensor(
    file: MappedFile, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None
) -> np.ndarray:
    """A tensor as a view of its storage; offset and strides count elements.

    Raises:
        InputError: it reaches beyond its storage or repeats it (a stride of 0 turns one element
            into as many as the file likes).
    """
    size, stride = checked_sizes(size), checked_sizes(stride)
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or len(size) != len(stride):
        raise InputError("holds a tensor without a storage")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    fits = count == 0 or (count <= storage.size and last < storage.size)
    if type(offset) is not int or offset < 0 or not fits:
        raise InputError(
            f"holds a tensor of shape {shown(size)}, strides {shown(stride)} and offset "
            f"{shown(offset)}, which does not fit its storage of {storage.size} elements"
        )
    file.spend(count * storage.itemsize)
    if count == 0:
        return np.empty(size, storage.dtype)
    step_bytes = tuple(step * storage.itemsize for step in stride)
    return np.ndarray(size, storage.dtype, storage, offset * storage.itemsize, step_bytes)


def _parameter(file: MappedFile, data, requires_grad=True, hooks=None) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise InputError("holds a parameter without a tensor")
    return data


def _size(file: MappedFile, sizes=()) -> tuple:
    return checked_sizes(sizes)


def _device(file: MappedFile, kind="cpu", index=None) -> str:
    return f"{kind:.20}" if index is None else f"{kind:.20}:{index:d}"


_TORCH_GLOBALS = PLAIN_GLOBALS | table(
    ("torch._utils._rebuild_tensor", _tensor),
    ("torch._utils._rebuild_tensor_v2", _tensor),
    ("torch._utils._rebuild_parameter", _parameter),
    ("torch.Size", _size),
    ("torch.device", _device),
    *((f"torch.{name}", None) for name in _TORCH_DTYPES),
    *((name, None) for name in _STORAGE_DTYPES),
)


def _reference(reference: object) -> tuple[str | int, object, int, object]:
    """(key, dtype, elements, part) of a persistent id, the reference to a storage.

    Its layout: ('storage', type, key, device, elements), and in older files a sixth entry, `part`:
    None or (key, first element, elements) of the part meant.
    """
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise InputError(f"refers to {shown(reference)}, which is not a tensor's storage")
    _, kind, key, _, count = reference[:5]
    dtype = _STORAGE_DTYPES.get(kind.name) if isinstance(kind, Global) else None
    if dtype is None or type(key) not in (str, int) or type(count) is not int or count < 0:
        raise InputError(f"refers to the storage {shown(key)} of an unknown type or size")
    return key, dtype, count, reference[5] if len(reference) == 6 else None


def _read_torch_zip(file: MappedFile) -> Any:
    members = _zip_members(file)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InputError("is a zip archive, but not one that PyTorch wrote: it holds no data.pkl")
    folder = pickles[0][: -len("data.pkl")]
    order = members.get(f"{folder}byteorder")
    if order and bytes(file.view(*order)) != b"little":
        raise InputError("was written on a big-endian machine, which is not read")
    storages: dict[tuple, np.ndarray] = {}

    def storage(reference: object) -> np.ndarray:
        key, dtype, count, _ = _reference(reference)
        if (key, dtype) not in storages:
            start, length = members[f"{folder}data/{key}"]
            if count * _itemsize(dtype) > length:
                raise InputError(
                    f"holds {length} bytes for storage {shown(key)}, which needs {count} times "
                    f"{_itemsize(dtype)}; copy or download the file again"
                )
            storages[key, dtype] = _vector(file, dtype, start, count)
        return storages[key, dtype]

    start, _ = members[f"{folder}data.pkl"]
    return Unpickler(file, start, _TORCH_GLOBALS, storage).load()


def _zip_members(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, length) of each member of a zip archive without compression.

    Not the `zipfile` module's: that one tells neither where a member's data begin nor stops at
    a directory which needs many times its own size in memory.
    """
    end = file.rfind(b"PK\x05\x06", file.size - 65557)  # a comment after it has at most 65,535
    if end < 0:
        raise InputError("is a zip archive that was cut short; copy or download it again")
    count, _, at = file.unpack("<HII", end + 10)
    if end >= 20 and bytes(file.view(end - 20, 4)) == b"PK\x06\x07":  # zip64
        (end64,) = file.unpack("<Q", end - 20 + 8)
        count, _, at = file.unpack("<QQQ", end64 + 32)
    members = {}
    for _ in range(count):
        if bytes(file.view(at, 4)) != b"PK\x01\x02":
            raise InputError("is a zip archive with a broken directory; copy or download it again")
        flags, method = file.unpack("<HH", at + 8)
        packed, length, name_bytes, extra_bytes, comment_bytes = file.unpack("<IIHHH", at + 20)
        (header,) = file.unpack("<I", at + 42)
        file.spend(512 + name_bytes)
        name = str(file.view(at + 46, name_bytes), "utf-8")
        # Numbers that need more than 32 bits follow in an extra field, in this order.
        wide = _zip64_numbers(file, at + 46 + name_bytes, extra_bytes)
        length = wide.pop(0) if length == 0xFFFFFFFF else length
        packed = wide.pop(0) if packed == 0xFFFFFFFF else packed
        header = wide.pop(0) if header == 0xFFFFFFFF else header
        if method != zipfile.ZIP_STORED or flags & 1 or packed != length:
            raise InputError(
                f"is a zip archive whose member {shown(name)} is compressed or encrypted, which "
                "PyTorch does not do; save it again with torch.save"
            )
        if bytes(file.view(header, 4)) != b"PK\x03\x04":
            raise InputError("is a zip archive with a broken directory; copy or download it again")
        start = header + 30 + sum(file.unpack("<HH", header + 26))
        file.view(start, length)
        if name in members:
            raise InputError(f"is a zip archive with two members {shown(name)}")
        members[name] = (start, length)
        at += 46 + name_bytes + extra_bytes + comment_bytes
    return members


def _zip64_numbers(file: MappedFile, at: int, length: int) -> list[int]:
    end = at + length
    while at + 4 <= end:
        kind, size = file.unpack("<HH", at)
        if kind == 1:
            return list(file.unpack(f"<{size // 8}Q", at + 4))
        at += 4 + size
    return []


def _read_torch_legacy(file: MappedFile) -> Any:
    """The file before PyTorch 1.6: magic number, protocol, system, content, storage keys, storages.

    The storages follow the pickle that refers to them, so it is read twice: first to learn the
    storages' types, with any bytes in their place, then for its content.
    """
    position = 0

    def next_pickle(persistent_load=None):
        nonlocal position
        unpickler = Unpickler(file, position, _TORCH_GLOBALS, persistent_load)
        value = unpickler.load()
        position = unpickler.position
        return value

    _, version, system = next_pickle(), next_pickle(), next_pickle()
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError("is a PyTorch file of a version or byte order that is not read")

    kinds: dict[object, tuple[object, int]] = {}

    def note(reference: object) -> np.ndarray:
        key, dtype, count, part = _reference(reference)
        if kinds.setdefault(key, (dtype, count)) != (dtype, count):
            raise InputError(f"describes storage {shown(key)} in two ways")
        return _part(_vector(file, DTYPES["u1"], 0, count), part)

    content_start = position
    next_pickle(note)
    keys = next_pickle()
    storages = {}
    for key in keys:
        dtype, count = kinds[checked_key(key)]
        (announced,) = file.unpack("<q", position)
        if announced != count or key in storages:
            raise InputError(f"holds storage {shown(key)} with {announced} elements, not {count}")
        storages[key] = _vector(file, dtype, position + 8, count)
        position += 8 + count * _itemsize(dtype)

    def storage(reference: object) -> np.ndarray:
        key, _, _, part = _reference(reference)
        return _part(storages[key], part)

    return Unpickler(file, content_start, _TORCH_GLOBALS, storage).load()


def _part(storage: np.ndarray, part: object) -> np.ndarray:
    if part is None:
        return storage
    _, first, count = part
    if first < 0 or count < 0 or first + count > storage.size:
        raise InputError(f"refers to elements beyond the {storage.size} of a storage")
    return storage[first : first + count]


# ---- arrays from bytes of the file


def _itemsize(dtype: object) -> int:
    return 2 if dtype is BFLOAT16 else dtype.itemsize


def _vector(file: MappedFile, dtype: object, start: int, count: int) -> np.ndarray:
    """`count` numbers from byte `start` on: a view of the file, or float32 for bfloat16."""
    nbytes = count * _itemsize(dtype)
    raw = np.frombuffer(file.view(start, nbytes), DTYPES["u2"] if dtype is BFLOAT16 else dtype)
    if dtype is not BFLOAT16:
        return raw
    file.spend(2 * nbytes)
    widened = np.empty(count, np.uint32)
    # bfloat16 is the upper half of a float32.
    np.left_shift(raw, 16, out=widened, dtype=np.uint32)
    file.release(start, nbytes)
    widened.flags.writeable = False
    return widened.view(np.float32)
