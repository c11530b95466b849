"""Networks written for inference: a folder with the model, its configuration and its class names.

An export is a folder like that of a run: config.yaml, class_names.txt, the model file or files, and
export.json, which says how they were written. Preprocessing is that of the configuration.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F
from yacs.config import CfgNode

import replknet_paddle.model
from replknet_paddle.checkpoints.run_folder import EXPORT_FILE as FILE
from replknet_paddle.checkpoints.run_folder import EXPORT_FILE_OF_0_2 as FILE_OF_0_2
from replknet_paddle.config import check_class_count, get_config, override
from replknet_paddle.data.class_names import CLASS_NAMES_FILE, class_names_text, read_class_names
from replknet_paddle.deploy.fold import folded
from replknet_paddle.deploy.onnx_graph import INPUT, onnx_model
from replknet_paddle.deploy.quantize import quantize
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import use_fast_depthwise_conv
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import (
    atomic_folder,
    check_place_is_writable,
    file_sha256,
    write_text,
)

# Nothing there depends on the values of tensors, so capturing a program need not rewrite the Python
# of this module first, which takes three quarters of the time of an export.
paddle.jit.ignore_module([replknet_paddle.model])

FORMAT_VERSION = 2
CONFIG_FILE = "config.yaml"
# Paddle 3 writes model.json; exports of version 0.2 may hold model.pdmodel, which Paddle 3 reads.
MODEL_FILES = {
    "paddle": (("model.json", "model.pdiparams"), ("model.pdmodel", "model.pdiparams")),
    "onnx": (("model.onnx",),),
}
FORMATS = tuple(MODEL_FILES)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CONV_IMPLS = ("paddle", "matmul")
# Half precisions that ONNX files keep weights in; Paddle converts what it loads.
HALF_WEIGHTS = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
AGAIN = "export it again, or copy the whole folder again"

# What inference needs of a configuration, by the names that these had in `FILE_OF_0_2`.
INFERENCE_KEYS = {
    "architecture": "MODEL.NAME",
    "num_classes": "MODEL.NUM_CLASSES",
    "preprocessing.image_size": "DATA.IMAGE_SIZE",
    "preprocessing.crop_pct": "DATA.CROP_PCT",
    "preprocessing.mode": "DATA.RESIZE_MODE",
    "preprocessing.mean": "DATA.IMAGENET_MEAN",
    "preprocessing.std": "DATA.IMAGENET_STD",
    "segmentation.align_corners": "SEGMENTATION.ALIGN_CORNERS",
    "segmentation.resize": "SEGMENTATION.RESIZE",
    "segmentation.slide_stride": "SEGMENTATION.SLIDE_STRIDE",
    "segmentation.eval_ratios": "SEGMENTATION.EVAL_RATIOS",
    "segmentation.eval_flip": "SEGMENTATION.EVAL_FLIP",
    "segmentation.palette": "SEGMENTATION.PALETTE",
}


@dataclass(frozen=True)
class ModelInfo:
    """The description of a network for inference.

    Attributes:
        config: its configuration.
        format: of the model file, `paddle` or `onnx`.
        precision: `fp32`, `fp16`, `bf16` or `int8`.
        fixed_size: whether the model takes images of DATA.IMAGE_SIZE alone.
        class_names: one per class, or None.
        source_sha256: of the checkpoint file; None for weights that came from no file.
        files: SHA-256 of each other file of an export that was read, by its name.

    Raises:
        InputError: not one class name for each class.
    """

    config: CfgNode
    format: str = "paddle"
    precision: str = "fp32"
    fixed_size: bool = False
    class_names: tuple[str, ...] | None = None
    source_sha256: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        names, count = self.class_names, self.config.MODEL.NUM_CLASSES
        if names is not None and len(names) != count:
            raise InputError(
                f"{len(names)} class names for {count} classes (MODEL.NUM_CLASSES); allowed: one "
                "for each class, in their order"
            )

    def verify(self, folder: str | os.PathLike) -> None:
        """Check that an export's files are those that were written.

        Programs that read a damaged model file may end the process instead of saying so.
        """
        for name, digest in self.files.items():
            path = Path(folder) / name
            if not path.is_file():
                raise InputError(f"{folder} has no {name}, which its {FILE} promises; {AGAIN}")
            if file_sha256(path) != digest:
                raise InputError(f"{path} is not the file that {FILE} was written for; {AGAIN}")

    def model_path(self, folder: Path) -> Path:
        """Return the ONNX file or the Paddle program of an export."""
        choices = MODEL_FILES[self.format]
        found = next((names for names in choices if set(names) <= set(self.files)), None)
        if found is None:
            raise InputError(
                f"{folder / FILE} lists {', '.join(sorted(self.files)) or 'no files'}; an "
                f"export of format {self.format} has "
                f"{' or '.join(' and '.join(names) for names in choices)}; {AGAIN}"
            )
        return folder / found[0]


def is_export(source) -> bool:
    """Return whether a path is an export folder, as any folder that is not a run's counts."""
    folder = Path(source)
    return folder.is_dir() and (
        any((folder / name).exists() for name in (FILE, FILE_OF_0_2))
        or not (folder / CONFIG_FILE).exists()
    )


