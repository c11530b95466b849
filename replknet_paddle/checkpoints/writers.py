"""Writing weights to files that other programs read.

The `safetensors` library reads what is written here but does not write it. It would write a
transposed array with its values in the wrong order, put several metadata entries in another
order in every process (so equal runs would differ in bytes), give files mode 0600, leave its
own temporary file behind when it is killed, and report a full disk without its errno.
"""

import json
import os
import pickle
from collections.abc import Mapping

import numpy as np

from replknet_paddle.runtime.files import atomic_file

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

    with atomic_file(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            file.write(np.require(value, value.dtype.newbyteorder("<"), ["C"]).data)


def write_pdparams(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as `paddle.save` writes a state dict, for `paddle.load`.

    Raises:
        OSError: it cannot be written.
    """
    state = {name: np.ascontiguousarray(value) for name, value in tensors.items()}

    with atomic_file(path, "wb") as file:
        pickler = pickle.Pickler(file, protocol=4)
        pickler.fast = True  # no memo, which would keep a copy of every tensor
        pickler.dump(state)
