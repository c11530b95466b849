"""Reading PyTorch's two file formats, in which tensors refer to storages outside of the pickle.

Both give what was saved, as plain data; see `readers.read_checkpoint`.
"""

import io
import math
import zipfile
from typing import Any

import numpy as np

from replknet_paddle.checkpoints.mapped_file import BFLOAT16, DTYPES, MappedFile, itemsize
from replknet_paddle.checkpoints.unpickle import (
    PLAIN_GLOBALS,
    Name,
    Unpickler,
    checked_key,
    checked_sizes,
    shown,
)
from replknet_paddle.runtime.errors import InputError

# Bytes charged per byte of a zip archive's directory, for `zipfile`'s objects: 10 were measured.
_DIRECTORY_COST = 16

TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

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


_TORCH_GLOBALS = {
    **PLAIN_GLOBALS,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    **{f"torch.{name}": None for name in _TORCH_DTYPES},
    **dict.fromkeys(_STORAGE_DTYPES),
}


def _reference(reference: object) -> tuple[str | int, object, int, object]:
    """(key, dtype, elements, part) of a persistent id, the reference to a storage.

    Its layout: ('storage', type, key, device, elements), and in older files a sixth entry, `part`:
    None or (key, first element, elements) of the part meant.
    """
    if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
        raise InputError(f"refers to {shown(reference)}, which is not a tensor's storage")
    _, kind, key, _, count = reference[:5]
    dtype = _STORAGE_DTYPES.get(kind) if isinstance(kind, Name) else None
    if dtype is None or type(key) not in (str, int) or type(count) is not int or count < 0:
        raise InputError(f"refers to the storage {shown(key)} of an unknown type or size")
    return key, dtype, count, reference[5] if len(reference) == 6 else None


def read_torch_zip(file: MappedFile) -> Any:
    members = zip_members(file)
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
            if count * itemsize(dtype) > length:
                raise InputError(
                    f"holds {length} bytes for storage {shown(key)}, which needs {count} times "
                    f"{itemsize(dtype)}; copy or download the file again"
                )
            storages[key, dtype] = file.numbers(dtype, start, count)
        return storages[key, dtype]

    start, _ = members[f"{folder}data.pkl"]
    return Unpickler(file, start, _TORCH_GLOBALS, storage).load()


def zip_members(file: MappedFile) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, length) of each member of a zip archive without compression."""
    with _CountedFile(file) as counted, zipfile.ZipFile(counted) as archive:
        entries = archive.infolist()
    members = {}
    for entry in entries:
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not is_plain or entry.compress_size != entry.file_size:
            raise InputError(
                f"is a zip archive whose member {shown(entry.filename)} is compressed or "
                "encrypted, which PyTorch does not do; save it again with torch.save"
            )
        # `zipfile` reads members but does not say where their bytes are.
        signature, name_bytes, extra_bytes = file.unpack("<4s22xHH", entry.header_offset)
        start = entry.header_offset + 30 + name_bytes + extra_bytes
        file.view(start, entry.file_size)
        if signature != b"PK\x03\x04" or entry.filename in members:
            raise InputError("is a zip archive with a broken directory; copy or download it again")
        members[entry.filename] = (start, entry.file_size)
    return members


class _CountedFile(io.FileIO):
    """The file as `zipfile` reads it; what it builds of a directory is charged."""

    def __init__(self, file: MappedFile):
        super().__init__(file.path)
        self.file = file

    def read(self, size: int = -1) -> bytes:
        left = max(self.file.size - self.tell(), 0)
        size = left if size < 0 else min(size, left)
        self.file.spend(_DIRECTORY_COST * size)
        return super().read(size)


def read_torch_legacy(file: MappedFile) -> Any:
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
        return _part(file.numbers(DTYPES["u1"], 0, count), part)

    content_start = position
    next_pickle(note)
    keys = next_pickle()
    storages = {}
    for key in keys:
        dtype, count = kinds[checked_key(key)]
        (announced,) = file.unpack("<q", position)
        if announced != count or key in storages:
            raise InputError(f"holds storage {shown(key)} with {announced} elements, not {count}")
        storages[key] = file.numbers(dtype, position + 8, count)
        position += 8 + count * itemsize(dtype)

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
