"""Configuration: the defaults, YAML files over them, command-line flags over those.

`config_keys.py` is the table of keys. Everything wrong in a configuration is reported together, in
one `InputError`.
"""

import contextlib
import logging
import os
import reprlib
from collections.abc import Iterator
from typing import IO, Any

import yaml
from yacs.config import CfgNode

from replknet_paddle.config_keys import (
    CONTRADICTIONS,
    FIXED_KEYS,
    KEYS,
    SEGMENTATION_CONTRADICTIONS,
)
from replknet_paddle.runtime.errors import InputError, did_you_mean
from replknet_paddle.runtime.files import PROJECT_FOLDER, find_path, searched
from replknet_paddle.runtime.terminal import printable

CONFIG_FOLDER = PROJECT_FOLDER / "configs"
RANDOM = "random"  # MODEL.PRETRAINED of an evaluation that is meant to have no weights

MAX_PROBLEMS = 50  # that a message lists
MAX_FILES = 100  # that a file's BASE leads to; each may name many
MAX_NODES = 20_000  # of a YAML file, aliases written out; a palette of 1,000 colours has 4,000

# Values as messages show them: aliases make values of any size out of a few bytes.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 2, 20, 20, 10

_ALL_KEYS = KEYS | FIXED_KEYS
_SECTIONS = {key.rsplit(".", n)[0] for key in _ALL_KEYS for n in range(1, key.count(".") + 1)}

# Paths that may lie here or in the project.
_FOUND = ("DATA.DATA_PATH", "DATA.CLASS_NAMES", "MODEL.RESUME", "MODEL.PRETRAINED")

logger = logging.getLogger(__name__)


def _tree(values: dict[str, Any]) -> CfgNode:
    root = CfgNode()
    for key, value in values.items():
        node = root
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[leaf] = list(value) if isinstance(value, list) else value
    root.freeze()
    return root


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values of a tree; what stands in a section's place comes under its name."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # A misspelled section is gone into as well, for suggestions; no deeper than there are any.
        misspelled = name not in _ALL_KEYS and value and name.count(".") < 2
        if isinstance(value, dict) and (name in _SECTIONS or misspelled):
            yield from _leaves(value, name + ".")
        elif name not in _SECTIONS or value is not None:  # an empty section is fine
            yield name, value


class _Merged:
    """The values of all sources so far, a later one over an earlier one, and what is wrong."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.problems: list[str] = []
        self.without_effect: list[str] = []
        self.files = 0

    def set(self, key: str, value: Any, source: str) -> None:
        """Set one key, or note why it cannot be set."""
        if key in _SECTIONS:
            allowed = "a section with keys"
        elif key not in _ALL_KEYS:
            self.add(f"{source}: unknown key {printable(key[:200])}{_nearest(key)}")
            return
        else:
            default, rule = _ALL_KEYS[key]
            allowed = rule.allowed
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                value = rule.read(value)
                if key in KEYS:
                    self.values[key] = value
                elif value != default:
                    self.without_effect.append(f"{source}: {key} {value} (always {default})")
                return
        self.add(f"{source}: {key} is {_REPR.repr(value)}; allowed: {allowed}")

    def add(self, problem: str) -> None:
        """Note a problem; those after `MAX_PROBLEMS` are not looked for."""
        self.problems.append(problem)
        if len(self.problems) == MAX_PROBLEMS:
            raise InputError("\n".join([*self.problems, "and perhaps more"]))

    def set_all(self, overrides: dict[str, Any]) -> None:
        """Set keys that are given as arguments: MODEL__NUM_CLASSES."""
        for name, value in overrides.items():
            self.set(name.replace("__", "."), value, "argument")

    def checked(self, source: str) -> CfgNode:
        """Return the frozen configuration, or raise InputError with all that is wrong."""
        values = self.values
        if not self.problems:
            self.problems = [f"{source}: {text}" for text in _contradictions(values)]
        if self.problems:
            raise InputError("\n".join(self.problems))
        if self.without_effect:
            logger.warning("keys without effect: %s", ", ".join(self.without_effect))
        for key in _FOUND:
            if values[key] is not None:
                values[key] = find_path(values[key])
        return _tree(values)


def _contradictions(values: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of the rows that hold."""
    segmentation = values["MODEL.TYPE"] == "UPerNet"
    for keys, condition, text in CONTRADICTIONS + SEGMENTATION_CONTRADICTIONS * segmentation:
        of_keys = [values[key] for key in keys]
        found = condition(*of_keys)
        if found:
            text = text if "allowed" in text else f"{{key}} is {{0}}; allowed: {text}"
            yield text.format(*of_keys, key=keys[0], found=found)


def _nearest(key: str) -> str:
    leaf = key.upper().rsplit(".", 1)[-1]  # the right name under the wrong section?
    near = [known for known in KEYS if known.upper().rsplit(".", 1)[-1] == leaf]
    return did_you_mean(near[0] if near else key, KEYS)


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, which builds no objects; refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = set()
        for key in [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key in keys:
                message = f"{key} is given twice"
                raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)

    nodes = 0

    def compose_node(self, parent, index):
        before = self.nodes
        node = super().compose_node(parent, index)
        is_alias = hasattr(node, "size")
        self.nodes += node.size if is_alias else 1
        node.size = node.size if is_alias else self.nodes - before
        if self.nodes > MAX_NODES:
            message = f"it holds more than {MAX_NODES:,} values, aliases written out"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        return node


def read_yaml(source: str | IO) -> Any:
    """Return what a YAML text or file holds. YAMLError, ValueError, RecursionError: it is none."""
    return _ConfigLoader(source).get_single_data()


