"""Checkpoint files made by hand, byte by byte: what PyTorch and Paddle write, and attackers too.

The reference files in tests/fixtures come from the real programs; these need neither, are a
thousand times smaller, and can be wrong in any way a test asks for.
"""

import io
import json
import pickle
import struct
import zipfile
from collections import namedtuple

import numpy as np

# What a pickle holds besides plain values.
Name = namedtuple("Name", "module name")  # a class or function that it names
Call = namedtuple("Call", "function arguments")  # what the function returns
Made = namedtuple("Made", "cls state")  # an object of a class, and the state that it is given
Reference = namedtuple("Reference", "value")  # a persistent id


class Raw(bytes):
    """Opcodes as they are."""


def encode(value) -> bytes:
    """Opcodes of pickle protocol 2 for a value, without the frame around them."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, Name):
        return b"c" + f"{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return encode(value.function) + encode(value.arguments) + b"R"
    if isinstance(value, Made):
        return encode(value.cls) + b")\x81" + encode(value.state) + b"b"
    if isinstance(value, Reference):
        return encode(value.value) + b"Q"
    if value is None or isinstance(value, (bool, int, float, str)):
        return pickle.dumps(value, protocol=2)[2:-1]
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, dict):
        items = b"".join(encode(key) + encode(item) for key, item in value.items())
        return b"}(" + items + b"u"
    raise TypeError(type(value))


def pickled(value) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + encode(value) + b"."


def call(function: str, *arguments) -> Call:
    return Call(Name(*function.rsplit(".", 1)), arguments)


def opcodes(*parts) -> Raw:
    return Raw(b"".join(part if type(part) is bytes else encode(part) for part in parts))


TORCH_MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage", "u2": "BFloat16Storage"}


def tensor(array: np.ndarray, storage: str, **changes) -> Call:
    """A tensor as PyTorch pickles it, over the given storage; `changes` replace its parts.

    An array of u2 stands for bfloat16's bits.
    """
    parts = {
        "kind": Name("torch", STORAGES[array.dtype.str[1:]]),
        "key": storage,
        "numel": array.size,
        "offset": 0,
        "size": array.shape,
        "stride": tuple(step // array.itemsize for step in array.strides),
        "tail": (),
        **changes,
    }
    kind, key, numel, offset, size, stride, tail = parts.values()
    reference = Reference(("storage", kind, key, "cpu", numel, *tail))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", reference, offset, size, stride, False, hooks)


def torch_zip(
    content, storages: dict[str, np.ndarray], *, compress: bool = False, **members: bytes
) -> bytes:
    """A file of PyTorch 1.6 or later."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return buffer.getvalue()


def torch_legacy(content, storages: dict[str, np.ndarray], *, system=None, version=1001) -> bytes:
    """A file of PyTorch 1.5 or before."""
    system = system or {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    values = (TORCH_MAGIC, version, system, content, list(storages))
    parts = [pickled(value) for value in values]
    for array in storages.values():
        parts.append(struct.pack("<q", array.size) + array.tobytes())
    return b"".join(parts)


def safetensors(tensors: dict[str, np.ndarray], metadata: dict | None = None, **changes) -> bytes:
    """A safetensors file; `changes` replace the header's entries of a tensor."""
    header, position = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, array in tensors.items():
        kind = {"f4": "F32", "f2": "F16", "u2": "BF16", "i8": "I64"}[array.dtype.str[1:]]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    for name, entry in changes.items():
        header[name] = {**header.get(name, {}), **entry}
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    return struct.pack("<Q", len(text)) + text + data


def numbers(*shape: int, dtype: str = "f4", seed: int = 0) -> np.ndarray:
    """Small integers, which every type holds exactly."""
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def every_format() -> dict[str, bytes]:
    """One small file in each format, all with the tensors of `expected`."""
    a, b, c = (expected()[name] for name in "abc")
    content = {
        "model": {"a": tensor(a, "0"), "b": tensor(b, "1"), "c": tensor(c, "2")},
        "epoch": 7,
        "args": Made(Name("argparse", "Namespace"), {"lr": 0.5, "name": "x"}),
    }
    storages = {"0": a, "1": b, "2": c}
    plain = {"model": {"a": a, "b": b, "c": c}, "epoch": 7}
    return {
        "torch zip": torch_zip(content, storages, byteorder=b"little", version=b"3\n"),
        "torch legacy": torch_legacy(content, storages),
        **{f"paddle protocol {n}": pickle.dumps(plain, protocol=n) for n in (2, 3, 4, 5)},
        "safetensors": safetensors(
            {f"model.{name}": array for name, array in expected().items()}, {"format": "pt"}
        ),
    }


def expected() -> dict[str, np.ndarray]:
    return {
        "a": numbers(2, 3, seed=1),
        "b": numbers(4, dtype="f2", seed=2),
        "c": numbers(2, dtype="i8", seed=3),
    }
