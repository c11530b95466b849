"""Checkpoint files of all formats as plain data, and the writers of two; no code of a file is run.

Four formats are read, and recognized by their first bytes:

- PyTorch's zip archive: `data.pkl`, whose tensors refer to one archive member per storage;
- PyTorch's older file: five pickles in a row, then the storages;
- Paddle's `.pdparams` and `.pdopt`: one pickle with the arrays inside it;
- safetensors: a JSON header, then the arrays.

The file is opened once and memory-mapped. Arrays are views of the map, except bfloat16, which numpy
lacks and which is widened to float32, and the arrays inside Paddle's pickles. See `pickles` on why
no code of a file runs.
"""

import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from replknet_paddle.checkpoints.pickles import (
    BFLOAT16,
    DTYPES,
    Global,
    SourceFile,
    checked_sizes,
    known_globals,
    shown,
    unpickle,
)
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file

_HEADER_TIMES = 64  # JSON objects for each byte of a header
_DIRECTORY_TIMES = 16  # `zipfile`'s objects for each byte of a zip archive's directory

_FORMATS = "PyTorch (.pth, .pt), Paddle (.pdparams, .pdopt) and safetensors files"

# What people save by mistake under a checkpoint's name.
_KNOWN_STRANGERS = {
    b"<": "a web page; the download needs a confirmation or a login in a browser",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"\x89HDF": "an HDF5 file, as Keras writes",
}

_TORCH_CODES = dict(Float="f4", Double="f8", Half="f2", Byte="u1", Char="i1", Short="i2")
_TORCH_CODES |= dict(Int="i4", Long="i8", Bool="b1")
_STORAGES = {f"torch.{name}Storage": DTYPES[code] for name, code in _TORCH_CODES.items()}
_STORAGES["torch.BFloat16Storage"] = BFLOAT16
_SAFETENSORS_DTYPES = {
    **{f"{code[0].upper()}{8 * int(code[1])}": dtype for code, dtype in DTYPES.items()},
    "BOOL": DTYPES["b1"],  # so it has two names here, of which writers use the last
    "BF16": BFLOAT16,
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}


