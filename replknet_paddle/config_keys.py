"""The one table of the configuration's keys: default, rule, and meaning with its unit.

Above the table are the rules that it is made of; below it, what values must not go together.

Keys are PaddleViT's wherever PaddleViT has one, so its YAML files load unchanged; the keys of this
project are marked by a (+). Meanings are PaddleViT's, too, but where that departs from the recipe
by which the published weights were trained:

    TRAIN.WEIGHT_DECAY       in PaddleViT also for norms and biases
    learning rate            in PaddleViT changed once an epoch, here at each optimizer step
    TRAIN.MODEL_EMA_DECAY    in PaddleViT for each forward pass, here for each optimizer step
    TRAIN.LINEAR_SCALED_LR   256 by default in PaddleViT
    TRAIN.AUTO_AUGMENT       in PaddleViT with noise on the magnitudes
    TRAIN.RAND_AUGMENT       in PaddleViT shifts by pixels, here by shares of the side (timm)
    both                     in PaddleViT fill with grey 128, here with the mean colour
"""

import ast
import operator
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must be: `read` returns it in its proper type, or raises ValueError."""

    read: Callable[[Any], Any]
    allowed: str  # as messages show it


def decoded(value: Any) -> Any:
    """Return the value that text such as 4e-3 and None means, which YAML 1.1 leaves text, and
    Python's own number or list for NumPy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return ast.literal_eval(value.strip()) if isinstance(value, str) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _valid(value: Any, is_valid: bool) -> Any:
    if not is_valid:
        raise ValueError
    return value


def _numeric(kind: type, name: str, low: float, high: float | None = None) -> Rule:
    largest = {int: 2**31 - 1, float: sys.float_info.max}[kind] if high is None else high

    def read(value):
        value = decoded(value)
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        value = kind(_valid(value, is_number))
        return _valid(value, low <= value <= largest)

    return Rule(read, f"{name} >= {low}" if high is None else f"{name} from {low} to {high}")


integer = partial(_numeric, int, "an integer")
number = partial(_numeric, float, "a number")


def boolean() -> Rule:
    def read(value):
        value = decoded(value)
        if isinstance(value, str):
            value = {"true": True, "false": False}.get(value.lower())
        return _valid(value, isinstance(value, bool))

    return Rule(read, "True or False")


def boolean_or(word: str) -> Rule:
    return Rule(lambda v: v if v == word else boolean().read(v), f"True, False or {word!r}")


def text() -> Rule:
    def read(value):
        value = os.fspath(value)
        return str(_valid(value, isinstance(value, str) and value != "" and "\0" not in value))

    return Rule(read, "text")


def palette() -> Rule:
    def read(value):
        value = f"{value:06d}" if isinstance(value, int) else value  # of one colour
        colours = value.lower().split() if isinstance(value, str) else []
        is_hex = all(len(c) == 6 and set(c) <= set("0123456789abcdef") for c in colours)
        return " ".join(_valid(colours, colours and is_hex))

    return Rule(read, "colours of six hexadecimal digits each, with spaces between")


def choice(*options: str) -> Rule:
    return Rule(lambda value: _valid(value, value in options), " or ".join(map(repr, options)))


def several(item: Rule, count: int | None = None) -> Rule:
    def read(value):
        value = decoded(value)
        if count is None and isinstance(value, (int, float)):
            value = [value]
        is_list = isinstance(value, (list, tuple)) and len(value) == (count or len(value))
        return [item.read(v) for v in _valid(value, is_list)]

    many = f"{count} values" if count else "a list of values"
    return Rule(read, f"{many}, each {item.allowed}")


def names() -> Rule:
    def read(value):
        value = decoded(value)
        value = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return list(map(text().read, _valid(value, value and isinstance(value, (list, tuple)))))

    return Rule(read, "names with commas between, or a list of them")


