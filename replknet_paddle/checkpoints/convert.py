"""From any published layout of RepLKNet's parameters to the native one, and back.

Three layouts name the same tensors (`Layout`): PaddleViT's, which is native here, the official
PyTorch repository's and mmpretrain's. A file's layout is recognized by its names. Conversion
renames, transposes linear weights, which Paddle keeps as (in, out), and widens half precision.
Nothing is left to chance: every tensor of the file has a place or is on a list of known extras,
every parameter of the network gets a value, and shapes agree; if not, one error lists all that is
wrong, and what the file is and what to change where its shapes tell.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.checkpoints.readers import (
    is_safetensors,
    read_checkpoint,
    read_safetensors_metadata,
)
from replknet_paddle.checkpoints.writers import write_pdparams, write_safetensors
from replknet_paddle.model import build_replknet
from replknet_paddle.runtime.errors import InputError

logger = logging.getLogger(__name__)

WEIGHTS = ("model", "model_ema")

# Metadata entry of the checkpoints that this project's training writes.
METADATA_KEY = "replknet_paddle"

# Where checkpoints keep each kind of weights, in the order of preference.
_CONTAINERS = {"model": ("model", "state_dict"), "model_ema": ("model_ema",)}

# Entries of a state dict that belong there and have no counterpart: PyTorch's count of the
# batches that a batch norm has seen, and Paddle's internal names.
_BATCH_COUNT = "num_batches_tracked"
_SKIPPED = (_BATCH_COUNT, "StructuredToParameterName@@")

# Native and official name of each layer and statistic that differ. The official `bn` of a
# convolution is `norm` here; the norms of whole stages and of the network are `norm` in both.
_OFFICIAL_NAMES = {
    "norm": "bn",
    "_mean": "running_mean",
    "_variance": "running_var",
    "pre_large_kernel_bn": "prelkb_bn",
    "pre_ffn_bn": "preffn_bn",
    "pw_conv_1": "pw1",
    "pw_conv_2": "pw2",
    "large_kernel_origin": "lkb_origin",
    "small_kernel_conv": "small_conv",
    "large_kernel_reparam": "lkb_reparam",
}
_NATIVE_NAMES = {official: native for native, official in _OFFICIAL_NAMES.items()}
_FEATURE_NORM = re.compile(r"(stages\.\d+\.)?norm\.")

# Native and mmpretrain's prefix, besides the `backbone.` that everything else has.
_MMPRETRAIN_PREFIXES = {"norm.": "backbone.stages.3.norm.", "head.": "head.fc."}


def _same(name: str) -> str:
    return name


def _official(name: str) -> str:
    """Official PyTorch name of a native one."""
    *path, last = name.split(".")
    if not _FEATURE_NORM.match(name):
        path = [_OFFICIAL_NAMES.get(part, part) for part in path]
    return ".".join([*path, _OFFICIAL_NAMES.get(last, last)])


def _from_official(name: str) -> str:
    return ".".join(_NATIVE_NAMES.get(part, part) for part in name.split("."))


def _mmpretrain(name: str) -> str:
    for native, theirs in _MMPRETRAIN_PREFIXES.items():
        if name.startswith(native):
            return theirs + _official(name).removeprefix(native)
    return "backbone." + _official(name)


def _from_mmpretrain(name: str) -> str:
    for native, theirs in _MMPRETRAIN_PREFIXES.items():
        if name.startswith(theirs):
            return native + _from_official(name.removeprefix(theirs))
    return _from_official(name.removeprefix("backbone."))


@dataclass(frozen=True)
class Layout:
    """One way of naming the parameters.

    Attributes:
        title: as people call it.
        mark: what the name of some tensor matches in this layout alone.
        from_native: its name for a native one.
        to_native: native name for one of its own.
        is_torch: PyTorch's conventions: linear weights (out, in), `num_batches_tracked`.
    """

    title: str
    mark: re.Pattern
    from_native: Callable[[str], str]
    to_native: Callable[[str], str]
    is_torch: bool


LAYOUTS = {
    "native": Layout(
        "PaddleViT",
        re.compile(r"stages\.\d+\.blocks\.\d+\.pre_large_kernel_bn\."),
        _same,
        _same,
        False,
    ),
    "official": Layout(
        "official PyTorch",
        re.compile(r"stages\.\d+\.blocks\.\d+\.prelkb_bn\."),
        _official,
        _from_official,
        True,
    ),
    "mmpretrain": Layout(
        "mmpretrain",
        re.compile(r"backbone\.stages\.\d+\.blocks\.\d+\.prelkb_bn\."),
        _mmpretrain,
        _from_mmpretrain,
        True,
    ),
}


def load_pretrained(
    model, path: str | os.PathLike, *, weights: str = "model", drop_head: bool = False
) -> None:
    """Set every parameter and statistic of `model` from a checkpoint file in any known layout.

    A network without a head (OUT_INDICES is set) takes a classifier's file and leaves the final
    norm and head; the extra norms of its maps (NORM_INTER_FEATURES) stay fresh if the file has
    none. Tensors are copied one by one, straight from the file.

    Args:
        model: a `replknet.RepLKNet`.
        path: the file, of any format that `zoo.readers` reads.
        weights: 'model', or 'model_ema' for the moving average that a training checkpoint keeps.
        drop_head: leave the head fresh where the file's is missing or has other classes.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: it cannot be read, or does not fit; nothing has been loaded then.
    """
    state = _read_native(path, weights)
    kept = _fit(state, _shapes(model), path, drop_head=drop_head)
    target = model.state_dict()
    for name in kept:
        target[name].set_value(_as_float32(state[name]))
    logger.info("loaded %d tensors from %s (%s)", len(kept), path, weights)


def load_state(path: str | os.PathLike, *, weights: str = "model") -> dict[str, np.ndarray]:
    """The parameters and statistics in a checkpoint file, under native names, as float32.

    Those that are float32 in the file are read-only views of it.

    Args:
        path: the file, of any format that `zoo.readers` reads.
        weights: 'model', or 'model_ema' for the moving average that a training checkpoint keeps.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        InputError: it cannot be read or is no RepLKNet; the message names the file.
    """
    state = _read_native(path, weights)
    return dict(_Float32(state))


def convert_file(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    config,
    *,
    weights: str = "model",
    layout: str = "native",
) -> int:
    """Write the weights of one file to another, in another format or layout.

    Args:
        source: a file of any format that `zoo.readers` reads, in any layout.
        destination: ends in .safetensors, or in .pdparams, which is for native names alone.
        config: of the network, which the file has to fit.
        weights: 'model', or 'model_ema' for the moving average in a training checkpoint.
        layout: a key of `LAYOUTS`, the names to write.

    Returns:
        Number of tensors written.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        InputError: it cannot be read or does not fit, or the destination cannot be written so.
        OSError: the destination cannot be written.
    """
    suffix = Path(destination).suffix
    if suffix not in (".safetensors", ".pdparams"):
        raise InputError(f"{destination}: ends in {suffix!r}; allowed: .safetensors, .pdparams")
    if suffix == ".pdparams" and layout != "native":
        raise InputError(
            f"{destination}: .pdparams files have native names; write {layout} names "
            "to a .safetensors file"
        )
    state = _read_native(source, weights)
    names = _fit(state, parameter_shapes(config), source)
    state = _Float32(from_native({name: state[name] for name in names}, layout))
    if suffix == ".pdparams":
        write_pdparams(destination, state)
    else:
        framework = "pt" if LAYOUTS[layout].is_torch else "pd"
        write_safetensors(destination, state, {"format": framework})
    return len(state)


def parameter_shapes(config) -> dict[str, tuple[int, ...]]:
    """Native name and shape of each parameter and statistic of the network that `config` builds."""
    with paddle.LazyGuard():  # without memory for the values
        model = build_replknet(config)
    return _shapes(model)


def _shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def from_native(state: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """A native state under the names, and in the conventions, of another layout.

    PyTorch layouts get a `num_batches_tracked` of 0 for each batch norm: the count is not kept
    here, and loaders that check names ask for it.

    Args:
        state: tensors by native name.
        layout: a key of `LAYOUTS`.

    Raises:
        InputError: two tensors would get one name.
    """
    target = LAYOUTS[layout]
    converted = {}
    for name, value in state.items():
        new_name = target.from_native(name)
        if new_name in converted:
            raise InputError(
                f"{target.title} files have one place, {new_name}, for the final norm "
                "and for that of the last stage; this network has both"
            )
        is_linear = target.is_torch and value.ndim == 2
        converted[new_name] = value.T if is_linear else value
        if target.is_torch and name.endswith("._variance"):
            count_name = new_name.removesuffix("running_var") + _BATCH_COUNT
            converted[count_name] = np.zeros((), np.int64)
    return converted


def _read_native(path: str | os.PathLike, weights: str) -> dict[str, np.ndarray]:
    """The file's tensors under native names, in their own precision."""
    state = _choose(read_checkpoint(path), path, weights)
    if not all(isinstance(name, str) for name in state):
        raise InputError(f"{path}: holds values under numbers, not tensors by name")
    state = {name: value for name, value in state.items() if name.split(".")[-1] not in _SKIPPED}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    layout = _recognize(state, path)
    native = {}
    for name, value in state.items():
        new_name = layout.to_native(name)
        if new_name in native:
            raise InputError(f"{path}: {name} and another tensor are both {new_name}")
        if not isinstance(value, np.ndarray):
            raise InputError(f"{path}: {name} is a {type(value).__name__}, not a tensor")
        if value.dtype.kind != "f" and value.dtype != np.uint16:
            raise InputError(f"{path}: {name} holds {value.dtype}, not floating point numbers")
        is_linear = layout.is_torch and value.ndim == 2
        native[new_name] = value.T if is_linear else value
    is_backbone = "stages.0.norm.weight" in native and "head.weight" not in native
    if layout is LAYOUTS["mmpretrain"] and is_backbone:
        # What would be a classifier's final norm is the last stage's own.
        native = {
            re.sub(r"^norm\.", "stages.3.norm.", name): value for name, value in native.items()
        }
    return native