def read_export(folder: str | os.PathLike) -> ModelInfo:
    """Return what an export folder says of its model; the model itself is not read."""
    folder = Path(folder)
    name, content = read_record(folder)
    names = None
    if name == FILE:
        config = get_config(folder / CONFIG_FILE)
        if CLASS_NAMES_FILE in content["files"]:
            names = read_class_names(folder / CLASS_NAMES_FILE, config.MODEL.NUM_CLASSES)
    else:
        config, names = config_of_0_2(folder / name, content)
    check_class_count(config)
    return ModelInfo(
        config,
        content["format"],
        content["precision"],
        bool(content.get("fixed_size") or content.get("input_size")),
        None if names is None else tuple(names),
        content.get("source_sha256"),
        content["files"],
    )


def read_record(folder: Path) -> tuple[str, dict]:
    """Return the name and the entries of an export's JSON file."""
    name = next((name for name in (FILE, FILE_OF_0_2) if (folder / name).is_file()), None)
    if name is None:
        if not folder.exists():
            raise FileNotFoundError(f"no export folder {folder}")
        raise InputError(
            f"{folder} is not an exported model: it has no {FILE}; "
            "replknet export writes one beside the model"
        )
    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}; export the model again") from None
    wanted = FORMAT_VERSION if name == FILE else 1
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != wanted:
        raise InputError(
            f"{path} has format_version {version!r}; this program reads {wanted}. "
            "Export the model again, or use the program that wrote it"
        )
    for key, allowed in (("format", FORMATS), ("precision", PRECISIONS)):
        if content.get(key) not in allowed:
            raise InputError(
                f"{path}: {key} is {content.get(key)!r}; allowed: {', '.join(allowed)}; {AGAIN}"
            )
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        other not in ("", ".", "..") and other.isprintable() and not set(other) & set("/\\")
        for other in files
    ):
        raise InputError(
            f"{path}: files is {files!r:.100}; allowed: file names of this folder and their "
            f"SHA-256; {AGAIN}"
        )
    return name, content


def config_of_0_2(path: Path, content: dict) -> tuple[Any, list[str] | None]:
    """Return the configuration and the class names that an export of version 0.1 or 0.2 holds."""
    try:
        values = {}
        for name, key in INFERENCE_KEYS.items():
            section, _, entry = name.rpartition(".")
            if not section:
                values[key] = content[entry]
            elif section == "preprocessing" or content.get(section):
                values[key] = content[section][entry]
        if content.get("segmentation"):
            values |= {"MODEL.TYPE": "UPerNet", "MODEL.OUT_INDICES": [0, 1, 2, 3]}
            values |= {"TRAIN.WARMUP_EPOCHS": 0, "SEGMENTATION.WARMUP_STEPS": 0}
        config = get_config(**{key.replace(".", "__"): value for key, value in values.items()})
        names = content["class_names"]
        if names is not None and not all(isinstance(name, str) for name in [*names]):
            raise TypeError("class_names holds other things than text")
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{path} cannot be right: {error}\nExport the model again") from None
    return config, names


def write_record(info: ModelInfo, folder: str | os.PathLike) -> None:
    """Write what is not the model into an export folder whose model files are there already."""
    folder = Path(folder)
    # What is of the machine that exports stays there.
    config = override(
        info.config,
        SAVE=None,
        EVAL=False,
        MODEL__PRETRAINED=None,
        MODEL__RESUME=None,
        DATA__CLASS_NAMES=None,
    )
    write_text(folder / CONFIG_FILE, config.dump())
    if info.class_names is not None:
        write_text(folder / CLASS_NAMES_FILE, class_names_text(info.class_names))
    files = sorted(path for path in folder.iterdir() if path.name != FILE)
    content = {
        "format_version": FORMAT_VERSION,
        "format": info.format,
        "precision": info.precision,
        "fixed_size": info.fixed_size,
        "source_sha256": info.source_sha256,
        "paddle_version": paddle.__version__,
        "files": {path.name: file_sha256(path) for path in files},
    }
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")


def differences(info: ModelInfo, config) -> list[str]:
    """Return what an export has otherwise than `config`, of what inference needs, a line each."""
    keys = ["MODEL.TYPE", "MODEL.TEMPERATURE", *INFERENCE_KEYS.values()]
    if config.MODEL.TYPE != "UPerNet":
        keys = [key for key in keys if not key.startswith("SEGMENTATION.")]
    pairs = {key: [attrgetter(key)(each) for each in (info.config, config)] for key in keys}
    return [
        f"{key} is {ours}, in the configuration {theirs}"
        for key, (ours, theirs) in pairs.items()
        if ours != theirs
    ]