def word_or(word: str, rule: Rule) -> Rule:
    return Rule(lambda v: v if v == word else rule.read(v), f"{word!r}, or {rule.allowed}")


def optional(rule: Rule) -> Rule:
    return Rule(
        lambda value: None if decoded(value) is None else rule.read(value),
        f"{rule.allowed}, or None",
    )


probability = number(0, 1)
TEMPERATURES = (0.01, 100)  # the lowest and the highest that MODEL.TEMPERATURE may be

# What TRAIN.BEST_BY may be besides top1, as metrics.jsonl has them behind `val_`.
CLASS_FIGURES = (
    "balanced_accuracy",
    *(f"{mean}_{of}" for mean in ("macro", "weighted") for of in ("precision", "recall", "f1")),
)
TWO_CLASS_FIGURES = ("roc_auc", "average_precision")

# Keys with one value, which no configuration holds: PaddleViT's, and options of 0.1 and 0.2 that
# are gone. They are accepted in files and flags, and reported where they ask for something else.
FIXED_KEYS: dict[str, tuple[Any, Rule]] = {
    "DATA.DATASET": ("imagenet2012", choice("imagenet2012")),  # list files in ImageNet's layout
    "DATA.IMAGE_CHANNELS": (3, integer(3, 3)),  # images are read as RGB
    "DATA.NATIVE_PIXELS": (True, boolean()),
    "DATA.FINISH_ON_DEVICE": (True, boolean()),
    "TRAIN.OPTIMIZER.NAME": ("AdamW", choice("AdamW")),
    "TRAIN.MODEL_EMA_FORCE_CPU": (False, boolean()),
    "TRAIN.MIXUP_MODE": ("batch", choice("batch")),
    "SAVE_MINUTES": (None, optional(number(0))),  # SAVE_STEPS instead
    "LOG.METRICS_JSONL": (True, boolean()),
}