def _read_file(path: str, named_by: str) -> dict:
    """Return the tree of a YAML file; `named_by` says whose BASE it is, for messages."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = read_yaml(file)
    except FileNotFoundError:
        names = sorted(os.listdir(CONFIG_FOLDER))
        near = did_you_mean(os.path.basename(path), names, "configs/")
        hint = near or "; the ones here are in configs/"
        message = f"no config file {searched(path)}{named_by}{hint}"
        raise FileNotFoundError(message) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: e.g. 2024-02-30
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, (dict, type(None))):
        raise InputError(
            f"{path}: expected sections such as DATA, MODEL and TRAIN, got {type(tree).__name__}"
        )
    return tree or {}


def _merge_file(merged: _Merged, path: str, chain: tuple[str, ...] = ()) -> None:
    """Merge a YAML file, after the files that its BASE names (relative to itself)."""
    tree = _read_file(path, f" (a BASE of {chain[-1]})" if chain else "")
    here = os.path.realpath(path)
    if here in chain:
        raise InputError(f"{path}: BASE leads back to this file")
    merged.files += 1
    if merged.files > MAX_FILES:
        raise InputError(f"{path}: BASE leads to more than {MAX_FILES} files")
    bases = tree.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        merged.add(
            f"{path}: BASE is {_REPR.repr(bases)}; allowed: file names relative to this file"
        )
        bases = []
    for base in filter(None, bases):
        _merge_file(merged, os.path.join(os.path.dirname(path), base), chain + (here,))
    for key, value in _leaves(tree):
        merged.set(key, value, path)


def is_yaml(path: str | os.PathLike) -> bool:
    """Return whether a file is a configuration by its name."""
    return os.path.splitext(path)[1] in (".yaml", ".yml")


def get_config(cfg_file: str | os.PathLike[str] | None = None, **overrides: Any) -> CfgNode:
    """Return the configuration of a YAML file, or the defaults; frozen.

    Args:
        cfg_file: a file of configs/, of PaddleViT's, or `config.yaml` of a run folder. A relative
            path that does not exist here is looked up beside the project's configs/.
        overrides: keys over it, with two underscores for a dot: `MODEL__NUM_CLASSES=10`.

    Raises:
        FileNotFoundError: no such file, or no such BASE.
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    merged = _Merged({key: default for key, (default, _) in KEYS.items()})
    if cfg_file is not None:
        _merge_file(merged, find_path(str(cfg_file)))
    merged.set_all(overrides)
    return merged.checked(str(cfg_file or "defaults"))


def override(config: CfgNode, **overrides: Any) -> CfgNode:
    """Return `config` with keys changed, as in `get_config`: `MODEL__NUM_CLASSES=10`; frozen.

    Raises:
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    merged = _Merged(dict(_leaves(config)))
    merged.set_all(overrides)
    return merged.checked("configuration")


def check_class_count(config: CfgNode) -> None:
    """Raise InputError where MODEL.NUM_CLASSES is left to data that nothing here reads."""
    if config.MODEL.NUM_CLASSES is None:
        raise InputError(
            "MODEL.NUM_CLASSES is None, which only training and evaluation take from the data; "
            "give the number, e.g. -opts MODEL.NUM_CLASSES 5"
        )


def config_changes(before: str, after: str) -> list[str]:
    """Return the keys in which two dumped configurations differ, a line each; one that an older
    version did not know had its default."""
    defaults = {key: default for key, (default, _) in KEYS.items()}
    old, new = (defaults | dict(_leaves(read_yaml(text))) for text in (before, after))
    return [
        f"{key} is {_REPR.repr(new.get(key))}, was {_REPR.repr(old.get(key))}"
        for key in sorted((old.keys() | new.keys()) - FIXED_KEYS.keys())
        if old.get(key) != new.get(key)
    ]


# Flags of the command lines and the keys they set.
_FLAGS = {
    "dataset": ["DATA.DATASET"],
    "data_path": ["DATA.DATA_PATH"],
    "output": ["SAVE"],
    "batch_size": ["DATA.BATCH_SIZE", "DATA.BATCH_SIZE_EVAL"],
    "batch_size_eval": ["DATA.BATCH_SIZE_EVAL"],
    "image_size": ["DATA.IMAGE_SIZE"],
    "accum_iter": ["TRAIN.ACCUM_ITER"],
    "epochs": ["TRAIN.NUM_EPOCHS"],
    "lr": ["TRAIN.BASE_LR"],
    "seed": ["SEED"],
    "workers": ["DATA.NUM_WORKERS"],
    "pretrained": ["MODEL.PRETRAINED"],
    "resume": ["MODEL.RESUME"],
    "last_epoch": ["TRAIN.LAST_EPOCH"],
    "best_by": ["TRAIN.BEST_BY"],
    "freeze": ["TRAIN.FREEZE"],
    "patience": ["TRAIN.PATIENCE"],
    "eval": ["EVAL"],
    "amp": ["AMP"],
    "fold": ["DATA.FOLD"],
}


def update_config(config: CfgNode, args: object) -> CfgNode:
    """Return `config` with the command-line flags in `args` over it; frozen.

    Args:
        config: what `get_config` gave; stays as it is.
        args: attributes named as the flags are (None or False: not given); `opts` is a flat list
            of KEY VALUE pairs, which go last.

    Raises:
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    merged = _Merged(dict(_leaves(config)))
    for flag, keys in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            for key in keys:
                merged.set(key, value, f"-{flag}")
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        merged.add(f"-opts: {opts[-1]} has no value; give KEY VALUE pairs")
    for key, value in zip(opts[::2], opts[1::2]):
        merged.set(key, value, "-opts")
    return merged.checked(getattr(args, "cfg", None) or "configuration")
