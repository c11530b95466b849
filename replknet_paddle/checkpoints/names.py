"""Parameter names: the layouts of published files, and whether a file's tensors fit a network.

PaddleViT's names are native here; the official PyTorch repository and mmpretrain have others for
the same tensors, and mmsegmentation has names for a UPerNet around it. A file's layout is
recognized by its names. Where its tensors do not fit a network, the error says what the file is and
what to change.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from replknet_paddle.runtime.errors import InputError, counted

logger = logging.getLogger(__name__)

# PyTorch's count of the batches that a batch norm has seen, which has no native counterpart.
BATCH_COUNT = "num_batches_tracked"

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
_FEATURE_NORM = re.compile(r"(backbone\.)?(stages\.\d+\.)?norm\.")

# Native and mmpretrain's prefix, besides the `backbone.` that everything else has.
_MMPRETRAIN_PREFIXES = {"norm.": "backbone.stages.3.norm.", "head.": "head.fc."}


def _official(name: str) -> str:
    """Return the official PyTorch name of a native one; mmsegmentation's of one of a UPerNet."""
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
    """One way of naming the parameters."""

    title: str  # as people call it
    mark: str  # what the name of some tensor matches in this layout alone
    from_native: Callable[[str], str]
    to_native: Callable[[str], str]
    is_torch: bool  # PyTorch's conventions: linear weights (out, in), `num_batches_tracked`


_BLOCK = r"stages\.\d+\.blocks\.\d+\."
_UPERNET = r"decode_head\.bottleneck\."

# Segmentation networks come first: their files have a backbone as mmpretrain names it.
LAYOUTS = {
    "upernet": Layout("native UPerNet", rf"{_UPERNET}norm\.", str, str, False),
    "mmseg": Layout(
        "official UPerNet (mmsegmentation)", rf"{_UPERNET}bn\.", _official, _from_official, True
    ),
    "native": Layout("PaddleViT", rf"{_BLOCK}pre_large_kernel_bn\.", str, str, False),
    "official": Layout(
        "official PyTorch", rf"{_BLOCK}prelkb_bn\.", _official, _from_official, True
    ),
    "mmpretrain": Layout(
        "mmpretrain", rf"backbone\.{_BLOCK}prelkb_bn\.", _mmpretrain, _from_mmpretrain, True
    ),
}