def _choose(content: object, path: str | os.PathLike, weights: str) -> dict:
    """The state dict meant by `weights` out of what a file holds."""
    if weights not in WEIGHTS:
        raise InputError(f"weights is {weights!r}; allowed: {', '.join(WEIGHTS)}")
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not tensors by name")
    if is_safetensors(path) and METADATA_KEY in read_safetensors_metadata(path):
        content = _nested(content)
    for key in _CONTAINERS[weights]:
        if isinstance(content.get(key), dict):
            return content[key]
    if any(isinstance(content.get(key), dict) for keys in _CONTAINERS.values() for key in keys):
        raise InputError(f"{path}: holds no {weights}; it holds {', '.join(map(str, content))}")
    if weights == "model_ema":
        raise InputError(
            f"{path}: holds one set of weights and no moving average; load it with "
            "MODEL.PRETRAINED_WEIGHTS: model"
        )
    return content


def _nested(content: dict[str, np.ndarray]) -> dict[str, dict]:
    """A training checkpoint of this project, whose names begin with the part they belong to."""
    parts: dict[str, dict] = {}
    for name, value in content.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    return parts


def _recognize(state: Mapping[str, object], path: str | os.PathLike) -> Layout:
    for layout in LAYOUTS.values():
        if any(layout.mark.match(name) for name in state):
            return layout
    names = ", ".join(list(state)[:4])
    raise InputError(
        f"{path}: is no RepLKNet: none of its {len(state)} names is like "
        f"stages.0.blocks.0.prelkb_bn.weight; it begins with {names or 'nothing'}. Give a RepLKNet "
        "checkpoint under PaddleViT, official PyTorch or mmpretrain names"
    )


