"""Fewer layers for inference: small kernels merged into large ones, batch norms into convolutions.

In evaluation mode a batch norm is one multiplication and one addition per channel. After a
convolution they go into its weights and bias; before one they do too, as long as the convolution
pads nothing: padded zeros come after the norm, so folding the norm into a padded convolution would
change the borders. The final norm goes through the global average into the head, for averages
commute with it. What cannot be folded exactly (the norms of single stage maps, where a backbone
has them) stays.

All sums are in float64 and are rounded to float32 once.
"""

import copy
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.model import (
    ConvFFN,
    ConvNorm,
    RepLKBlock,
    RepLKNet,
    fuse_conv_norm,
    scale_and_shift,
    set_weight_and_bias,
)
from replknet_paddle.runtime.errors import InputError


def merged(model: RepLKNet) -> RepLKNet:
    """Return a copy of `model` in evaluation mode, its small kernels merged into the large ones."""
    result = copy.deepcopy(model)
    result.structural_reparam()
    result.eval()
    check_finite(result)
    return result


def check_finite(model: nn.Layer) -> None:
    """Raise InputError for weights or statistics that are not finite."""
    for name, value in model.state_dict().items():
        if not bool(paddle.isfinite(value).all()):
            raise InputError(
                f"the network's weights are broken: {name} has values that are not finite numbers"
            )


def folded(model: RepLKNet) -> RepLKNet:
    """Return a merged copy of `model` in evaluation mode with all batch norms folded that can be.

    Outputs stay the same up to rounding. Its parameters have other names and shapes than those of
    a checkpoint, and it cannot be trained.

    Args:
        model: any RepLKNet, of any form, or a network around one; stays as it is.

    Raises:
        InputError: weights are not finite, before or after.
    """
    result = merged(model)
    with paddle.no_grad():
        for layer in result.sublayers():
            if isinstance(layer, ConvNorm):
                fold_norm_after(layer)
        for layer in result.sublayers():
            if isinstance(layer, RepLKBlock):
                layer.pre_large_kernel_bn = fold_norm_before(
                    layer.pre_large_kernel_bn, layer.pw_conv_1.conv
                )
            elif isinstance(layer, ConvFFN):
                layer.pre_ffn_bn = fold_norm_before(layer.pre_ffn_bn, layer.pw_conv_1.conv)
        if isinstance(result, RepLKNet) and result.out_indices is None:
            fold_final_norm(result)
    check_finite(result)  # negative variances are finite themselves
    return result


def fold_norm_after(layer: ConvNorm) -> None:
    """Turn `layer` into a convolution with bias (and its ReLU)."""
    if not isinstance(layer.norm, nn.Identity):
        set_weight_and_bias(layer.conv, *fuse_conv_norm(layer))
        layer.norm = nn.Identity()


def fold_norm_before(norm: nn.Layer, conv: nn.Conv2D) -> nn.Layer:
    """Return what has to stand before `conv`, which takes over `norm` if that is exact."""
    is_exact = not np.any(conv._padding) and conv._groups == 1
    if isinstance(norm, nn.Identity) or not is_exact:
        return norm
    scale, shift = scale_and_shift(norm)
    weight = conv.weight.astype("float64")
    bias = 0.0 if conv.bias is None else conv.bias.astype("float64")
    bias = bias + paddle.to_tensor(np.einsum("oihw,i->o", weight.numpy(), shift.numpy()))
    set_weight_and_bias(conv, weight * scale.reshape([1, -1, 1, 1]), bias)
    return nn.Identity()


def fold_final_norm(model: RepLKNet) -> None:
    """Move the final norm behind the global average, into the head, or into one that is made."""
    if isinstance(model.norm, nn.Identity):
        return
    scale, shift = (value.numpy() for value in scale_and_shift(model.norm))
    if isinstance(model.head, nn.Identity):
        model.head = nn.Linear(len(scale), len(scale))  # with a bias of 0
        model.head.weight.set_value(paddle.eye(len(scale)))
    weight = model.head.weight.numpy().astype("float64")  # (in, out)
    bias = model.head.bias.numpy().astype("float64")
    dtype = model.head.weight.dtype
    model.head.weight.set_value(paddle.to_tensor(weight * scale[:, None]).astype(dtype))
    model.head.bias.set_value(paddle.to_tensor(bias + shift @ weight).astype(dtype))
    model.norm = nn.Identity()


@dataclass(frozen=True)
class Form:
    """The size of one form of a network, and how far its outputs are from the first form's."""

    name: str
    parameters: int  # with running statistics
    deviation: float | None  # largest, relative to the largest output; None for the first form

    def __str__(self) -> str:
        size = f"{self.name}: {self.parameters:,} numbers, {4 * self.parameters / 1e6:.1f} MB"
        if self.deviation is None:
            return size
        return f"{size}; outputs differ by at most {self.deviation:.2g} of the largest"


def compare_forms(model: RepLKNet, images: np.ndarray) -> list[Form]:
    """Compare `model` as it is, merged, and folded, on the same images (N, 3, H, W)."""
    forms, reference = [], None
    for name, build in {"as it is": lambda m: m, "merged": merged, "folded": folded}.items():
        form = build(model)
        form.eval()
        with paddle.no_grad():
            outputs = form(paddle.to_tensor(images))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = np.concatenate([output.numpy().reshape(-1) for output in outputs])
        parameters = sum(int(np.prod(value.shape)) for value in form.state_dict().values())
        deviation = None if reference is None else largest_deviation(outputs, reference)
        forms.append(Form(name, parameters, deviation))
        reference = outputs if reference is None else reference
    return forms


def random_images(count: int, size: int) -> np.ndarray:
    """Return normalized noise, float32 (count, 3, size, size), the same in each call."""
    return np.random.default_rng(0).normal(size=(count, 3, size, size)).astype("float32")


def largest_deviation(outputs: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference of logits, relative to the largest logit of `reference`."""
    largest = np.abs(reference).max()
    return float(np.abs(outputs - reference).max() / largest) if largest else float("nan")
