"""Configuration: the defaults, YAML files over them, command-line flags over those.

`config_keys.py` is the table of keys. Everything wrong in a configuration is reported together, in
one `InputError`.
"""

import difflib
import os
from typing import Any

import yaml
from yacs.config import CfgNode

from replknet_paddle.config_keys import KEYS
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import PROJECT_FOLDER, find_path, searched

CONFIG_FOLDER = PROJECT_FOLDER / "configs"

# Paths that may lie here or in the project.
_FOUND = ("DATA.DATA_PATH", "DATA.CLASS_NAMES", "MODEL.RESUME", "MODEL.PRETRAINED")


def _tree(values: dict[str, Any]) -> CfgNode:
    root = CfgNode()
    for key, value in values.items():
        node = root
        *parents, leaf = key.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = CfgNode()
            node = node[parent]
        node[leaf] = list(value) if isinstance(value, list) else value
    root.freeze()
    return root


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    values = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            values.update(_flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = value
    return values


def _set(values: dict[str, Any], key: str, value: Any, source: str, problems: list[str]) -> None:
    """Set one key, or add to `problems` why it cannot be set."""
    if key not in KEYS:
        problems.append(f"{source}: unknown key {key}{_nearest(key)}")
        return
    rule = KEYS[key][1]
    try:
        values[key] = rule.read(value)
    except (ValueError, TypeError, OverflowError):
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        problems.append(f"{source}: {key} is {shown}; allowed: {rule.allowed}")


def _nearest(key: str) -> str:
    by_upper = {known.upper(): known for known in KEYS}
    leaf = key.upper().rsplit(".", 1)[-1]  # the right name under the wrong section?
    near = [
        upper for upper in by_upper if upper.rsplit(".", 1)[-1] == leaf
    ] or difflib.get_close_matches(key.upper(), by_upper, n=1, cutoff=0.6)
    return f"; did you mean {by_upper[near[0]]}?" if near else ""


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, which builds no objects; refuses a key that is given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _merge_file(
    values: dict[str, Any], path: str, problems: list[str], chain: tuple[str, ...] = ()
) -> None:
    """Merge a YAML file, after the files that its BASE names (relative to itself)."""
    if os.path.realpath(path) in chain:
        raise InputError(f"{path}: BASE leads back to this file")
    try:
        with open(path, encoding="utf-8") as file:
            tree = _ConfigLoader(file).get_single_data()
    except FileNotFoundError:
        by = f" (a BASE of {chain[-1]})" if chain else ""
        raise FileNotFoundError(
            f"no config file {searched(path)}{by}{_configs_hint(path)}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: e.g. 2024-02-30
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: expected sections such as DATA, MODEL and TRAIN, got {type(tree).__name__}"
        )

    bases = tree.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        problems.append(f"{path}: BASE is {bases!r}; allowed: file names relative to this file")
        bases = []
    for base in bases:
        if base:
            _merge_file(
                values,
                os.path.join(os.path.dirname(path), base),
                problems,
                chain + (os.path.realpath(path),),
            )
    for key, value in _leaves(tree, path, problems):
        _set(values, key, value, path, problems)


def _leaves(tree: dict, path: str, problems: list[str], prefix: str = ""):
    """The keys and values of `tree`; what stands in the place of a section is a problem."""
    sections = {key.rsplit(".", n)[0] for key in KEYS for n in range(1, key.count(".") + 1)}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # A misspelled section is gone into as well, for suggestions; no deeper than there are any.
        misspelled = name not in KEYS and value and name.count(".") < 2
        if isinstance(value, dict) and (name in sections or misspelled):
            yield from _leaves(value, path, problems, name + ".")
        elif name not in sections:
            yield name, value
        elif value is not None:  # an empty section is fine
            problems.append(f"{path}: {name} is {value!r}; allowed: a section with keys")


def _configs_hint(path: str) -> str:
    names = sorted(os.listdir(CONFIG_FOLDER))
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    return f"; did you mean configs/{near[0]}?" if near else "; the ones here are in configs/"


def _contradictions(values: dict[str, Any]):
    """Values that are each legal and cannot go together."""
    sizes, small = values["MODEL.LARGE_KERNEL_SIZES"], values["MODEL.SMALL_KERNEL"]
    if any(size % 2 == 0 for size in sizes):
        yield f"MODEL.LARGE_KERNEL_SIZES is {sizes}; allowed: odd sizes, which keep the map size"
    if small is not None and (small % 2 == 0 or small > min(sizes)):
        yield (
            f"MODEL.SMALL_KERNEL is {small}; allowed: odd, at most the smallest of "
            f"MODEL.LARGE_KERNEL_SIZES ({min(sizes)}), or None"
        )
    for key in ("MODEL.DW_RATIO", "MODEL.FFN_RATIO"):
        if int(min(values["MODEL.CHANNELS"]) * values[key]) < 1:
            yield (
                f"{key} is {values[key]}; allowed: at least one channel in each stage of "
                f"MODEL.CHANNELS ({values['MODEL.CHANNELS']})"
            )
    yield from _segmentation_contradictions(values)
    stages = values["MODEL.OUT_INDICES"]
    if stages is not None and (not stages or len(set(stages)) < len(stages)):
        yield f"MODEL.OUT_INDICES is {stages}; allowed: distinct stages from 0 to 3, or None"
    if values["TRAIN.WARMUP_EPOCHS"] > values["TRAIN.NUM_EPOCHS"]:
        yield (
            f"TRAIN.WARMUP_EPOCHS is {values['TRAIN.WARMUP_EPOCHS']}; allowed: at most "
            f"TRAIN.NUM_EPOCHS ({values['TRAIN.NUM_EPOCHS']})"
        )
    if values["TRAIN.LAST_EPOCH"] >= values["TRAIN.NUM_EPOCHS"]:
        yield (
            f"TRAIN.LAST_EPOCH is {values['TRAIN.LAST_EPOCH']}; allowed: less than "
            f"TRAIN.NUM_EPOCHS ({values['TRAIN.NUM_EPOCHS']})"
        )
    for key in ("TRAIN.CROP_SCALE", "TRAIN.CROP_RATIO", "TRAIN.CUTMIX_MINMAX"):
        if values[key] is not None and values[key][0] > values[key][1]:
            yield f"{key} is {values[key]}; allowed: the smaller number first"
    if values["MODEL.RESUME"] is not None and values["EVAL"]:
        yield (
            "MODEL.RESUME goes with training, EVAL does not; allowed: MODEL.PRETRAINED names "
            "the weights to evaluate"
        )
    if values["MODEL.RESUME"] == "auto" and values["SAVE"] is None:
        yield "MODEL.RESUME is auto; allowed with a run folder to look in, SAVE (-output)"
    if values["EVAL"] and stages is not None and values["MODEL.TYPE"] != "UPerNet":
        yield "MODEL.OUT_INDICES makes a backbone without a head; allowed with EVAL: None"


def _segmentation_contradictions(values: dict[str, Any]):
    if values["MODEL.TYPE"] != "UPerNet":
        return
    if values["MODEL.OUT_INDICES"] != [0, 1, 2, 3]:
        yield (
            f"MODEL.OUT_INDICES is {values['MODEL.OUT_INDICES']}; allowed with MODEL.TYPE UPerNet: "
            "[0, 1, 2, 3]"
        )
    classes = values["MODEL.NUM_CLASSES"]
    if classes is None or not 2 <= classes <= 255:
        yield f"MODEL.NUM_CLASSES is {classes}; allowed with MODEL.TYPE UPerNet: 2 to 255"
    if values["TRAIN.LAYER_DECAY"] is not None:
        yield (
            f"TRAIN.LAYER_DECAY is {values['TRAIN.LAYER_DECAY']}; allowed with MODEL.TYPE UPerNet: "
            "None"
        )
    if values["TRAIN.WARMUP_EPOCHS"]:
        yield (
            f"TRAIN.WARMUP_EPOCHS is {values['TRAIN.WARMUP_EPOCHS']}; allowed with MODEL.TYPE "
            "UPerNet: 0; SEGMENTATION.WARMUP_STEPS sets the warm-up"
        )
    steps = values["TRAIN.NUM_EPOCHS"] * values["SEGMENTATION.EPOCH_STEPS"]
    if values["SEGMENTATION.WARMUP_STEPS"] > steps:
        yield (
            f"SEGMENTATION.WARMUP_STEPS is {values['SEGMENTATION.WARMUP_STEPS']}; allowed: at most "
            f"the {steps} steps of the run"
        )
    stride = values["SEGMENTATION.SLIDE_STRIDE"]
    if stride is not None and stride > values["DATA.IMAGE_SIZE"]:
        yield (
            f"SEGMENTATION.SLIDE_STRIDE is {stride}; allowed: at most DATA.IMAGE_SIZE "
            f"({values['DATA.IMAGE_SIZE']}), so that windows leave no gap"
        )
    if not values["SEGMENTATION.EVAL_RATIOS"]:
        yield "SEGMENTATION.EVAL_RATIOS is []; allowed: at least one ratio"
    colours = values["SEGMENTATION.PALETTE"]
    if colours is not None and len(colours.split()) != values["MODEL.NUM_CLASSES"]:
        yield (
            f"SEGMENTATION.PALETTE has {len(colours.split())} colours; allowed: one for each of "
            f"the {values['MODEL.NUM_CLASSES']} classes"
        )


def _checked(values: dict[str, Any], problems: list[str], source: str) -> CfgNode:
    if not problems:
        problems = [f"{source}: {problem}" for problem in _contradictions(values)]
    if problems:
        raise InputError("\n".join(problems))
    for key in _FOUND:
        if values[key] is not None:
            values[key] = find_path(values[key])
    return _tree(values)


def get_config(cfg_file: str | os.PathLike | None = None, **overrides: Any) -> CfgNode:
    """The configuration of a YAML file, or the defaults; frozen.

    Args:
        cfg_file: a file of configs/, of PaddleViT's, or `config.yaml` of a run folder. A relative
            path that does not exist here is looked up beside the project's configs/.
        overrides: keys over it, with two underscores for a dot: `MODEL__NUM_CLASSES=10`.

    Raises:
        FileNotFoundError: no such file, or no such BASE.
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    values = {key: default for key, (default, _) in KEYS.items()}
    problems: list[str] = []
    if cfg_file:
        _merge_file(values, find_path(str(cfg_file)), problems)
    _set_all(values, overrides, problems)
    return _checked(values, problems, str(cfg_file or "defaults"))


def override(config: CfgNode, **overrides: Any) -> CfgNode:
    """`config` with keys changed, as in `get_config`: `MODEL__NUM_CLASSES=10`; frozen.

    Raises:
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    values, problems = _flat(config), []
    _set_all(values, overrides, problems)
    return _checked(values, problems, "configuration")


def check_class_count(config: CfgNode) -> None:
    """Raise InputError where MODEL.NUM_CLASSES is left to data that nothing here reads."""
    if config.MODEL.NUM_CLASSES is None:
        raise InputError(
            "MODEL.NUM_CLASSES is None, which only training and evaluation take from the data; "
            "give the number, e.g. -opts MODEL.NUM_CLASSES 5"
        )


def _set_all(values: dict[str, Any], overrides: dict[str, Any], problems: list[str]) -> None:
    for name, value in overrides.items():
        _set(values, name.replace("__", "."), value, "argument", problems)


def config_changes(before: str, after: str) -> list[str]:
    """The keys in which two dumped configurations differ, a line each."""
    old, new = (_flat(CfgNode(yaml.safe_load(text))) for text in (before, after))
    return [
        f"{key} is {new.get(key)}, was {old.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


RANDOM = "random"  # MODEL.PRETRAINED of an evaluation that is meant to have no weights

# Flags of the command lines and the keys they set.
_FLAGS = {
    "dataset": ["DATA.DATASET"],
    "data_path": ["DATA.DATA_PATH"],
    "output": ["SAVE"],
    "batch_size": ["DATA.BATCH_SIZE", "DATA.BATCH_SIZE_EVAL"],
    "batch_size_eval": ["DATA.BATCH_SIZE_EVAL"],
    "image_size": ["DATA.IMAGE_SIZE"],
    "accum_iter": ["TRAIN.ACCUM_ITER"],
    "pretrained": ["MODEL.PRETRAINED"],
    "resume": ["MODEL.RESUME"],
    "last_epoch": ["TRAIN.LAST_EPOCH"],
    "eval": ["EVAL"],
    "amp": ["AMP"],
}


def update_config(config: CfgNode, args) -> CfgNode:
    """`config` with the command-line flags in `args` over it; frozen.

    Args:
        config: what `get_config` gave; stays as it is.
        args: attributes named as the flags are (None or False: not given); `opts` is a flat list
            of KEY VALUE pairs, which go last.

    Raises:
        InputError: every unknown key, wrong value and contradiction, a line each.
    """
    values, problems = _flat(config), []
    for flag, keys in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            for key in keys:
                _set(values, key, value, f"-{flag}", problems)
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        problems.append(f"-opts: {opts[-1]} has no value; give KEY VALUE pairs")
    for key, value in zip(opts[::2], opts[1::2]):
        _set(values, key, value, "-opts", problems)
    return _checked(values, problems, getattr(args, "cfg", None) or "configuration")