class _Float32(Mapping):
    """Tensors that are converted when they are asked for, so that few are in memory at a time."""

    def __init__(self, state: Mapping[str, np.ndarray]):
        self.state = state

    def __getitem__(self, name: str) -> np.ndarray:
        return _as_float32(self.state[name])

    def __iter__(self):
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def _as_float32(value: np.ndarray) -> np.ndarray:
    """`value` as an aligned, contiguous float32 array; itself if it is one, or is a count."""
    if value.dtype.kind == "i":
        return value
    if value.dtype == np.uint16:
        # Paddle stores bfloat16, which numpy lacks, as its bits: the upper half of a float32.
        value = (value.astype(np.uint32) << 16).view(np.float32)
    return np.require(value, np.float32, ["C", "A"])


# What does not fit, and why

_LISTED_KINDS = 40


def _fit(
    state: Mapping[str, np.ndarray],
    target: Mapping[str, tuple],
    path: str | os.PathLike,
    *,
    drop_head: bool = False,
) -> list[str]:
    """The names to load, if with what is allowed to differ they are those of the network.

    Raises:
        InputError: they are not; the message lists all that is wrong.
    """
    wanted = dict(target)
    found = {name: value.shape for name, value in state.items()}
    head = {"head.weight", "head.bias"}
    if not head & wanted.keys():
        found = {
            name: shape for name, shape in found.items() if not name.startswith(("norm.", "head."))
        }
    elif drop_head and any(found.get(name) != wanted[name] for name in head):
        logger.warning(
            "the head of %s (%s) is not loaded; the network keeps its fresh one for %d classes",
            path,
            _classes(found),
            wanted["head.bias"][0],
        )
        found = {name: shape for name, shape in found.items() if name not in head}
        wanted = {name: shape for name, shape in wanted.items() if name not in head}
    stage_norms = {name for name in wanted if re.match(r"stages\.\d+\.norm\.", name)}
    if stage_norms and not stage_norms & found.keys():
        logger.warning(
            "%s has no norms for the maps of stages; the network keeps its fresh ones", path
        )
        wanted = {name: shape for name, shape in wanted.items() if name not in stage_norms}

    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    if not missing and not unexpected and not misshaped:
        return list(wanted)
    lines = [f"{path}: does not fit the network"]
    lines += _advice(_architecture(found), _architecture(wanted))
    # Under native names, whatever the file's are.
    lines += _listed("missing from the file", missing)
    lines += _listed("unexpected in the file", unexpected)
    lines += _listed(
        "of another shape", misshaped, lambda name: f"file {found[name]}, network {wanted[name]}"
    )
    raise InputError("\n".join(lines))


