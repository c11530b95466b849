"""Writing a network for inference: an export folder with the model and its sidecar."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

import replknet_paddle.model
from replknet_paddle.deploy.fold import folded
from replknet_paddle.deploy.onnx_graph import INPUT, onnx_model
from replknet_paddle.deploy.quantize import quantize
from replknet_paddle.deploy.sidecar import FILE, FORMATS, PRECISIONS, Sidecar
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import use_fast_depthwise_conv
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_folder, check_folder_is_writable

# Nothing there depends on the values of tensors, so capturing a program need not rewrite the Python
# of this module first, which takes three quarters of the time of an export.
paddle.jit.ignore_module([replknet_paddle.model])

# Paddle 3 writes the first; exports of version 0.2 may hold the second, which Paddle 3 reads.
PADDLE_MODEL_FILES = ("model.json", "model.pdmodel")
PADDLE_WEIGHTS_FILE = "model.pdiparams"
CONV_IMPLS = ("paddle", "matmul")
ONNX_MODEL_FILE = "model.onnx"
# Half precisions that ONNX files keep weights in; Paddle converts what it loads.
HALF_WEIGHTS = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


def export_model(
    model: nn.Layer,
    target: str | os.PathLike,
    sidecar: Sidecar,
    *,
    calibration: Iterable[np.ndarray] = (),
) -> None:
    """Write `model` and `sidecar` to the folder `target`, which appears when it is whole.

    Args:
        model: a classifier of any form, or another network with `export_form()`, which gives its
            `ExportForm`; stays as it is.
        target: a new or empty folder, or an earlier export, which is replaced; or a link to one.
        sidecar: says the format and precision.
        calibration: for INT8: preprocessed images float32 (N, 3, H, W), batch by batch.

    Raises:
        InputError: `target` is something else, or a combination that there is not.
        OSError: it cannot be written.
    """
    target = check_target(target)
    with atomic_folder(target) as folder:
        write_model(
            model,
            folder,
            format=sidecar.format,
            precision=sidecar.precision,
            matmul_size=sidecar.input_size,
            calibration=calibration,
        )
        sidecar.write(folder)
        check_target(target)  # what came meanwhile


def check_target(target: str | os.PathLike) -> Path:
    """The folder that an export to `target` makes or replaces, links followed.

    Raises:
        FileNotFoundError: there is no folder to write it into.
        InputError: something would go that no export wrote, or the folder above is read-only.
    """
    target = Path(os.path.realpath(target))
    allowed = "allowed: a new or empty folder, or an earlier export and nothing else"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
    check_folder_is_writable(target.parent)
    if not target.exists():
        return target
    is_folder = target.is_dir()
    if is_folder and target.samefile("."):
        raise InputError(f"{target} is the folder that this runs in; run it from another one")
    if is_folder and not any(target.iterdir()):
        return target
    if not (target / FILE).is_file():
        raise InputError(
            f"{target} exists and is not an earlier export (it has no {FILE}); {allowed}"
        )
    written = {FILE, *Sidecar.read(target).files}
    others = sorted(
        entry.name for entry in target.iterdir() if entry.name not in written or entry.is_dir()
    )
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(f"{target} holds what no export wrote: {shown}; {allowed}")
    return target


def check_combination(format: str, precision: str, conv_impl: str = "paddle") -> None:
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


CLASSIFIERS_ONLY = "-precision int8 is for classifiers; allowed here: fp32, fp16, bf16"


@dataclass(frozen=True)
class ExportForm:
    """A network as it is written to files.

    Attributes:
        layer: images (N, 3, H, W) -> logits, in evaluation mode, for Paddle Inference; a copy,
            whose convolutions may be swapped.
        onnx: name of the half precision to store weights in, or None -> `onnx.ModelProto`.
    """

    layer: nn.Layer
    onnx: Callable


def classifier_form(model: RepLKNet) -> ExportForm:
    """The form of a classifier.

    Raises:
        InputError: a backbone.
    """
    if model.out_indices is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {list(model.out_indices)}, which makes a backbone without a "
            "head; allowed for an export: None"
        )
    model = folded(model)
    return ExportForm(InferenceForm(model), partial(onnx_model, model))


def write_model(
    model: nn.Layer,
    folder: Path,
    *,
    format: str,
    precision: str,
    matmul_size: tuple[int, int] | None = None,
    calibration: Iterable[np.ndarray] = (),
) -> None:
    """Write the model file or files of one format into `folder`.

    Args:
        matmul_size: height and width of the only images that it takes, with large kernels as matrix
            products, in format `paddle`; None for convolutions, which take any.

    Raises:
        InputError: a combination that there is not, a backbone, or a package that is missing.
    """
    check_combination(format, precision)
    if isinstance(model, RepLKNet):
        form = classifier_form(model)
    elif precision == "int8":
        raise InputError(CLASSIFIERS_ONLY)
    else:
        form = model.export_form()
    if format == "paddle":
        write_paddle_model(form.layer, folder, matmul_size)
        return
    path = folder / ONNX_MODEL_FILE
    path.write_bytes(form.onnx(half_weights=HALF_WEIGHTS.get(precision)).SerializeToString())
    if precision == "int8":
        float_path = folder / "float.onnx"
        os.replace(path, float_path)
        quantize(float_path, path, calibration)
        float_path.unlink()


class InferenceForm(nn.Layer):
    """A classifier whose average is a pooling, which Paddle Inference runs in oneDNN."""

    def __init__(self, model: RepLKNet):
        super().__init__()
        self.model = model

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        x = self.model.norm(self.model.forward_stages(images)[-1])
        return self.model.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def write_paddle_model(
    form: nn.Layer, folder: Path, matmul_size: tuple[int, int] | None = None
) -> None:
    """Write the program and weights of an `ExportForm.layer` as Paddle Inference reads them."""
    if matmul_size is not None:
        use_fast_depthwise_conv(form, "matmul")
    form.eval()
    spec = paddle.static.InputSpec([None, 3, *(matmul_size or (None, None))], "float32", INPUT)
    paddle.jit.save(form, str(folder / "model"), input_spec=[spec])
