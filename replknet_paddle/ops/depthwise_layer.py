"""The layer of large-kernel depthwise convolutions, and the swap of built layers for it."""

from collections import Counter

import paddle
from paddle import nn

from replknet_paddle.ops.depthwise_conv import (
    KERNEL_SIZES,
    SMALLEST_PRODUCT_KERNEL,
    check_arguments,
    compute,
    wants_gradients,
)
from replknet_paddle.ops.dispatch import DTYPES, as_one_operation, check_impl, pair, use_operator
from replknet_paddle.ops.frozen import kept_by
from replknet_paddle.ops.matmul_plan import DEFAULT_MEMORY_BYTES


@as_one_operation
class FastDepthwiseConv2D(nn.Conv2D):
    """A depthwise `nn.Conv2D` that computes by `large_kernel_depthwise_conv2d`.

    Only the class of a layer changes (`use_fast_depthwise_conv`): parameters, their names, hooks
    and settings stay those of `nn.Conv2D`.

    While a program is captured (`to_static`, `jit.save`) in evaluation mode it is Paddle's
    convolution, so that exported models run where there is no such operator, or with `matmul` the
    products, which are Paddle's operations, too. In training mode the program has the operator.
    """

    impl = "auto"
    memory_bytes = DEFAULT_MEMORY_BYTES

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        captured = not paddle.in_dynamic_mode()
        is_paddles = captured and not self.training and self.impl != "matmul"
        if is_paddles or self.weight.dtype not in DTYPES:
            return nn.Conv2D.forward(self, x)
        if not captured and not x.is_contiguous():
            x = x.contiguous()
        check_arguments(x, self.weight, self.bias, None, self.impl)
        return compute(
            x,
            self.weight,
            self.bias,
            self.impl,
            self.memory_bytes,
            # Recomputation runs without gradients first.
            training=self.training or wants_gradients(x, self.weight),
            kept=None if captured else kept_by(self),
        )


def is_eligible(layer: nn.Layer) -> bool:
    """Whether a layer is a convolution that `FastDepthwiseConv2D` can compute."""
    if type(layer) not in (nn.Conv2D, FastDepthwiseConv2D):
        return False
    height, width = layer._kernel_size
    channels = layer._in_channels
    same = height // 2
    return (
        layer._groups == channels == layer._out_channels
        and height == width
        and height >= 3
        and height % 2 == 1
        and pair(layer._stride) == [1, 1]
        and pair(layer._dilation) == [1, 1]
        and layer._padding_mode == "zeros"
        and layer._data_format == "NCHW"
        and pair(layer._padding) == [same, same]
    )


def use_fast_depthwise_conv(
    model: nn.Layer, impl: str = "auto", *, memory_bytes: int = DEFAULT_MEMORY_BYTES
) -> int:
    """Choose what computes the depthwise convolutions of a built network, in place.

    Eligible are those with stride and dilation 1, "same" padding of zeros, and a square kernel of
    odd size from 3 up. Parameters and their names stay as they are.

    Args:
        model: any network.
        impl: see `large_kernel_depthwise_conv2d`. On CPU, `auto`, `direct` and `fft` take the
            compiled operator for kernels up to 63, and `auto` leaves the layers to Paddle, and
            logs why, where it is unavailable. `matmul` on every device and `auto` on GPU are for
            kernels from 7 up; smaller ones are computed as with `auto` on CPU, and by Paddle on
            GPU. `paddle` makes the layers Paddle's own again; on GPU large ones then stay in
            float32 under mixed precision, because Paddle accumulates in the type of the tensors.
        memory_bytes: bound of the products of a layer beside its inputs and outputs, and of what
            `frozen_weights` keeps.

    Returns:
        How many layers are computed otherwise than by Paddle's own convolution, with `auto` on GPU
        perhaps.

    Raises:
        InputError: an unknown impl, or one that is not available here.
    """
    check_impl(impl)
    on_cpu = paddle.device.get_device() == "cpu"
    small = "auto" if impl == "matmul" else impl
    operator = use_operator(small, on_cpu)
    count = 0
    for layer in model.sublayers(include_self=True):
        if not is_eligible(layer):
            continue
        kernel = layer._kernel_size[0]
        is_large = kernel >= SMALLEST_PRODUCT_KERNEL
        by = None
        if is_large and (impl == "matmul" or not on_cpu):
            by = impl
        elif operator and kernel in KERNEL_SIZES:
            by = small
        layer.__class__ = nn.Conv2D if by is None else FastDepthwiseConv2D
        for name in ("impl", "memory_bytes"):
            layer.__dict__.pop(name, None)
        if by is not None:
            layer.impl, layer.memory_bytes = by, memory_bytes
            count += by != "paddle"
    return count


def large_kernel_layers(model: nn.Layer) -> list[nn.Layer]:
    """The layers of `FastDepthwiseConv2D`, whose weights stay float32 in mixed precision."""
    return [x for x in model.sublayers(include_self=True) if isinstance(x, FastDepthwiseConv2D)]


def describe_convolutions(model: nn.Layer) -> str:
    """What computes the depthwise convolutions of a network that are swapped, for the log."""
    on_cpu = paddle.device.get_device() == "cpu"
    names = {"matmul": "matrix products", "paddle": "Paddle's own convolution in float32"}
    counts = Counter(
        names.get(layer.impl, "the compiled operator" if on_cpu else "what is faster on this GPU")
        for layer in large_kernel_layers(model)
    )
    return ", ".join(f"{count} by {name}" for name, count in counts.items()) or "all by Paddle"
