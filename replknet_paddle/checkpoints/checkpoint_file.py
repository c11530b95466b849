"""A checkpoint file that is read once, and what it says of itself.

Every safetensors file that this program writes explains itself: its metadata hold the configuration
of the network, as YAML, and the names of the classes. A training checkpoint has all of it in one
entry: a JSON object with the schema version, a CRC-32 over the file, and the body, which is JSON
again: the configuration, how far the run had come, and the names.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from yacs.config import CfgNode

from replknet_paddle.checkpoints.files import read_file
from replknet_paddle.config import get_config, override, read_yaml
from replknet_paddle.runtime.errors import InputError

METADATA_KEY = "replknet_paddle"
SCHEMA_VERSION = 1

# Which weights of a checkpoint to take, and what messages call them.
WEIGHTS = {"model": "weights", "model_ema": "EMA weights"}

# What only concerns the start of a run. A resumed run has another start, and a checkpoint that is
# opened by its configuration must not be opened as the run's first weights were.
START_KEYS = (
    ("MODEL", "RESUME"),
    ("MODEL", "PRETRAINED"),
    ("MODEL", "PRETRAINED_WEIGHTS"),
    ("MODEL", "DROP_HEAD"),
    ("TRAIN", "LAST_EPOCH"),
)

_CONFIG_CHARACTERS = 2**16  # ten times what a configuration has; objects of YAML weigh much more


@dataclass(frozen=True)
class Classes:
    """What a checkpoint says of its classes; files of other programs say nothing."""

    count: int | None = None
    names: tuple[str, ...] | None = None  # one each
    names_file: str | None = None  # DATA.CLASS_NAMES of the run that it is from
    model_type: str | None = None  # MODEL.TYPE of that run

    def names_for(self, config) -> tuple[str, ...] | None:
        """Return the names, unless `config` names another file of class names than the run did, or
        has no classes."""
        if config.MODEL.NUM_CLASSES == 0:
            return None
        given = config.DATA.CLASS_NAMES
        is_same = given is None or self.names_file in (given, os.path.abspath(given))
        return self.names if is_same else None


class CheckpointFile:
    """A checkpoint file of any known format, read, parsed and verified once, whoever asks.

    `content` and `metadata` are those of `files.read_file`, and `body` is what a training
    checkpoint says besides its tensors, None for any other file. The checksum is compared in
    `parts`. InputError: the file cannot be read, or its metadata are damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.content, self.metadata = read_file(path)
        self.body = None
        if METADATA_KEY in self.metadata:
            with self._parsing():
                record = json.loads(self.metadata[METADATA_KEY])
                version = record["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{self.path} has schema version {version}; this program reads version "
                    f"{SCHEMA_VERSION}"
                )
            with self._parsing():
                self._crc, self._text = record["crc32"], record["body"]
                self.body = {**json.loads(self._text)}

    @contextlib.contextmanager
    def _parsing(self) -> Iterator[None]:
        """Give whatever wrong metadata raise on their way through the parsers one message."""
        try:
            yield
        except MemoryError:
            raise
        except Exception:
            raise self.damaged() from None

    @cached_property
    def parts(self) -> dict[str, dict[str, np.ndarray]] | None:
        """The tensors of a training checkpoint by part and name, once its checksum has been
        compared; None for any other file."""
        if self.body is None:
            return None
        if self._crc != checksum(self._text, self.content):
            raise InputError(f"{self.path} is damaged: what it holds is not what was written")
        parts: dict[str, dict] = {}
        for key, value in self.content.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = value
        return parts

    @cached_property
    def _settings(self) -> dict[str, object] | None:
        """The configuration as it was written, by the names of `override`; None: there is none."""
        text = (self.metadata if self.body is None else self.body).get("config")
        if text is None:
            return None
        with self._parsing():
            if len(text) > _CONFIG_CHARACTERS:
                raise ValueError
            return dict(_leaves(CfgNode({**read_yaml(text)})))

    @cached_property
    def config(self):
        """The configuration of the network, frozen; None where the file brings none. InputError:
        a key or value that this version does not know."""
        if self._settings is None:
            return None
        try:
            return override(get_config(), **self._settings)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    @cached_property
    def classes(self) -> Classes:
        """What the file says of its classes."""
        with self._parsing():
            if self.body is None:
                names = json.loads(self.metadata.get("class_names", "null"))
            else:
                names = self.body.get("class_names")
            if names is not None:
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise TypeError
                names = tuple(names)
                "".join(names).encode()  # not half of a character, which cannot be written
            said = (self._settings or {}).get
            count, *paths = map(said, ("MODEL__NUM_CLASSES", "DATA__CLASS_NAMES", "MODEL__TYPE"))
            is_count = count is None or type(count) is int and count >= 0
            if not is_count or not all(isinstance(path, (str, type(None))) for path in paths):
                raise TypeError
        return Classes(count, names, *paths)

    def ema_or_raw(self, weights: str) -> str:
        """Return which of 'model' and 'model_ema' to take.

        `weights` is one of these, or 'auto' for the ones that had the higher accuracy in the run's
        latest evaluation before the checkpoint: of RUN/best, those that made it the best. It is
        'model' for files without that record, and before the first evaluation.
        """
        if weights in WEIGHTS:
            return weights
        if weights != "auto":
            raise InputError(f"weights is {weights!r}; allowed: auto, {', '.join(WEIGHTS)}")
        progress = (self.body or {}).get("progress", {})
        better = progress.get("better_weights", "model") if isinstance(progress, dict) else None
        if better not in [*WEIGHTS]:
            raise self.damaged()
        return better

    def damaged(self) -> InputError:
        return InputError(f"{self.path} is damaged: its metadata is not what training writes")


def open_checkpoint(source: str | os.PathLike | CheckpointFile) -> CheckpointFile:
    """Return the checkpoint file at a path, or the one that is open already."""
    return source if isinstance(source, CheckpointFile) else CheckpointFile(source)


def config_text(config) -> str:
    """Return YAML of what a checkpoint or run folder says of its network: the configuration with
    absolute paths, and without the keys of `START_KEYS`, which have their defaults."""
    defaults = get_config()
    config = config.clone()
    config.defrost()
    config.SAVE = defaults.SAVE
    for key in ("DATA_PATH", "CLASS_NAMES"):  # to be found from any folder
        if config.DATA[key] is not None:
            config.DATA[key] = os.path.abspath(config.DATA[key])
    for section, key in START_KEYS:
        config[section][key] = defaults[section][key]
    return config.dump()


def weights_metadata(config, class_names) -> dict[str, str]:
    """Return the metadata by which a file of weights alone explains itself."""
    names = {} if class_names is None else {"class_names": json.dumps(class_names)}
    return {"config": config_text(config), **names}


def record_metadata(body: dict, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the metadata of a training checkpoint of `tensors`."""
    text = json.dumps(body)
    record = {"schema_version": SCHEMA_VERSION, "crc32": checksum(text, tensors), "body": text}
    return {METADATA_KEY: json.dumps(record)}


def checksum(body: str, tensors: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 over metadata, names and bytes of all tensors."""
    crc = zlib.crc32(f"{SCHEMA_VERSION} {body}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tensor.shape}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view("uint8"), crc)
    return crc


def _leaves(section: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, prefix + key + "__")
        else:
            yield prefix + key, value
