"""The layouts that name RepLKNet's parameters, and the way between each and the native one.

PaddleViT's names are native here; the official PyTorch repository and mmpretrain have others for
the same tensors, and mmsegmentation has names for a UPerNet around it. A file's layout is
recognized by its names.
"""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from replknet_paddle.runtime.errors import InputError

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


def _mmseg(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone." + _official(name.removeprefix("backbone."))
    return _official(name)


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


# Segmentation networks come first: their files have a backbone as mmpretrain names it.
LAYOUTS = {
    "upernet": Layout(
        "native UPerNet", re.compile(r"decode_head\.bottleneck\.norm\."), _same, _same, False
    ),
    "mmseg": Layout(
        "official UPerNet (mmsegmentation)",
        re.compile(r"decode_head\.bottleneck\.bn\."),
        _mmseg,
        _from_official,
        True,
    ),
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
            count_name = new_name.removesuffix("running_var") + BATCH_COUNT
            converted[count_name] = np.zeros((), np.int64)
    return converted


def recognize(names: Collection[str], path: str | os.PathLike) -> Layout:
    """The layout of the names in the file `path`; InputError if they are of no RepLKNet."""
    for layout in LAYOUTS.values():
        if any(layout.mark.match(name) for name in names):
            return layout
    first = ", ".join(list(names)[:4])
    raise InputError(
        f"{path}: is no RepLKNet: none of its {len(names)} names is like "
        f"stages.0.blocks.0.prelkb_bn.weight; it begins with {first or 'nothing'}. Give a RepLKNet "
        "checkpoint under PaddleViT, official PyTorch or mmpretrain names"
    )