def export_model(
    model: nn.Layer,
    target: str | os.PathLike,
    info: ModelInfo,
    *,
    calibration: Iterable[np.ndarray] = (),
) -> None:
    """Write `model` as `info` says to the folder `target`, which appears when it is whole.

    Args:
        model: a classifier of any form, or another network with `export_form()`, which gives its
            `ExportForm`; stays as it is.
        target: a new or empty folder, or an earlier export, which is replaced; or a link to one.
        info: says the format and precision.
        calibration: for INT8: preprocessed images float32 (N, 3, H, W), batch by batch.

    Raises:
        InputError: `target` is something else, or a combination that there is not.
        OSError: it cannot be written.
    """
    target = check_target(target)
    with atomic_folder(target) as folder:
        write_model(model, folder, info, calibration=calibration)
        write_record(info, folder)
        check_target(target)  # what came meanwhile


def check_target(target: str | os.PathLike) -> Path:
    """Return the folder that an export to `target` makes or replaces, links followed."""
    target = Path(os.path.realpath(target))
    allowed = "allowed: a new or empty folder, or an earlier export and nothing else"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    check_place_is_writable(target.parent)
    if not target.exists():
        return target
    is_folder = target.is_dir()
    if is_folder and target.samefile("."):
        raise InputError(f"{target} is the folder that this runs in; run it from another one")
    if is_folder and not any(target.iterdir()):
        return target
    if not any((target / name).is_file() for name in (FILE, FILE_OF_0_2)):
        raise InputError(
            f"{target} exists and is not an earlier export (it has no {FILE}); {allowed}"
        )
    name, content = read_record(target)
    written = {name, *content["files"]}
    others = sorted(
        entry.name for entry in target.iterdir() if entry.name not in written or entry.is_dir()
    )
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(f"{target} holds what no export wrote: {shown}; {allowed}")
    return target


def check_combination(
    format: str, precision: str, conv_impl: str = "paddle", *, is_classifier: bool = True
) -> None:
    """Raise InputError for values that do not exist, or not together."""
    if conv_impl not in CONV_IMPLS:
        raise InputError(f"-conv_impl {conv_impl}; allowed: {', '.join(CONV_IMPLS)}")
    if conv_impl != "paddle" and format != "paddle":
        raise InputError(f"-conv_impl {conv_impl} with -format {format}; allowed: -format paddle")
    if format not in FORMATS:
        raise InputError(f"-format {format}; allowed: {', '.join(FORMATS)}")
    if precision not in PRECISIONS:
        raise InputError(f"-precision {precision}; allowed: {', '.join(PRECISIONS)}")
    if precision == "int8" and format != "onnx":
        raise InputError(f"-precision int8 with -format {format}; allowed: -format onnx")
    if precision == "int8" and not is_classifier:
        raise InputError("-precision int8 is for classifiers; allowed here: fp32, fp16, bf16")


@dataclass(frozen=True)
class ExportForm:
    """A network as it is written to files."""

    layer: nn.Layer  # for Paddle Inference: a copy, whose convolutions may be swapped
    onnx: Callable  # name of the half precision to store weights in, or None -> onnx.ModelProto


class InferenceForm(nn.Layer):
    """A classifier whose average is a pooling, which Paddle Inference runs in oneDNN."""

    def __init__(self, model: RepLKNet):
        super().__init__()
        self.model = model

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        x = self.model.forward_features(images)
        return self.model.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def export_form(model: nn.Layer) -> ExportForm:
    """Return the form of a classifier, or of another network that has one."""
    if not isinstance(model, RepLKNet):
        return model.export_form()
    if model.out_indices is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {list(model.out_indices)}, which makes a backbone without a "
            "head; allowed for an export: None"
        )
    model = folded(model)
    return ExportForm(InferenceForm(model), partial(onnx_model, model))


def write_model(
    model: nn.Layer, folder: Path, info: ModelInfo, *, calibration: Iterable[np.ndarray] = ()
) -> None:
    """Write the model file or files of `info.format` into `folder`."""
    check_combination(info.format, info.precision, is_classifier=isinstance(model, RepLKNet))
    form = export_form(model)
    if info.format == "paddle":
        side = info.config.DATA.IMAGE_SIZE if info.fixed_size else None
        write_paddle_model(form.layer, folder, side)
        return
    path = folder / MODEL_FILES["onnx"][0][0]
    half_weights = HALF_WEIGHTS.get(info.precision)
    path.write_bytes(form.onnx(half_weights=half_weights).SerializeToString())
    if info.precision == "int8":
        float_path = folder / "float.onnx"
        os.replace(path, float_path)
        quantize(float_path, path, calibration)
        float_path.unlink()


def write_paddle_model(form: nn.Layer, folder: Path, matmul_side: int | None = None) -> None:
    """Write the program and weights of an `ExportForm.layer` for Paddle Inference; with
    `matmul_side`, large kernels are matrix products, for images of that side alone."""
    if matmul_side is not None:
        use_fast_depthwise_conv(form, "matmul")
    form.eval()
    spec = paddle.static.InputSpec([None, 3, matmul_side, matmul_side], "float32", INPUT)
    paddle.jit.save(form, str(folder / "model"), input_spec=[spec])
