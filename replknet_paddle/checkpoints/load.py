"""Loading a checkpoint of any published layout into a network, and converting files.

A file's tensors are renamed (see `names`), linear weights are transposed, which Paddle keeps as
(in, out), and half precision is widened. Every tensor of the file has to have a place or be on a
list of known extras, every parameter of the network has to get a value, and shapes have to agree;
if not, one error lists all that is wrong.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.checkpoints.checkpoint_file import (
    WEIGHTS,
    CheckpointFile,
    open_checkpoint,
    weights_metadata,
)
from replknet_paddle.checkpoints.files import write_pdparams, write_safetensors
from replknet_paddle.checkpoints.names import (
    BATCH_COUNT,
    LAYOUTS,
    fitting_names,
    from_native,
    recognize,
)
from replknet_paddle.checkpoints.pickles import widened
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError

logger = logging.getLogger(__name__)

# Where checkpoints keep each kind of weights, in the order of preference; the last is timm's.
_CONTAINERS = {
    "model": ("model", "state_dict"),
    "model_ema": ("model_ema", "state_dict_ema"),
}

# mmengine's entry beside `state_dict`. It swaps the two when it saves: `state_dict` holds the EMA
# weights, and this one those that were trained.
_SWAPPED = "ema_state_dict"

# Entries of a state dict that belong there and have no counterpart: PyTorch's count of the
# batches that a batch norm has seen, Paddle's internal names, and counts of profilers (thop).
_SKIPPED = (BATCH_COUNT, "StructuredToParameterName@@", "total_ops", "total_params")

# What PyTorch's wrappers put before every name: data parallel ones, and `torch.compile`.
_WRAPPERS = re.compile(r"(module\.|_orig_mod\.)*")


def load_pretrained(
    model: paddle.nn.Layer,
    source: str | os.PathLike[str] | CheckpointFile,
    *,
    weights: str = "auto",
    drop_head: bool = False,
    other_classes: bool = False,
) -> None:
    """Set every parameter and statistic of `model` from a checkpoint file in any known layout.

    A network without a head (OUT_INDICES is set) takes a classifier's file and leaves the final
    norm and head; the extra norms of its maps (NORM_INTER_FEATURES) stay fresh if the file has
    none. Tensors are copied one by one, straight from the file.

    Args:
        model: a `RepLKNet`, or a `UPerNet` around one.
        source: the file, of any format that `files` reads, or its path.
        weights: 'model', 'model_ema' for the EMA weights of a training checkpoint, or 'auto'; see
            `CheckpointFile.ema_or_raw`.
        drop_head: leave the head fresh where the file's is missing or of another size.
        other_classes: with `drop_head`, leave it fresh in any case: the classes are others.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read, or does not fit; nothing has been loaded then.
    """
    file = open_checkpoint(source)
    state = _native_tensors(file, weights)
    target = model.state_dict()
    names = fitting_names(
        _shapes(state),
        _shapes(target),
        file.path,
        drop_head=drop_head,
        other_classes=other_classes,
    )
    for name in names:
        target[name].set_value(_as_float32(state[name]))
    taken = WEIGHTS[file.ema_or_raw(weights)]
    logger.info("loaded %d tensors from the %s of %s", len(names), taken, file.path)


def load_state(
    source: str | os.PathLike | CheckpointFile, *, weights: str = "auto"
) -> dict[str, np.ndarray]:
    """Return the parameters and statistics in a checkpoint file, by native name, as float32.

    `weights` is as of `load_pretrained`. Arrays may be views of the file, not to be written to.
    """
    state = _native_tensors(open_checkpoint(source), weights)
    return {name: _as_float32(value) for name, value in state.items()}


def convert_file(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    config,
    *,
    weights: str = "auto",
    layout: str = "native",
    build: Callable = build_replknet,
) -> int:
    """Write the weights of one file, which has to fit the network of `config`, to a .safetensors or
    .pdparams file under the names of `layout`; return the number of tensors written.

    `weights` is as of `load_pretrained`, and `build` makes the network.
    """
    suffix = Path(destination).suffix
    if suffix not in (".safetensors", ".pdparams"):
        raise InputError(f"{destination}: ends in {suffix!r}; allowed: .safetensors, .pdparams")
    is_torch = LAYOUTS[layout].is_torch
    if suffix == ".pdparams" and is_torch:
        raise InputError(
            f"{destination}: .pdparams files have native names; write {layout} names "
            "to a .safetensors file"
        )
    file = CheckpointFile(source)
    state = _native_tensors(file, weights)
    names = fitting_names(_shapes(state), parameter_shapes(config, build), source)
    state = from_native({name: _as_float32(state[name]) for name in names}, layout)
    if suffix == ".pdparams":
        write_pdparams(destination, state)
    else:
        metadata = weights_metadata(config, file.classes.names)
        write_safetensors(destination, state, {"format": "pt" if is_torch else "pd", **metadata})
    return len(state)


def parameter_shapes(config, build: Callable = build_replknet) -> dict[str, tuple[int, ...]]:
    """Return native name and shape of each parameter and statistic of `config`'s network."""
    with paddle.LazyGuard():  # without memory for the values
        model = build(config)
    return _shapes(model.state_dict())


