"""1x1 convolutions as matrix products of a library that is fast on every processor.

Four fifths of RepLKNet's multiply-adds are in them. On CPU Paddle's own lead to MKL, which runs at
a sixth of the processor's speed where it is not its maker's; the oneDNN library that Paddle brings
along runs at nearly all of it (docs/kernels.md).
"""

import logging

import paddle
from paddle import nn

from replknet_paddle.ops.dispatch import (
    DTYPES,
    as_one_operation,
    check_impl,
    describe,
    is_on_cpu,
    is_same_conv,
    run_operator,
    use_operator,
)
from replknet_paddle.ops.library import LibraryError, get_library

NO_ONEDNN = "this build of Paddle comes without the oneDNN library that they need (libdnnl.so.3)"

logger = logging.getLogger(__name__)


@as_one_operation
def pointwise_conv2d(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """Return the 1x1 convolution with stride 1 by the compiled operator, on CPU, with gradients.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16.
        weight: (C', C, 1, 1), any of these types.

    Returns:
        (N, C', H, W) in the type of x, computed in float32.

    Raises:
        ValueError: shapes or types that this is not made for.
        LibraryError: there is no compiled operator, or no oneDNN for it.
    """
    got = f"got x {describe(x)}, weight {describe(weight)}"
    if len(x.shape) != 4 or len(weight.shape) != 4 or list(weight.shape[2:]) != [1, 1]:
        raise ValueError(f"x must be (N, C, H, W) and weight (C', C, 1, 1); {got}")
    if x.shape[1] not in (weight.shape[1], -1) or 0 in x.shape[1:]:
        raise ValueError(f"x must have pixels, and the channels that weight takes; {got}")
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(f"x and weight must be float32, float16 or bfloat16; {got}")
    if not get_library().has_pointwise:
        raise LibraryError(NO_ONEDNN)
    return run_operator("pointwise_conv2d", x, weight)


@as_one_operation
class FastPointwiseConv2D(nn.Conv2D):
    """A 1x1 `nn.Conv2D` that computes by `pointwise_conv2d`; see `FastDepthwiseConv2D`."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        captured = not paddle.in_dynamic_mode()
        if (
            (captured and not self.training)
            or not is_on_cpu(x)
            or x.dtype not in DTYPES
            or self.weight.dtype not in DTYPES
        ):
            return nn.Conv2D.forward(self, x)
        y = pointwise_conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.reshape([1, -1, 1, 1]).astype(y.dtype)


def use_fast_pointwise_conv(model: nn.Layer, impl: str = "auto") -> int:
    """Let the 1x1 convolutions of a built network compute by the compiled operator, in place.

    Args:
        model: any network. Parameters and their names stay as they are.
        impl: `paddle` makes the layers Paddle's own again, any other name of
            `use_fast_depthwise_conv` the fast ones where these are available; on GPU `auto` and
            `matmul` leave them to Paddle.

    Returns:
        How many layers compute by the operator now.

    Raises:
        InputError: an unknown impl, or one that is unavailable here.
    """
    check_impl(impl)
    fast = use_operator("auto" if impl == "matmul" else impl, paddle.device.get_device() == "cpu")
    if fast and not get_library().has_pointwise:
        logger.warning("1x1 convolutions run on Paddle's own: %s", NO_ONEDNN)
        fast = False
    layers = [
        layer
        for layer in model.sublayers(include_self=True)
        if is_same_conv(layer, FastPointwiseConv2D)
        and layer._kernel_size == [1, 1]
        and layer._groups == 1
    ]
    for layer in layers:
        layer.__class__ = FastPointwiseConv2D if fast else nn.Conv2D
    return len(layers) if fast else 0