def read_file(path: str | os.PathLike) -> tuple[Any, dict[str, str]]:
    """Return the content of a checkpoint file as plain data, and a safetensors file's metadata.

    The content is usually nested dictionaries: tensors are numpy arrays of their own type, not to
    be written to; objects such as `argparse.Namespace` are dictionaries of their attributes, numpy
    scalars are Python numbers. A process that shortens the file while its arrays are in use ends
    this one with SIGBUS: programs that write checkpoints have to replace the old file, not to
    overwrite it.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: the file is in none of the formats above, is damaged, would take more than four
            times its size in memory, or asks for something that is not data.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file; docs/model_zoo.md lists the published ones"
        )
    if not path.is_file():
        raise InputError(f"{path}: is not a file; give the checkpoint file itself")
    try:
        with SourceFile(path) as file:
            return _read(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever damaged bytes raise on their way through the parsers
        detail = f"{type(error).__name__}: {error!s:.120}"
        raise InputError(f"{path}: is damaged ({detail}); copy or download it again") from error


def read_checkpoint(path: str | os.PathLike) -> Any:
    """Return the content of a checkpoint file as plain data; see `read_file`."""
    return read_file(path)[0]


def _read(file: SourceFile) -> tuple[Any, dict[str, str]]:
    head = bytes(file.view(0, min(file.size, 64)))
    if head[8:9] == b"{" and file.integer(0, 8) <= file.size - 8:
        return _read_safetensors(file)
    if head.startswith(b"PK\x03\x04"):
        return _read_torch_zip(file), {}
    if head[:1] == pickle.PROTO and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        # PyTorch's magic number comes first, as a pickle of its own.
        return (_read_torch_legacy if _TORCH_MAGIC in head else _read_paddle)(file), {}
    for start, what in _KNOWN_STRANGERS.items():
        if head.lstrip().startswith(start):
            raise InputError(f"is not a checkpoint but {what}")
    raise InputError(f"is in no format that is known ({_FORMATS}); it begins with {head[:8]!r}")


# ---- PyTorch

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


def _torch_globals(file: SourceFile) -> dict[str, object]:
    builders = {
        "torch._utils._rebuild_tensor": partial(_tensor, file),
        "torch._utils._rebuild_tensor_v2": partial(_tensor, file),
        "torch._utils._rebuild_parameter": _parameter,
        "torch.Size": checked_sizes,
        "torch.device": lambda kind, *index: ":".join([f"{kind:.20}", *map("{:d}".format, index)]),
        **{f"torch.{dtype}": None for dtype in ("bfloat16", *DTYPES.values())},
        **dict.fromkeys(_STORAGES),
    }
    return known_globals(file, builders)


def _parameter(data, requires_grad=True, hooks=None) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise InputError("holds a parameter without a tensor")
    return data


def _tensor(
    file: SourceFile, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None
) -> np.ndarray:
    """Return a tensor as a view of its storage, within which it must lie; offset and strides count
    elements. A stride of 0 would turn one element into as many as the file likes."""
    size, stride = checked_sizes(size), checked_sizes(stride)
    if type(storage) is not np.ndarray or storage.ndim != 1 or len(size) != len(stride):
        raise InputError("holds a tensor without a storage")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
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


def _reference(reference: object) -> tuple[str | int, np.dtype, int]:
    """Return (key, dtype, elements) of a persistent id, the reference to a storage: a tuple of
    'storage', type, key, device, elements, and in the older files None."""
    if type(reference) is not tuple or reference[:1] + reference[5:] not in (
        ("storage",),
        ("storage", None),
    ):
        raise InputError(f"refers to {shown(reference)}, which is not a tensor's storage")
    _, kind, key, _, count = reference[:5]
    dtype = _STORAGES.get(kind) if isinstance(kind, Global) else None
    if dtype is None or type(key) not in (str, int) or type(count) is not int or count < 0:
        raise InputError(f"refers to the storage {shown(key)} of an unknown type or size")
    return key, dtype, count


def _read_torch_zip(file: SourceFile) -> Any:
    members = _zip_members(file)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InputError("is a zip archive, but not one that PyTorch wrote: it holds no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{folder}byteorder")
    if order and bytes(file.view(*order)) != b"little":
        raise InputError("was written on a big-endian machine, which is not read")
    storages: dict[tuple, np.ndarray] = {}

    def storage(reference: object) -> np.ndarray:
        key, dtype, count = _reference(reference)
        if (key, dtype) not in storages:
            start, length = members[f"{folder}data/{key}"]
            if count * dtype.itemsize > length:
                raise InputError(
                    f"holds {length} bytes for storage {shown(key)}, which needs {count} times "
                    f"{dtype.itemsize}; copy or download the file again"
                )
            storages[key, dtype] = file.numbers(dtype, start, count)
        return storages[key, dtype]

    return unpickle(file, members[f"{folder}data.pkl"][0], _torch_globals(file), storage)


def _zip_members(file: SourceFile) -> dict[str, tuple[int, int]]:
    """Return (first byte, length) by the name of each member of an archive without compression."""
    file.times = _DIRECTORY_TIMES
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    file.times = 0
    members = {}
    for entry in entries:
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not is_plain or entry.compress_size != entry.file_size:
            raise InputError(
                f"is a zip archive whose member {shown(entry.filename)} is compressed or "
                "encrypted, which PyTorch does not do; save it again with torch.save"
            )
        # `zipfile` reads members but does not say where their bytes are.
        at = entry.header_offset
        start = at + 30 + file.integer(at + 26, 2) + file.integer(at + 28, 2)
        file.view(start, entry.file_size)
        if bytes(file.view(at, 4)) != b"PK\x03\x04" or entry.filename in members:
            raise InputError("is a zip archive with a broken directory; copy or download it again")
        members[entry.filename] = (start, entry.file_size)
    return members


def _read_torch_legacy(file: SourceFile) -> Any:
    """Return the content of a file from before PyTorch 1.6: magic number, protocol, system,
    content, storage keys, storages.

    The storages follow the pickle that refers to them, so it is read twice: first to learn the
    storages' types, with any bytes in their place, then for its content.
    """
    known = _torch_globals(file)
    _, version, system = (unpickle(file, file.tell() * (i > 0), known) for i in range(3))
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise InputError("is a PyTorch file of a version or byte order that is not read")

    kinds: dict[object, tuple[np.dtype, int]] = {}

    def note(reference: object) -> np.ndarray:
        key, dtype, count = _reference(reference)
        if kinds.setdefault(key, (dtype, count)) != (dtype, count):
            raise InputError(f"describes storage {shown(key)} in two ways")
        return file.numbers(DTYPES["u1"], 0, count)

    content_start = file.tell()
    unpickle(file, content_start, known, note)
    keys = unpickle(file, file.tell(), known)
    position = file.tell()
    storages = {}
    for key in keys:
        dtype, count = kinds[key]
        announced = file.integer(position, 8)
        if announced != count or key in storages:
            raise InputError(f"holds storage {shown(key)} with {announced} elements, not {count}")
        storages[key] = file.numbers(dtype, position + 8, count)
        position += 8 + count * dtype.itemsize

    return unpickle(
        file, content_start, known, lambda reference: storages[_reference(reference)[0]]
    )


# ---- Paddle


def _read_paddle(file: SourceFile) -> Any:
    builders = {}
    for module in ("builtins", "__builtin__"):  # Python 3 and 2
        builders |= {f"{module}.tuple": _named_tensor, f"{module}.eval": _dense_tensor}
    content = unpickle(file, 0, known_globals(file, builders))
    if file.tell() != file.size:
        raise InputError(
            f"has {file.size - file.tell()} bytes after its end: it is not one of {_FORMATS}"
        )
    return content


def _named_tensor(items) -> np.ndarray:
    """Return a tensor that Paddle pickled as `tuple((name, array))`, by its internal name."""
    if type(items) is tuple and len(items) == 2 and isinstance(items[1], np.ndarray):
        return items[1]
    raise InputError("makes a tuple that is not Paddle's of a tensor")


def _dense_tensor(*arguments) -> np.ndarray:
    """Return a DenseTensor, which Paddle pickles as `eval('data', {'data': array})`."""
    match arguments:
        case "data", {"data": np.ndarray() as array, **others} if not others:
            return array
    raise InputError(
        "asks for Python's 'eval', which would run code that the file chose. Nothing was run; do "
        "not load this file with another program either"
    )


# ---- safetensors


def _read_safetensors(file: SourceFile) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors, which have to lie one after another from the header to the end of the
    file, and the metadata."""
    length = file.integer(0, 8)
    file.spend(_HEADER_TIMES * length)
    header = json.loads(str(file.view(8, length), "utf-8"), object_pairs_hook=_without_twins)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("has metadata that are not texts by name")
    tensors, start = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise InputError(
                f"tensor {shown(name)} is of type {shown(entry['dtype'])}, which is not read"
            )
        shape = checked_sizes(tuple(entry["shape"]))
        count = math.prod(shape)
        end = start + count * dtype.itemsize
        if entry["data_offsets"] != [start - 8 - length, end - 8 - length]:
            raise InputError(
                f"holds tensor {shown(name)} of shape {shown(shape)} and type {entry['dtype']} "
                f"at {shown(tuple(entry['data_offsets']))}, which leaves a gap, overlaps, or does "
                "not fit; copy or download the file again"
            )
        tensors[name] = file.numbers(dtype, start, count).reshape(shape)
        start = end
    if start != file.size:
        raise InputError(f"has {file.size - start} bytes that belong to no tensor")
    return tensors, metadata


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise InputError("names something in its header twice")
    return dict(pairs)


# ---- writers


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write tensors as a safetensors file, one after the other, so that none is held twice.

    The library `safetensors` would write a transposed array with its values in the wrong order, and
    metadata in another order in every process, so that equal runs would differ in bytes.

    `tensors` are float16, float32, float64, int32 or int64. `path` appears, or replaces an older
    file, when it is whole.
    """
    header, position = {"__metadata__": dict(metadata)}, 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[value.dtype.newbyteorder("<")],
            "shape": list(value.shape),
            "data_offsets": [position, position + value.nbytes],
        }
        position += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers like aligned data
    with atomic_file(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.require(value, value.dtype.newbyteorder("<"), ["C"]).data)


def write_pdparams(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as `paddle.save` writes a state dict, for `paddle.load`."""
    state = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with atomic_file(path, "wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # no memo, which would keep a copy of every tensor
        pickler.dump(state)
