"""The record in the metadata of a training checkpoint, and the checksum over the whole file.

The metadata of the safetensors file has one entry of this project: a JSON object with the schema
version, a CRC-32 and the body, which is JSON again: the configuration, how far the run had come,
and the names of the classes.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import yaml

from replknet_paddle.checkpoints.readers import is_safetensors, read_safetensors_metadata
from replknet_paddle.runtime.errors import InputError

METADATA_KEY = "replknet_paddle"
CLASS_NAMES_KEY = "class_names"  # of files of weights alone; of training checkpoints, in the body
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Classes:
    """What a checkpoint says of its classes.

    Attributes:
        count: how many; None for a file of weights alone.
        names: one each, or None.
        names_file, model_type: DATA.CLASS_NAMES and MODEL.TYPE of the run that it is from.
    """

    count: int | None = None
    names: tuple[str, ...] | None = None
    names_file: str | None = None
    model_type: str | None = None

    def names_for(self, config) -> tuple[str, ...] | None:
        """The names, unless `config` names another file of class names than the run did."""
        given = config.DATA.CLASS_NAMES
        is_same = given is None or given == self.names_file
        return self.names if is_same or os.path.abspath(given) == self.names_file else None


def record_metadata(body: dict, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The metadata entry for a file of `tensors`."""
    text = json.dumps(body)
    record = {
        "schema_version": SCHEMA_VERSION,
        "crc32": checksum(text, tensors),
        "body": text,
    }
    return {METADATA_KEY: json.dumps(record)}


def read_body(path: str | os.PathLike) -> dict | None:
    """The body of a training checkpoint; None for any other file. Tensors are not read.

    Raises:
        InputError: damaged, or of another schema version.
    """
    record = _read_record(path)
    return None if record is None else _body_of(record, path)


def verified_body(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> dict | None:
    """As `read_body`, once the checksum has been compared with `tensors`, all of the file's.

    Raises:
        InputError: as `read_body`, or the file holds other bytes than were written.
    """
    record = _read_record(path)
    if record is None:
        return None
    body = _body_of(record, path)
    if record.get("crc32") != checksum(record["body"], tensors):
        raise InputError(f"{path} is damaged: what it holds is not what was written")
    return body


def read_classes(path: str | os.PathLike) -> Classes:
    """What a checkpoint file says of its classes; nothing for files of other programs."""
    if not os.path.isfile(path) or not is_safetensors(path):
        return Classes()
    body = read_body(path)
    try:
        if body is not None:
            names, config = body.get("class_names"), yaml.safe_load(body["config"])
            return Classes(
                config["MODEL"]["NUM_CLASSES"],
                None if names is None else tuple(names),
                config["DATA"].get("CLASS_NAMES"),
                config["MODEL"].get("TYPE"),
            )
        names = read_safetensors_metadata(path).get(CLASS_NAMES_KEY)
        return Classes(None, None if names is None else tuple(json.loads(names)))
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        raise _damaged(path) from None


def class_names_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata entry that hands the class names of a checkpoint on to a file made of it."""
    names = read_classes(path).names
    return {} if names is None else {CLASS_NAMES_KEY: json.dumps(names)}


def checksum(body: str, tensors: Mapping[str, np.ndarray]) -> int:
    """CRC-32 over metadata, names and bytes of all tensors: finds what the length does not show."""
    crc = zlib.crc32(f"{SCHEMA_VERSION} {body}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view("uint8"), crc)
    return crc


def _read_record(path: str | os.PathLike) -> dict | None:
    if not is_safetensors(path):
        return None
    text = read_safetensors_metadata(path).get(METADATA_KEY)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(record, dict):
        raise _damaged(path)
    return record


def _body_of(record: dict, path: str | os.PathLike) -> dict:
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version}; this program reads version {SCHEMA_VERSION}"
        )
    try:
        body = json.loads(record["body"])
    except (ValueError, TypeError, KeyError):
        raise _damaged(path) from None
    if not isinstance(body, dict):
        raise _damaged(path)
    return body


def _damaged(path: str | os.PathLike) -> InputError:
    return InputError(f"{path} is damaged: its metadata is not what training writes")
