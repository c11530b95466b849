"""Reading checkpoint files as plain data: numpy arrays in dictionaries, and no code is executed.

Four formats, recognized by their first bytes:

- PyTorch's zip archive: `data.pkl`, whose tensors refer to one archive member per storage;
- PyTorch's older file: five pickles in a row, then the storages;
- Paddle's `.pdparams` and `.pdopt`: one pickle with the arrays inside it;
- safetensors: a JSON header, then the arrays.

The file is memory-mapped and the arrays are read-only views of it, so that reading takes next to
no memory of its own and tensors come off the disk when they are used. Exceptions: bfloat16, which
numpy lacks, is widened to float32, and arrays in pickles of protocol 2 have to be decoded.

The `safetensors` library reads and checks the header of its format; the arrays are views here
too. The library's own arrays are copies beside its map of the file (2.0 times the file's size at
the peak, 1.0 as views), and its bfloat16 needs the package ml_dtypes.
"""

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from replknet_paddle.checkpoints.mapped_file import BFLOAT16, DTYPES, MappedFile, itemsize
from replknet_paddle.checkpoints.torch_files import (
    TORCH_MAGIC,
    read_torch_legacy,
    read_torch_zip,
)
from replknet_paddle.checkpoints.unpickle import (
    PLAIN_GLOBALS,
    Unpickler,
    checked_key,
    checked_sizes,
    shown,
)
from replknet_paddle.runtime.errors import InputError

_FORMATS = "PyTorch (.pth, .pt), Paddle (.pdparams, .pdopt) and safetensors files"

_PROTOCOL = b"\x80"  # first opcode of a pickle, before the number of its protocol

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
    SafetensorError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
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
        with _opened(file) as header:
            return header.metadata() or {}

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
        return read_torch_zip(file)
    if head[:1] == _PROTOCOL and head[1] in (2, 3, 4, 5):
        # PyTorch's magic number comes first, as a pickle of its own.
        return read_torch_legacy(file) if TORCH_MAGIC in head else _read_paddle(file)
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

# Bytes charged per byte of the header, for the library's objects: 21 were measured.
_HEADER_COST = 24


def _is_safetensors(file: MappedFile) -> bool:
    if file.size < 10:
        return False
    (length,) = file.unpack("<Q", 0)
    return length <= file.size - 8 and bytes(file.view(8, 1)) == b"{"


def _opened(file: MappedFile) -> safe_open:
    """The file, whose header the library checks: tensors in bounds, no gaps, no overlaps."""
    (length,) = file.unpack("<Q", 0)
    file.spend(_HEADER_COST * length)
    return safe_open(file.path, framework="numpy")


def _read_safetensors(file: MappedFile) -> dict[str, np.ndarray]:
    tensors = {}
    (length,) = file.unpack("<Q", 0)
    start = 8 + length
    with _opened(file) as header:
        for name in header.offset_keys():
            entry = header.get_slice(name)
            kind, shape = entry.get_dtype(), entry.get_shape()
            if kind not in _SAFETENSORS_DTYPES:
                raise InputError(f"tensor {shown(name)} is of type {kind}, which is not read")
            dtype, count = _SAFETENSORS_DTYPES[kind], math.prod(shape)
            tensors[name] = file.numbers(dtype, start, count).reshape(shape)
            start += count * itemsize(dtype)
    return tensors


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


_PADDLE_GLOBALS = {
    **PLAIN_GLOBALS,
    **{f"{module}.tuple": _named_tensor for module in ("builtins", "__builtin__")},
    **{f"{module}.eval": _dense_tensor for module in ("builtins", "__builtin__")},
}

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
