"""Configuration: the defaults, YAML files over them, command-line flags over those.

`_KEYS` is the one table of keys. Each row gives the default, the rule that values must keep (its
text is what error messages call allowed) and the meaning with its unit. Keys and meanings are
PaddleViT's wherever PaddleViT has one, so its YAML files load unchanged; the keys that are ours
say so by a (+). Everything wrong in a configuration is reported together, in one `InputError`.
"""

import ast
import difflib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml
from yacs.config import CfgNode

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.places import PROJECT_FOLDER, find_path, tried

CONFIG_FOLDER = PROJECT_FOLDER / "configs"


class Rule(NamedTuple):
    """What a value must be: `read` returns it in its proper type, or raises ValueError."""

    read: Callable[[Any], Any]
    allowed: str


def _decoded(value: Any) -> Any:
    """YAML 1.1 reads 4e-3 and None as text, and so do command lines: give them their meaning."""
    if isinstance(value, str):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value


def _interval(low: float, high: float | None) -> str:
    return f">= {low}" if high is None else f"from {low} to {high}"


def integer(low: int, high: int | None = None) -> Rule:
    def read(value):
        value = _decoded(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Rule(read, f"an integer {_interval(low, high)}")


def number(low: float, high: float | None = None) -> Rule:
    def read(value):
        value = _decoded(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        value = float(value)
        if not low <= value <= (float("inf") if high is None else high) or value == float("inf"):
            raise ValueError
        return value

    return Rule(read, f"a number {_interval(low, high)}")


def boolean() -> Rule:
    def read(value):
        value = _decoded(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule(read, "True or False")


def text() -> Rule:
    def read(value):
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    return Rule(read, "text")


def palette() -> Rule:
    def read(value):
        value = f"{value:06d}" if isinstance(value, int) else value  # of one colour
        if not isinstance(value, str) or not value.split():
            raise ValueError
        if not all(len(colour) == 6 and int(colour, 16) >= 0 for colour in value.split()):
            raise ValueError
        return " ".join(value.split()).lower()

    return Rule(read, "colours of six hexadecimal digits each, with spaces between")


def choice(*options: str) -> Rule:
    def read(value):
        if value not in options:
            raise ValueError
        return value

    return Rule(read, " or ".join(repr(option) for option in options))


def several(item: Rule, count: int | None = None) -> Rule:
    def read(value):
        value = _decoded(value)
        if not isinstance(value, (list, tuple)) or len(value) != (count or len(value)):
            raise ValueError
        return [item.read(v) for v in value]

    many = f"{count} values" if count else "a list of values"
    return Rule(read, f"{many}, each {item.allowed}")


def optional(rule: Rule) -> Rule:
    def read(value):
        return None if _decoded(value) is None else rule.read(value)

    return Rule(read, f"{rule.allowed}, or None")


probability = number(0, 1)

_KEYS: dict[str, tuple[Any, Rule]] = {
    # Data. Paths in the lists are relative to DATA_PATH.
    "DATA.BATCH_SIZE": (64, integer(1)),  # training images per process and forward pass
    "DATA.BATCH_SIZE_EVAL": (None, optional(integer(1))),  # likewise in evaluation; None: the same
    "DATA.DATA_PATH": ("/dataset/imagenet/", text()),  # folder of train_list.txt, val_list.txt
    "DATA.DATASET": ("imagenet2012", choice("imagenet2012")),  # list files in ImageNet's layout
    "DATA.IMAGE_SIZE": (224, integer(1)),  # pixels, both sides of the network's input
    "DATA.IMAGE_CHANNELS": (3, integer(3, 3)),  # images are read as RGB
    "DATA.CROP_PCT": (0.875, number(0.01, 1)),  # evaluation: crop size over resized short side
    "DATA.RESIZE_MODE": ("short_crop", choice("short_crop", "warp")),  # (+) evaluation: short side
    # to IMAGE_SIZE / CROP_PCT and centre crop, or both sides to IMAGE_SIZE
    "DATA.NUM_WORKERS": (2, integer(0)),  # loader processes for each training process
    "DATA.CLASS_NAMES": (None, optional(text())),  # (+) file of one class name per line, or
    # ade20k or cityscapes, whose names the project has; None: those in the checkpoint, or
    # class_names.txt beside the lists, or as IMAGENET_NAMES says
    "DATA.IMAGENET_NAMES": (False, boolean()),  # (+) 1000 classes that nothing else names are
    # ImageNet-1K's, in the order of its synsets; set by the configs of published models
    "DATA.MAX_BAD_IMAGES": (10, integer(0)),  # (+) unreadable training images, per process, to
    # replace by others before the run stops; evaluation stops at the first
    "DATA.WORKER_TIMEOUT": (600.0, number(1)),  # (+) seconds to wait for one batch of the loader
    # processes before the run ends with status 1: their storage hangs
    "DATA.ALLOW_OUTSIDE": (False, boolean()),  # (+) list lines may lead out of DATA_PATH: by .., as
    # absolute paths, through links
    "DATA.NATIVE_PIXELS": (True, boolean()),  # (+) resize and augment in compiled code, which gives
    # the same bits as Pillow; without a C++ compiler Pillow does it anyway
    "DATA.REDUCED_DECODE": (True, boolean()),  # (+) in training, decode large crops of JPEGs at
    # 1/2, 1/4 or 1/8 scale: within 2 grey levels on average
    "DATA.FINISH_ON_DEVICE": (True, boolean()),  # (+) move 8-bit batches, normalize and erase there
    "DATA.IMAGENET_MEAN": ([0.485, 0.456, 0.406], several(number(0, 1), 3)),  # RGB in [0, 1]
    "DATA.IMAGENET_STD": ([0.229, 0.224, 0.225], several(number(1e-6, 1), 3)),  # RGB in [0, 1]
    "MODEL.TYPE": ("RepLKNet", choice("RepLKNet", "UPerNet")),  # UPerNet (+): segmentation, with
    # the heads of SEGMENTATION on a backbone of OUT_INDICES
    "MODEL.NAME": ("replknet_31b", text()),  # for logs and the default run folder
    "MODEL.RESUME": (None, optional(text())),  # checkpoint or run folder to go on from; auto: the
    # newest whole checkpoint of SAVE, or a fresh start where there is none
    "MODEL.PRETRAINED": (None, optional(text())),  # weights to evaluate or to start training from;
    # random: a freshly initialized network, which evaluation has to be asked for
    "MODEL.PRETRAINED_WEIGHTS": ("auto", choice("auto", "model", "model_ema")),  # (+) which of a
    # training checkpoint: its weights, the EMA weights, or those of the two that the run found
    # better, which are the weights for files without that record
    "MODEL.DROP_HEAD": (False, boolean()),  # (+) start with a fresh head where PRETRAINED has other
    # classes
    "MODEL.NUM_CLASSES": (1000, optional(integer(1))),  # None: as many as the checkpoint that is
    # evaluated or resumed has, or the data: names in class_names.txt, else the largest label and 1
    "MODEL.DROPPATH": (0.5, number(0, 0.999)),  # stochastic depth of the last block
    "MODEL.LARGE_KERNEL_SIZES": ([31, 29, 27, 13], several(integer(1), 4)),  # odd, per stage
    "MODEL.LAYERS": ([2, 2, 18, 2], several(integer(1), 4)),  # (RepLK block, ConvFFN) pairs
    "MODEL.CHANNELS": ([128, 256, 512, 1024], several(integer(1), 4)),
    "MODEL.DW_RATIO": (1.0, number(0.01)),  # channels of the large kernels over the stage's
    "MODEL.FFN_RATIO": (4.0, number(0.01)),  # hidden channels of ConvFFN over the stage's
    "MODEL.SMALL_KERNEL": (5, optional(integer(1))),  # odd, parallel to the large kernels
    "MODEL.SMALL_KERNEL_MERGED": (False, boolean()),  # build the re-parameterized form
    "MODEL.NORM_INTER_FEATURES": (False, boolean()),  # batch norm on each map of OUT_INDICES
    "MODEL.OUT_INDICES": (None, optional(several(integer(0, 3)))),  # stages; None: a classifier
    "MODEL.SYNC_BN": (False, boolean()),  # batch statistics over all GPUs of a training run
    "MODEL.RECOMPUTE": (False, boolean()),  # (+) less memory in training, about a third more time
    "MODEL.CONV_IMPL": ("auto", choice("auto", "paddle", "direct", "fft", "matmul")),  # (+) what
    # computes convolutions. auto: on CPU the compiled operators where there are any, on GPU matrix
    # products or Paddle's own for each large kernel, as measured; paddle: Paddle's own; direct,
    # fft: the compiled operators, with that algorithm for depthwise ones; matmul: matrix products
    "MODEL.CONV_MEMORY_MB": (512, integer(1)),  # (+) MiB that the matrix products of a layer may
    # use beside its input and output, and that evaluation keeps of the weights of all layers
    "TRAIN.LAST_EPOCH": (0, integer(0)),  # epochs already trained, where weights do not tell
    "TRAIN.NUM_EPOCHS": (300, integer(1)),
    "TRAIN.WARMUP_EPOCHS": (10, integer(0)),
    "TRAIN.WEIGHT_DECAY": (0.05, number(0)),  # not for 1-D parameters and biases
    "TRAIN.BASE_LR": (4e-3, number(0)),  # peak learning rate
    "TRAIN.WARMUP_START_LR": (1e-6, number(0)),
    "TRAIN.END_LR": (1e-6, number(0)),
    "TRAIN.LAYER_DECAY": (None, optional(number(0.01, 1))),  # (+) learning rate ratio of a layer
    # group to the one after it
    "TRAIN.GRAD_CLIP": (None, optional(number(1e-9))),  # largest global norm of the gradients
    "TRAIN.ACCUM_ITER": (1, integer(1)),  # forward passes per optimizer step
    "TRAIN.LINEAR_SCALED_LR": (None, optional(integer(1))),  # None: BASE_LR is what is used; else
    # BASE_LR is for this global batch and scales with the actual one (PaddleViT: 256)
    "TRAIN.OPTIMIZER.NAME": ("AdamW", choice("AdamW")),
    "TRAIN.OPTIMIZER.EPS": (1e-8, number(1e-20)),
    "TRAIN.OPTIMIZER.BETAS": ([0.9, 0.999], several(number(0, 0.999999), 2)),
    "TRAIN.MODEL_EMA": (True, boolean()),  # keep and evaluate a moving average of the weights
    "TRAIN.MODEL_EMA_DECAY": (0.9999, number(0, 0.9999999)),  # per optimizer step
    "TRAIN.MODEL_EMA_FORCE_CPU": (False, boolean()),  # PaddleViT's key; the average stays on GPU
    "TRAIN.CROP_SCALE": ([0.08, 1.0], several(number(1e-4, 1), 2)),  # (+) area of a random crop
    "TRAIN.CROP_RATIO": ([3 / 4, 4 / 3], several(number(0.01, 100), 2)),  # (+) width over height
    "TRAIN.HFLIP_PROB": (0.5, probability),  # (+) horizontal flip
    "TRAIN.SMOOTHING": (0.1, number(0, 0.999)),  # label smoothing
    "TRAIN.COLOR_JITTER": (0.4, number(0, 1)),  # where neither augmentation below is on
    "TRAIN.AUTO_AUGMENT": (True, boolean()),
    "TRAIN.RAND_AUGMENT": (False, boolean()),  # goes before AUTO_AUGMENT
    "TRAIN.RAND_AUGMENT_LAYERS": (2, integer(0)),  # operations per image
    "TRAIN.RAND_AUGMENT_MAGNITUDE": (9, number(0, 10)),
    "TRAIN.RAND_AUGMENT_MAGNITUDE_STD": (0.5, number(0)),  # (+) timm's mstd
    "TRAIN.RAND_AUGMENT_INCREASING": (True, boolean()),  # (+) timm's inc1: stronger with magnitude
    "TRAIN.MIXUP_ALPHA": (0.8, number(0)),  # 0: no mixup
    "TRAIN.MIXUP_PROB": (1.0, probability),  # that a batch is mixed at all
    "TRAIN.MIXUP_SWITCH_PROB": (0.5, probability),  # that it is cutmix, where both are on
    "TRAIN.MIXUP_MODE": ("batch", choice("batch")),
    "TRAIN.CUTMIX_ALPHA": (1.0, number(0)),  # 0: no cutmix
    "TRAIN.CUTMIX_MINMAX": (None, optional(several(number(0, 1), 2))),  # box sides over the image's
    "TRAIN.RANDOM_ERASE_PROB": (0.25, probability),
    "TRAIN.RANDOM_ERASE_MODE": ("pixel", choice("pixel", "rand", "const")),
    "TRAIN.RANDOM_ERASE_COUNT": (1, integer(1)),  # boxes per image, at most
    "TRAIN.RANDOM_ERASE_SPLIT": (False, boolean()),
    # Segmentation (MODEL.TYPE UPerNet), all (+). DATA.IMAGE_SIZE is the side of training crops and
    # of sliding windows; evaluation goes image by image.
    "SEGMENTATION.HEAD_CHANNELS": (512, integer(1)),  # of UPerNet's convolutions
    "SEGMENTATION.AUX_CHANNELS": (256, integer(1)),  # of the auxiliary head's
    "SEGMENTATION.ALIGN_CORNERS": (False, boolean()),  # how maps and logits are resized
    "SEGMENTATION.ZERO_IS_IGNORED": (False, boolean()),  # label images count classes from 1, and
    # their 0 is ignored, as 255 always is (ADE20K)
    "SEGMENTATION.RESIZE": ([2048, 512], several(integer(1), 2)),  # pixels: the most that the
    # longer and the shorter side of an image have, before training's random scale
    "SEGMENTATION.SLIDE_STRIDE": (None, optional(integer(1))),  # pixels between sliding windows in
    # evaluation; None: the whole image at once
    "SEGMENTATION.EVAL_RATIOS": ([1.0], several(number(0.01, 100))),  # of RESIZE, to average over
    "SEGMENTATION.EVAL_FLIP": (False, boolean()),  # average with the mirror image, too
    "SEGMENTATION.EPOCH_STEPS": (2000, integer(1)),  # optimizer steps of an epoch
    "SEGMENTATION.WARMUP_STEPS": (400, integer(0)),  # optimizer steps
    "SEGMENTATION.PALETTE": (None, optional(palette())),  # a colour for each class, as RRGGBB
    # with spaces between; None: computed ones
    "SAVE": (None, optional(text())),  # run folder; None: that of MODEL.RESUME, or
    # output/<name>-<train|eval>-<time>
    "SAVE_FREQ": (10, integer(1)),  # epochs between checkpoints that are never deleted
    "SAVE_KEEP": (
        2,
        integer(1),
    ),  # (+) newest checkpoints to keep besides; one is written every epoch
    "SAVE_STEPS": (None, optional(integer(1))),  # (+) optimizer steps between further checkpoints
    "SAVE_MINUTES": (None, optional(number(0))),  # (+) minutes between further checkpoints
    "REPORT_FREQ": (20, integer(1)),  # forward passes between log lines
    "VALIDATE_FREQ": (1, integer(1)),  # epochs between evaluations; the last is always evaluated
    "LOG.METRICS_JSONL": (True, boolean()),  # (+) one object per epoch in metrics.jsonl
    "LOG.VISUALDL": (False, boolean()),  # (+) the same as VisualDL scalars
    "SEED": (42, integer(0, 2**31 - 1)),
    "DETERMINISTIC": (False, boolean()),  # (+) on GPU: only algorithms that give the same bits each
    # time, as far as Paddle has a choice; slower. On CPU all are
    "EVAL": (False, boolean()),  # evaluate and stop
    "AMP": (False, boolean()),  # automatic mixed precision, on GPU
    "AMP_LEVEL": ("O1", choice("O1", "O2")),  # (+) O1: half precision where it is safe; O2: the
    # weights too, with float32 masters and gradients
    "AMP_DTYPE": ("float16", choice("float16", "bfloat16")),  # (+) float16 scales the loss
}


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
    if key not in _KEYS:
        problems.append(f"{source}: unknown key {key}{_nearest(key)}")
        return
    rule = _KEYS[key][1]
    try:
        values[key] = rule.read(value)
    except (ValueError, TypeError, OverflowError):
        shown = repr(value)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        problems.append(f"{source}: {key} is {shown}; allowed: {rule.allowed}")


def _nearest(key: str) -> str:
    by_upper = {known.upper(): known for known in _KEYS}
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
        raise FileNotFoundError(f"no config file {tried(path)}{by}{_configs_hint(path)}") from None
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
    sections = {key.rsplit(".", n)[0] for key in _KEYS for n in range(1, key.count(".") + 1)}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        # A misspelled section is gone into as well, for suggestions; no deeper than there are any.
        misspelled = name not in _KEYS and value and name.count(".") < 2
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
    if values["MODEL.NUM_CLASSES"] > 255:
        yield (
            f"MODEL.NUM_CLASSES is {values['MODEL.NUM_CLASSES']}; allowed with MODEL.TYPE UPerNet: "
            "at most 255"
        )
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
    values = {key: default for key, (default, _) in _KEYS.items()}
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