def layout_of(source: str | os.PathLike | CheckpointFile, *, weights: str = "model") -> str:
    """Return the key of `LAYOUTS` that the names in a checkpoint file have."""
    file = open_checkpoint(source)
    return recognize(_named_tensors(file, weights), file.path)


def _shapes(state: Mapping) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _named_tensors(file: CheckpointFile, weights: str) -> dict[str, np.ndarray]:
    """Return the file's tensors under its own names, without what has no counterpart."""
    content = file.content if file.parts is None else file.parts
    if not isinstance(content, dict):
        raise InputError(f"{file.path}: holds a {type(content).__name__}, not tensors by name")
    if _SWAPPED in content:
        content = _unswapped(content, weights)
    state = _chosen(content, file.path, file.ema_or_raw(weights))
    if not all(isinstance(name, str) for name in state):
        raise InputError(f"{file.path}: holds values under numbers, not tensors by name")
    state = {name: value for name, value in state.items() if name.split(".")[-1] not in _SKIPPED}
    wrappers = _WRAPPERS.match(os.path.commonprefix([*state]))[0]
    return {name.removeprefix(wrappers): value for name, value in state.items()}


def _unswapped(content: dict, weights: str) -> dict[str, object]:
    """Return mmengine's checkpoint with both kinds of weights where others keep them.

    'auto' takes those that the run was evaluated with, as mmpretrain does: the EMA weights.
    """
    averaged, trained = content.get("state_dict"), content[_SWAPPED]
    if weights == "auto":
        return {"model": averaged}
    if isinstance(trained, dict):  # and the number of its updates, `steps`
        trained = {k: v for k, v in trained.items() if str(k).startswith("module.")}
    return {"model": trained, "model_ema": averaged}


def _chosen(content: dict, path: str, weights: str) -> dict:
    """Return the state dict meant by `weights` out of what a file holds."""
    for key in _CONTAINERS[weights]:
        if isinstance(content.get(key), dict):
            return content[key]
    if any(isinstance(content.get(key), dict) for keys in _CONTAINERS.values() for key in keys):
        raise InputError(f"{path}: holds no {weights}; it holds {', '.join(map(str, content))}")
    if weights == "model_ema":
        raise InputError(
            f"{path}: holds one set of weights and no EMA weights; load it with "
            "MODEL.PRETRAINED_WEIGHTS: model"
        )
    return content


def _native_tensors(file: CheckpointFile, weights: str) -> dict[str, np.ndarray]:
    """Return the file's tensors under native names, in their own precision."""
    state = _named_tensors(file, weights)
    key = recognize(state, file.path)
    layout = LAYOUTS[key]
    native = {}
    for name, value in state.items():
        new_name = layout.to_native(name)
        if new_name in native:
            raise InputError(f"{file.path}: {name} and another tensor are both {new_name}")
        if not isinstance(value, np.ndarray):
            raise InputError(f"{file.path}: {name} is a {type(value).__name__}, not a tensor")
        if value.dtype.kind != "f" and value.dtype != np.uint16:
            raise InputError(f"{file.path}: {name} holds {value.dtype}, not floating point numbers")
        is_linear = layout.is_torch and value.ndim == 2
        native[new_name] = value.T if is_linear else value
    is_backbone = "stages.0.norm.weight" in native and "head.weight" not in native
    if key == "mmpretrain" and is_backbone:
        # What would be a classifier's final norm is the last stage's own.
        return {re.sub(r"^norm\.", "stages.3.norm.", name): native[name] for name in native}
    return native


def _as_float32(value: np.ndarray) -> np.ndarray:
    """Return `value` as an aligned, contiguous float32 array; itself if it is one."""
    if value.dtype == np.uint16:  # Paddle's own files hold bfloat16 as its bits
        value = widened(value)
    return np.require(value, np.float32, ["C", "A"])
