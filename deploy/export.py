"""Writing a network for inference: an export folder with the model and its sidecar."""

import logging
import os
import shutil
from pathlib import Path

import paddle

from deploy.fold import folded
from deploy.onnx_graph import INPUT, onnx_model
from deploy.sidecar import FILE, FORMATS, Sidecar
from errors import InputError
from replknet import RepLKNet

logger = logging.getLogger(__name__)

PADDLE_MODEL_FILES = ("model.json", "model.pdmodel")  # of Paddle 3 and Paddle 2
ONNX_MODEL_FILE = "model.onnx"
HALF_WEIGHTS = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


def export_model(model: RepLKNet, target: str | os.PathLike, sidecar: Sidecar) -> None:
    """Write `model` and `sidecar` to the folder `target`, which appears when it is whole.

    Args:
        model: a classifier of any form; stays as it is.
        target: a new folder, or an earlier export, which is replaced.
        sidecar: says the format and precision.

    Raises:
        InputError: `target` is something else, or a combination that there is not.
        OSError: it cannot be written.
    """
    target = Path(target)
    check_target(target)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir()
        write_model(model, unfinished, format=sidecar.format, precision=sidecar.precision)
        sidecar.write(unfinished)
        replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise InputError where an export would overwrite something that is none."""
    if target.exists() and not (target / FILE).is_file():
        is_empty = target.is_dir() and not any(target.iterdir())
        if not is_empty:
            raise InputError(
                f"{target} is there and is no earlier export (it has no {FILE}); "
                "allowed: a new or empty folder, or an earlier export"
            )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")


def replace_folder(new: Path, target: Path) -> None:
    """Let the folder `new` take the name `target`, the old one going away."""
    old = target.with_name(f"{target.name}.{os.getpid()}.old")
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def write_model(model: RepLKNet, folder: Path, *, format: str, precision: str) -> None:
    """Write the model file or files of one format into `folder`.

    Raises:
        InputError: a format or precision that there is not, or a backbone.
    """
    if format not in FORMATS:
        raise InputError(f"format {format!r}; allowed: {', '.join(FORMATS)}")
    if model.out_indices is not None:
        raise InputError("MODEL.OUT_INDICES makes a backbone without a head; allowed: None")
    model = folded(model)
    if format == "onnx":
        graph = onnx_model(model, half_weights=HALF_WEIGHTS.get(precision))
        (folder / ONNX_MODEL_FILE).write_bytes(graph.SerializeToString())
        return
    spec = paddle.static.InputSpec([None, 3, None, None], "float32", INPUT)
    paddle.jit.save(model, str(folder / "model"), input_spec=[spec])
    (folder / "model.pdiparams.info").unlink(missing_ok=True)