KEYS: dict[str, tuple[Any, Rule]] = {
    # Data. Paths in the lists are relative to DATA_PATH.
    "DATA.BATCH_SIZE": (64, integer(1)),  # training images per process and forward pass
    "DATA.BATCH_SIZE_EVAL": (None, optional(integer(1))),  # likewise in evaluation; None: the same
    "DATA.DATA_PATH": ("/dataset/imagenet/", text()),  # folder of train_list.txt, val_list.txt
    "DATA.FOLD": (None, optional(integer(1))),  # (+) N: train_list_N.txt and val_list_N.txt
    # instead, which make-lists -folds writes
    "DATA.IMAGE_SIZE": (224, integer(1)),  # pixels, both sides of the network's input
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
    "DATA.REDUCED_DECODE": (True, boolean()),  # (+) in training, decode large crops of JPEGs at
    # 1/2, 1/4 or 1/8 scale: within 2 grey levels on average
    "DATA.IMAGENET_MEAN": ([0.485, 0.456, 0.406], several(number(0, 1), 3)),  # RGB in [0, 1]
    "DATA.IMAGENET_STD": ([0.229, 0.224, 0.225], several(number(1e-6, 1), 3)),  # RGB in [0, 1]
    "MODEL.TYPE": ("RepLKNet", choice("RepLKNet", "UPerNet")),  # UPerNet (+): segmentation, with
    # the heads of SEGMENTATION on a backbone of OUT_INDICES
    "MODEL.NAME": ("replknet_31b", text()),  # for logs and the default run folder
    "MODEL.RESUME": (None, optional(text())),  # checkpoint or run folder to continue; auto: the
    # newest whole checkpoint of SAVE, or a fresh start where there is none
    "MODEL.PRETRAINED": (None, optional(text())),  # weights to evaluate or to start training from;
    # random: a freshly initialized network, which evaluation has to be asked for
    "MODEL.PRETRAINED_WEIGHTS": ("auto", choice("auto", "model", "model_ema")),  # (+) which of a
    # training checkpoint: its weights, the EMA weights, or those of the two that the run found
    # better, which are the weights for files without that record
    "MODEL.DROP_HEAD": (False, boolean()),  # (+) start with a fresh head where PRETRAINED has other
    # classes
    "MODEL.NUM_CLASSES": (1000, optional(integer(0))),  # None: as many as the checkpoint that is
    # evaluated or resumed has, or the data: names in class_names.txt, else the largest label and 1;
    # (+) 0: no head, and the network gives pooled features
    "MODEL.DROPPATH": (0.5, number(0, 0.999)),  # stochastic depth of the last block
    "MODEL.LARGE_KERNEL_SIZES": ([31, 29, 27, 13], several(integer(1), 4)),  # odd, per stage
    "MODEL.LAYERS": ([2, 2, 18, 2], several(integer(1, 1000), 4)),  # (RepLK block, ConvFFN) pairs
    "MODEL.CHANNELS": ([128, 256, 512, 1024], several(integer(1), 4)),
    "MODEL.DW_RATIO": (1.0, number(0.01)),  # channels of the large kernels over the stage's
    "MODEL.FFN_RATIO": (4.0, number(0.01)),  # hidden channels of ConvFFN over the stage's
    "MODEL.SMALL_KERNEL": (5, optional(integer(1))),  # odd, parallel to the large kernels
    "MODEL.SMALL_KERNEL_MERGED": (False, boolean()),  # build the re-parameterized form
    "MODEL.NORM_INTER_FEATURES": (False, boolean()),  # batch norm on each map of OUT_INDICES
    "MODEL.OUT_INDICES": (None, optional(several(integer(0, 3)))),  # stages; None: a classifier
    "MODEL.SYNC_BN": (False, boolean_or("auto")),  # batch statistics over all GPUs of a training
    # run; (+) auto: where Paddle's layer computes them so, with a warning where it does not
    "MODEL.RECOMPUTE": (False, boolean()),  # (+) less memory in training, about a third more time
    "MODEL.CONV_IMPL": ("auto", choice("auto", "paddle", "direct", "fft", "matmul")),  # (+) what
    # computes convolutions. auto: on CPU the compiled operators where there are any, on GPU matrix
    # products or Paddle's own for each large kernel, as measured; paddle: Paddle's own; direct,
    # fft: the compiled operators, with that algorithm for depthwise ones; matmul: matrix products
    "MODEL.CONV_MEMORY_MB": (None, optional(integer(1))),  # (+) MiB that the matrix products of a
    # layer may use beside its input and output, and that evaluation and TRAIN.ACCUM_ITER keep of
    # the weights of all layers; None: a 32nd of the GPU's memory, 512 on CPU
    "MODEL.TEMPERATURE": (1.0, number(*TEMPERATURES)),  # (+) logits are divided by it to make the
    # probabilities of evaluation and predictions; `replknet calibrate` fits it to the weights
    "TRAIN.LAST_EPOCH": (0, integer(0)),  # epochs already trained, where weights do not tell
    "TRAIN.NUM_EPOCHS": (300, integer(1)),
    "TRAIN.PATIENCE": (None, optional(integer(1))),  # (+) the run ends at the first evaluation that
    # is so many epochs after that of the best checkpoint
    "TRAIN.WARMUP_EPOCHS": (10, integer(0)),
    "TRAIN.WEIGHT_DECAY": (0.05, number(0)),  # not for 1-D parameters and biases
    "TRAIN.BASE_LR": (4e-3, number(0)),  # peak learning rate
    "TRAIN.WARMUP_START_LR": (1e-6, number(0)),
    "TRAIN.END_LR": (1e-6, number(0)),
    "TRAIN.LAYER_DECAY": (None, optional(number(0.01, 1))),  # (+) learning rate ratio of a layer
    # group to the one after it
    "TRAIN.FREEZE": (None, optional(names())),  # (+) parameters that are not trained: what their
    # names begin with, or backbone for all but the head
    "TRAIN.GRAD_CLIP": (None, optional(number(1e-9))),  # largest global norm of the gradients
    "TRAIN.ACCUM_ITER": (1, integer(1)),  # forward passes per optimizer step
    "TRAIN.LINEAR_SCALED_LR": (None, optional(integer(1))),  # None: BASE_LR is what is used; else
    # BASE_LR is for this global batch and scales with the actual one (PaddleViT: 256)
    "TRAIN.OPTIMIZER.EPS": (1e-8, number(1e-20)),
    "TRAIN.OPTIMIZER.BETAS": ([0.9, 0.999], several(number(0, 0.999999), 2)),
    "TRAIN.MODEL_EMA": (True, boolean()),  # keep and evaluate a moving average of the weights
    "TRAIN.MODEL_EMA_DECAY": (0.9999, number(0, 0.9999999)),  # per optimizer step
    "TRAIN.BEST_BY": ("top1", choice("top1", *CLASS_FIGURES, *TWO_CLASS_FIGURES)),  # (+) figure of
    # an evaluation by which RUN/best and the better weights are chosen; segmentation has its mIoU
    "TRAIN.CROP_SCALE": ([0.08, 1.0], several(number(1e-4, 1), 2)),  # (+) area of a random crop
    "TRAIN.CROP_RATIO": ([3 / 4, 4 / 3], several(number(0.01, 100), 2)),  # (+) width over height
    "TRAIN.HFLIP_PROB": (0.5, probability),  # (+) horizontal flip
    "TRAIN.VFLIP_PROB": (0.0, probability),  # (+) vertical flip
    "TRAIN.QUARTER_TURNS": (False, boolean()),  # (+) turn by 0, 90, 180 or 270 degrees, each of
    # them as likely
    "TRAIN.SMOOTHING": (0.1, number(0, 0.999)),  # label smoothing
    "TRAIN.CLASS_WEIGHTS": (None, optional(word_or("balanced", several(number(0))))),  # (+) how
    # much an image of each class counts in the loss; balanced: each class as much as any other
    "TRAIN.SAMPLER": ("shuffle", choice("shuffle", "balanced")),  # (+) an epoch's images: all of
    # them, or each class equally often
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
    "SAVE_KEEP": (2, integer(1)),  # (+) newest checkpoints to keep besides; each epoch writes one
    "SAVE_STEPS": (None, optional(integer(1))),  # (+) optimizer steps between further checkpoints
    "REPORT_FREQ": (20, integer(1)),  # forward passes between log lines
    "VALIDATE_FREQ": (1, integer(1)),  # epochs between evaluations; the last is always evaluated
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

# Values that are each legal and cannot go together: keys, when their values contradict each other,
# and what is allowed, which messages show behind "KEY is VALUE; allowed: ", unless it says that
# itself. {key} is the first of the keys, {0} and so on are the values, {found} what the condition
# gave.
Contradiction = tuple[tuple[str, ...], Callable[..., Any], str]

_SIZES, _CHANNELS, _EPOCHS = "MODEL.LARGE_KERNEL_SIZES", "MODEL.CHANNELS", "TRAIN.NUM_EPOCHS"
CONTRADICTIONS: list[Contradiction] = [
    ((_SIZES,), lambda sizes: any(k % 2 == 0 for k in sizes), "odd sizes, which keep the map size"),
    (
        ("MODEL.SMALL_KERNEL", _SIZES),
        lambda small, sizes: small and (small % 2 == 0 or small > min(sizes)) and min(sizes),
        f"odd, at most the smallest of {_SIZES} ({{found}}), or None",
    ),
    *(
        (
            (key, _CHANNELS),
            lambda ratio, channels: min(channels) * ratio < 1,
            f"at least one channel in each stage of {_CHANNELS} ({{1}})",
        )
        for key in ("MODEL.DW_RATIO", "MODEL.FFN_RATIO")
    ),
    (
        ("MODEL.OUT_INDICES",),
        lambda stages: stages == [] or len(set(stages or ())) < len(stages or ()),
        "distinct stages from 0 to 3, or None",
    ),
    (("TRAIN.WARMUP_EPOCHS", _EPOCHS), operator.gt, f"at most {_EPOCHS} ({{1}})"),
    (("TRAIN.LAST_EPOCH", _EPOCHS), operator.ge, f"less than {_EPOCHS} ({{1}})"),
    *(
        ((key,), lambda limits: limits and limits[0] > limits[1], "the smaller number first")
        for key in ("TRAIN.CROP_SCALE", "TRAIN.CROP_RATIO", "TRAIN.CUTMIX_MINMAX")
    ),
    (
        ("MODEL.RESUME", "EVAL"),
        lambda resume, evaluates: resume and evaluates,
        "{key} goes with training, EVAL does not; allowed: MODEL.PRETRAINED names the weights to "
        "evaluate",
    ),
    (
        ("MODEL.RESUME", "SAVE"),
        lambda resume, save: resume == "auto" and save is None,
        "{key} is auto; allowed with a run folder to look in, SAVE (-output)",
    ),
    (
        ("MODEL.OUT_INDICES", "EVAL", "MODEL.TYPE"),
        lambda stages, evaluates, kind: stages is not None and evaluates and kind != "UPerNet",
        "{key} makes a backbone without a head; allowed with EVAL: None",
    ),
]

# Of MODEL.TYPE UPerNet alone.
_HERE = "{key} is {0}; allowed with MODEL.TYPE UPerNet: "
SEGMENTATION_CONTRADICTIONS: list[Contradiction] = [
    (("MODEL.OUT_INDICES",), lambda stages: stages != [0, 1, 2, 3], f"{_HERE}[0, 1, 2, 3]"),
    (("MODEL.NUM_CLASSES",), lambda count: not 2 <= (count or 0) <= 255, f"{_HERE}2 to 255"),
    (("TRAIN.LAYER_DECAY",), lambda decay: decay is not None, f"{_HERE}None"),
    (("TRAIN.BEST_BY",), lambda by: by != "top1", f"{_HERE}top1, which stands for the mIoU there"),
    (("MODEL.TEMPERATURE",), lambda temperature: temperature != 1, f"{_HERE}1.0"),
    (("TRAIN.CLASS_WEIGHTS",), lambda weights: weights is not None, f"{_HERE}None"),
    (("TRAIN.SAMPLER",), lambda sampler: sampler != "shuffle", f"{_HERE}shuffle"),
    (("TRAIN.WARMUP_EPOCHS",), bool, f"{_HERE}0; SEGMENTATION.WARMUP_STEPS sets the warm-up"),
    (
        ("SEGMENTATION.WARMUP_STEPS", _EPOCHS, "SEGMENTATION.EPOCH_STEPS"),
        lambda warmup, epochs, steps: warmup > epochs * steps and epochs * steps,
        "at most the {found} steps of the run",
    ),
    (
        ("SEGMENTATION.SLIDE_STRIDE", "DATA.IMAGE_SIZE"),
        lambda stride, size: stride is not None and stride > size,
        "at most DATA.IMAGE_SIZE ({1}), so that windows leave no gap",
    ),
    (("SEGMENTATION.EVAL_RATIOS",), operator.not_, "at least one ratio"),
    *(
        ((key,), bool, f"{_HERE}{off}; its training flips images left to right alone")
        for key, off in (("TRAIN.VFLIP_PROB", 0.0), ("TRAIN.QUARTER_TURNS", False))
    ),
    (
        ("SEGMENTATION.PALETTE", "MODEL.NUM_CLASSES"),
        lambda colours, classes: colours and (n := len(colours.split())) != classes and n,
        "{key} has {found} colours; allowed: one for each of the {1} classes",
    ),
]