def from_native(state: Mapping[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """Return a native state under the names, and in the conventions, of a layout of `LAYOUTS`.

    PyTorch layouts get a `num_batches_tracked` of 0 for each batch norm: the count is not kept
    here, and loaders that check names ask for it. InputError: two tensors would get one name.
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
            count_name = new_name.removesuffix("running_var") + BATCH_COUNT
            converted[count_name] = np.zeros((), np.int64)
    return converted


def recognize(names: Collection[str], path: str | os.PathLike) -> str:
    """Return the key of the layout of the names in the file `path`; InputError: no RepLKNet's."""
    for key, layout in LAYOUTS.items():
        if any(re.match(layout.mark, name) for name in names):
            return key
    first = ", ".join(list(names)[:4])
    raise InputError(
        f"{path}: is no RepLKNet: none of its {len(names)} names is like "
        f"stages.0.blocks.0.prelkb_bn.weight; it begins with {first or 'nothing'}. Give a RepLKNet "
        "checkpoint under PaddleViT, official PyTorch or mmpretrain names"
    )


# ---- whether tensors fit

_LISTED_KINDS = 40

# What has one output per class, and may be left fresh for other classes.
_CLASSIFIERS = ("head", "decode_head.conv_seg", "auxiliary_head.conv_seg")


def fitting_names(
    found: Mapping[str, tuple],
    wanted: Mapping[str, tuple],
    path: str | os.PathLike,
    *,
    drop_head: bool = False,
    other_classes: bool = False,
) -> list[str]:
    """Return the names to load, if the shapes of the file's tensors are those that are wanted.

    Where not, an InputError lists all that is wrong. With `drop_head` the head is left out where it
    differs, and with `other_classes` in any case.
    """

    def without(names, shapes: Mapping[str, tuple]) -> dict[str, tuple]:
        return {name: shape for name, shape in shapes.items() if name not in names}

    head = {name for name in wanted if name.rpartition(".")[0] in _CLASSIFIERS}
    if not head:
        unused = {name for name in found if name.startswith(("norm.", "head."))} - wanted.keys()
        found = without(unused, found)
    elif drop_head and (other_classes or any(found.get(name) != wanted[name] for name in head)):
        logger.warning(
            "the head of %s (%s) is not loaded; the network keeps its fresh one for %s",
            path,
            _classes(found),
            _classes(wanted),
        )
        found, wanted = without(head, found), without(head, wanted)
    stage_norms = {name for name in wanted if re.match(r"stages\.\d+\.norm\.", name)}
    if stage_norms and not stage_norms & found.keys():
        logger.warning(
            "%s has no norms for the maps of stages; the network keeps its fresh ones", path
        )
        wanted = without(stage_norms, wanted)

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
    bias = next((f"{layer}.bias" for layer in _CLASSIFIERS if f"{layer}.bias" in shapes), None)
    return "none" if bias is None else counted(shapes[bias][0], "class")


def _listed(title: str, names: list[str], detail: Callable[[str], str] | None = None) -> list[str]:
    """Return lines of `names`; a layer's tensors share one, as do layers of other indices."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.sub(r"\.\d+(?=\.)", ".*", name).rpartition(".")[0]
        groups.setdefault(layer, []).append(name)
    lines = [f"  {len(names)} {title}:"] if names else []
    for layer, members in list(groups.items())[:_LISTED_KINDS]:
        tensors = list(dict.fromkeys(name.rpartition(".")[2] for name in members))
        line, first = f"    {members[0]}", ""
        if len(members) > 1:
            tensor = tensors[0] if len(tensors) == 1 else f"{{{', '.join(tensors)}}}"
            line, first = f"    {len(members)} x {layer}.{tensor}", ", the first"
        lines.append(line if detail is None else f"{line}{first}: {detail(members[0])}")
    if len(groups) > _LISTED_KINDS:
        lines.append(f"    and {len(groups) - _LISTED_KINDS} more kinds")
    return lines


# Channels and large kernels of the published variants.
_VARIANTS = {
    "31B": ([128, 256, 512, 1024], [31, 29, 27, 13]),
    "31L": ([192, 384, 768, 1536], [31, 29, 27, 13]),
    "XL": ([256, 512, 1024, 2048], [27, 27, 27, 13]),
    "13": ([128, 256, 512, 1024], [13, 13, 13, 13]),
}


def _architecture(shapes: Mapping[str, tuple]) -> dict[str, object] | None:
    """Return the configuration of the network with these parameters; None if no RepLKNet has them.

    SMALL_KERNEL is left out for merged networks and NUM_CLASSES for those without a head.
    """
    try:
        first = [f"stages.{stage}.blocks.0." for stage in range(4)]
        merged = f"{first[0]}large_kernel.large_kernel_reparam.weight" in shapes
        large = "large_kernel_reparam" if merged else "large_kernel_origin.conv"
        kernels = [shapes[f"{prefix}large_kernel.{large}.weight"] for prefix in first]
        channels = [shapes[f"{prefix}pre_large_kernel_bn.weight"][0] for prefix in first]
        hidden = shapes["stages.0.blocks.1.pw_conv_1.conv.weight"][0]
        blocks = {tuple(name.split(".")[1:4:2]) for name in shapes if ".blocks." in name}
        stages = Counter(stage for stage, _ in blocks)
        found = {
            "MODEL.CHANNELS": channels,
            "MODEL.LAYERS": [stages[str(stage)] // 2 for stage in range(4)],
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


def _advice(file: dict[str, object] | None, network: dict[str, object] | None) -> list[str]:
    """Return lines on what the file and the network are, and which keys make them agree."""
    if file is None or network is None:
        return []
    lines = [f"  the file is {_title(file)}; the network is {_title(network)}"]
    change = {key: value for key, value in file.items() if network.get(key, value) != value}
    if change.get("MODEL.SMALL_KERNEL_MERGED") is False:
        del change["MODEL.SMALL_KERNEL_MERGED"]
        lines.append(
            "  to load it, set MODEL.SMALL_KERNEL_MERGED: False, and merge the network "
            "once it is loaded"
        )
    if change:
        keys = ", ".join(f"{key}: {value}" for key, value in change.items())
        lines.append(f"  to load it, use its own config, or set {keys}")
    if set(change) == {"MODEL.NUM_CLASSES"}:
        lines.append("  to fine-tune from it with a fresh head, set MODEL.DROP_HEAD: True")
    return lines


def _title(architecture: dict[str, object]) -> str:
    channels, kernels = (architecture[f"MODEL.{key}"] for key in ("CHANNELS", "LARGE_KERNEL_SIZES"))
    name = f"a RepLKNet of channels {channels} and large kernels {kernels}"
    for variant, sizes in _VARIANTS.items():
        if sizes == (channels, kernels):
            name = f"RepLKNet-{variant}"
    form = "merged" if architecture["MODEL.SMALL_KERNEL_MERGED"] else "train form"
    classes = architecture.get("MODEL.NUM_CLASSES")
    return f"{name} ({form}, {counted(classes, 'class') if classes else 'no head'})"