def _classes(shapes: Mapping[str, tuple]) -> str:
    return f"{shapes['head.bias'][0]} classes" if "head.bias" in shapes else "none"


def _listed(title: str, names: list[str], detail: Callable[[str], str] | None = None) -> list[str]:
    """Lines that list all `names`; a layer's tensors share one, as do layers of other indices."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.sub(r"\.\d+(?=\.)", ".*", name).rpartition(".")[0]
        groups.setdefault(layer, []).append(name)
    lines = [f"  {len(names)} {title}:"] if names else []
    for layer, members in list(groups.items())[:_LISTED_KINDS]:
        tensors = list(dict.fromkeys(name.rpartition(".")[2] for name in members))
        line = f"    {members[0]}"
        if len(members) > 1:
            tensor = tensors[0] if len(tensors) == 1 else f"{{{', '.join(tensors)}}}"
            line = f"    {len(members)} x {layer}.{tensor}"
        if detail is not None:
            line += f"{', the first' if len(members) > 1 else ''}: {detail(members[0])}"
        lines.append(line)
    if len(groups) > _LISTED_KINDS:
        lines.append(f"    and {len(groups) - _LISTED_KINDS} more kinds")
    return lines


_VARIANTS = {
    "31B": {"MODEL.CHANNELS": [128, 256, 512, 1024], "MODEL.LARGE_KERNEL_SIZES": [31, 29, 27, 13]},
    "31L": {"MODEL.CHANNELS": [192, 384, 768, 1536], "MODEL.LARGE_KERNEL_SIZES": [31, 29, 27, 13]},
    "XL": {"MODEL.CHANNELS": [256, 512, 1024, 2048], "MODEL.LARGE_KERNEL_SIZES": [27, 27, 27, 13]},
    "13": {"MODEL.CHANNELS": [128, 256, 512, 1024], "MODEL.LARGE_KERNEL_SIZES": [13, 13, 13, 13]},
}


def _architecture(shapes: Mapping[str, tuple]) -> dict[str, object] | None:
    """The configuration of the network that has these parameters; None if no RepLKNet has them.

    SMALL_KERNEL is left out for merged networks and NUM_CLASSES for those without a head.
    """
    try:
        first = [f"stages.{stage}.blocks.0." for stage in range(4)]
        merged = f"{first[0]}large_kernel.large_kernel_reparam.weight" in shapes
        large = "large_kernel_reparam" if merged else "large_kernel_origin.conv"
        kernels = [shapes[f"{prefix}large_kernel.{large}.weight"] for prefix in first]
        channels = [shapes[f"{prefix}pre_large_kernel_bn.weight"][0] for prefix in first]
        hidden = shapes["stages.0.blocks.1.pw_conv_1.conv.weight"][0]
        found = {
            "MODEL.CHANNELS": channels,
            "MODEL.LAYERS": [_count_blocks(shapes, stage) // 2 for stage in range(4)],
            "MODEL.LARGE_KERNEL_SIZES": [kernel[-1] for kernel in kernels],
            "MODEL.DW_RATIO": kernels[0][0] / channels[0],
            "MODEL.FFN_RATIO": hidden / channels[0],
            "MODEL.SMALL_KERNEL_MERGED": merged,
        }
        if not merged:
            small = shapes.get(f"{first[0]}large_kernel.small_kernel_conv.conv.weight")
            found["MODEL.SMALL_KERNEL"] = small[-1] if small else None
        if "head.bias" in shapes:
            found["MODEL.NUM_CLASSES"] = shapes["head.bias"][0]
        return found
    except (KeyError, IndexError, ZeroDivisionError):
        return None


def _count_blocks(shapes: Iterable[str], stage: int) -> int:
    prefix = f"stages.{stage}.blocks."
    return len({name.split(".")[3] for name in shapes if name.startswith(prefix)})


def _advice(file: dict[str, object] | None, network: dict[str, object] | None) -> list[str]:
    """Lines that say what the file is, what the network is, and which keys make them agree."""
    if file is None or network is None:
        return []
    lines = [f"  the file is {_title(file)}; the network is {_title(network)}"]
    change = {
        key: value
        for key, value in file.items()
        if key in network and not _equal(value, network[key])
    }
    if not change:
        return lines
    if change.get("MODEL.SMALL_KERNEL_MERGED") is False:
        lines.append(
            "  to load it, set MODEL.SMALL_KERNEL_MERGED: False, and merge the network "
            "once it is loaded"
        )
        del change["MODEL.SMALL_KERNEL_MERGED"]
    if change:
        keys = ", ".join(f"{key}: {value}" for key, value in change.items())
        lines.append(f"  to load it, use its own config, or set {keys}")
    if set(change) == {"MODEL.NUM_CLASSES"}:
        lines.append("  to fine-tune from it with a fresh head, set MODEL.DROP_HEAD: True")
    return lines


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=1e-3)
    return one == other


def _title(architecture: dict[str, object]) -> str:
    name = next(
        (
            f"RepLKNet-{variant}"
            for variant, keys in _VARIANTS.items()
            if keys.items() <= architecture.items()
        ),
        f"a RepLKNet of channels {architecture['MODEL.CHANNELS']} and large kernels "
        f"{architecture['MODEL.LARGE_KERNEL_SIZES']}",
    )
    form = "merged" if architecture["MODEL.SMALL_KERNEL_MERGED"] else "train form"
    classes = architecture.get("MODEL.NUM_CLASSES")
    return f"{name} ({form}, {f'{classes} classes' if classes else 'no head'})"
