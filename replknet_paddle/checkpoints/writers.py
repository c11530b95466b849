"""Writing weights to files that other programs read."""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

_SAFETENSORS_TYPES = {"f2": "F16", "f4": "F32", "f8": "F64", "i8": "I64", "i4": "I32"}
_ALIGNMENT_BYTES = 8


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write tensors as a safetensors file, one after the other, so that none is held twice.

    Args:
        path: the file; it appears, or replaces an older one, when it is whole.
        tensors: float16, float32, float64, int32 or int64 arrays by name.
        metadata: text for the file's header.

    Raises:
        OSError: it cannot be written.
    """
    header, position = {"__metadata__": dict(metadata)}, 0
    for name, value in tensors.items():
        kind = _SAFETENSORS_TYPES[value.dtype.str[1:]]
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [position, position + value.nbytes],
        }
        position += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.require(value, value.dtype.newbyteorder("<"), ["C"]).data)

    _replace(path, write)


def write_pdparams(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as `paddle.save` writes a state dict, for `paddle.load`.

    Raises:
        OSError: it cannot be written.
    """
    state = {name: np.ascontiguousarray(value) for name, value in tensors.items()}

    def write(file: BinaryIO) -> None:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # no memo, which would keep a copy of every tensor
        pickler.dump(state)

    _replace(path, write)


def _replace(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a file that takes the name `path` when it is complete."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
