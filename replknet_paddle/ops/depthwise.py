"""Large-kernel depthwise convolution: the public function, the layer, and the swap of built layers.

On CPU, Paddle computes a depthwise convolution channel by channel through im2col, which for the
31x31 kernels of RepLKNet takes some hundred times as long as the arithmetic; the kernels of csrc/
do it directly or by FFT. On GPU, Paddle has one thread per output that loops over all taps;
`matmul_conv` uses the tensor cores (docs/kernels.md).
"""

from collections import Counter

import paddle
from paddle import nn

from replknet_paddle.ops.cache import WeightCache, cache_of
from replknet_paddle.ops.dispatch import (
    DTYPES,
    as_one_operation,
    autocast_dtype,
    cast,
    check_impl,
    depthwise_conv2d_in_float32,
    describe,
    is_depthwise,
    is_on_cpu,
    is_same_conv,
    large_kernel_depthwise_conv2d_reference,
    run_operator,
    use_operator,
)
from replknet_paddle.ops.gpu_choice import choose
from replknet_paddle.ops.library import ALGORITHMS, get_library
from replknet_paddle.ops.matmul_conv import add_bias, matmul_conv
from replknet_paddle.ops.pointwise import use_fast_pointwise_conv

KERNEL_SIZES = range(3, 64, 2)  # of the compiled operator
SMALLEST_PRODUCT_KERNEL = 7  # Paddle has kernels of its own for 3 and 5 on GPU
OPERATOR = "large_kernel_depthwise_conv2d"


@as_one_operation
def large_kernel_depthwise_conv2d(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    padding: int | tuple[int, int] | None = None,
    impl: str = "auto",
    memory_bytes: int | None = None,
) -> paddle.Tensor:
    """Return the depthwise convolution with stride 1 and "same" padding, with gradients.

    Args:
        x: (N, C, H, W), contiguous; float32, float16 or bfloat16.
        weight: (C, 1, K, K), K odd, from 3 to 63, with `matmul` any odd K; any of these types.
        bias: (C,), or None.
        padding: K // 2, for both axes or each; None for that.
        impl: `direct` or `fft` for an algorithm of the compiled operator, on CPU; `matmul` for
            matrix products, on every device; `paddle` for Paddle's own convolution. `auto`: on CPU
            the compiled operator where there is one; on GPU, for kernels above 5, the faster of
            `matmul` and `paddle`, as measured when a shape first comes. In training on several
            GPUs all ranks measure together, and must come with the same shapes in the same order.
        memory_bytes: that products may use beside their inputs and outputs; None for a 32nd of
            the GPU's memory, or 512 MiB on CPU.

    Returns:
        (N, C, H, W) in the type of x. Sums are in float32, whatever the types. Under autocast,
        `matmul` computes and returns float32 inputs in autocast's type, as `paddle.matmul` does.

    Raises:
        ValueError: shapes, types or memory layout that this is not made for.
        InputError: an unknown impl, or one that is not available here; products that do not fit
            into `memory_bytes`. It is a ValueError, too.
    """
    check_arguments(x, weight, bias, padding, impl)
    return compute(x, weight, bias, impl, memory_bytes, training=wants_gradients(x, weight))


@as_one_operation
def compute(
    x, weight, bias, impl, memory_bytes, *, training: bool, cache: WeightCache | None = None
):
    """Return `large_kernel_depthwise_conv2d` of arguments that are known to be right.

    `training` says whether `auto` is to find what is fastest with gradients, and whether programs
    are to have the gradients of `matmul_conv`; others differentiate its operations.
    """
    impl = "paddle" if x.shape[0] == 0 else impl  # no images, no plan
    forward = gradients = impl
    # `auto` measures on GPU, outside of programs, where Paddle has no kernel for the size.
    is_large = weight.shape[-1] >= SMALLEST_PRODUCT_KERNEL
    if impl == "auto" and is_large and not is_on_cpu(x) and paddle.in_dynamic_mode():
        x = cast(x, autocast_dtype(x))
        forward, gradients = choose(x, weight, memory_bytes, training=training)
    elif impl == "matmul":
        x = cast(x, autocast_dtype(x))
    elif use_operator(impl, is_on_cpu(x)):
        return _by_operator(
            x, weight, bias, impl, None if training or paddle.is_grad_enabled() else cache
        )
    else:
        forward = gradients = "paddle"
    if not wants_gradients(x, weight):
        gradients = forward
    if (forward, gradients) == ("paddle", "paddle"):
        return large_kernel_depthwise_conv2d_reference(x, weight, bias)
    y = matmul_conv(x, weight, memory_bytes, forward=forward, training=training, cache=cache)
    return y if bias is None else add_bias(y, bias)


def wants_gradients(x, weight) -> bool:
    """Return whether the tape records; a program does not say."""
    if not paddle.in_dynamic_mode():
        return False
    return paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient)


def _by_operator(x, weight, bias, impl, cache: WeightCache | None):
    """Return what the compiled operator computes, or its kernel for a kept spectrum."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    spectrum = None
    if (
        cache is not None
        and impl != "direct"
        # The C interface works on the memory of tensors as it is.
        and all(t.dtype == paddle.float32 and t.is_contiguous() for t in tensors)
    ):
        spectrum = cache.spectrum(x, weight)
    if spectrum is None:
        name = OPERATOR if bias is None else f"{OPERATOR}_bias"
        return run_operator(name, *tensors, ALGORITHMS[impl])
    y = paddle.empty(x.shape, dtype="float32")
    addend = None if bias is None else bias.data_ptr()
    pointers = (x.data_ptr(), spectrum.data_ptr(), addend, y.data_ptr())
    get_library().forward_cached((*x.shape, weight.shape[-1]), *pointers)
    return y


def check_arguments(x, weight, bias, padding, impl) -> None:
    """Raise what `large_kernel_depthwise_conv2d` raises."""
    check_impl(impl)
    got = f"x {describe(x)}, weight {describe(weight)}, bias {describe(bias)}"
    if len(x.shape) != 4 or len(weight.shape) != 4:
        raise ValueError(f"x must be (N, C, H, W) and weight (C, 1, K, K); got {got}")
    channels, per_group, kernel, other = weight.shape
    sizes = f"K odd and from {KERNEL_SIZES[0]} to {KERNEL_SIZES[-1]}"
    is_allowed = kernel in KERNEL_SIZES
    if impl == "matmul":
        sizes, is_allowed = "K odd", kernel % 2 == 1
    if kernel != other or not is_allowed:
        raise ValueError(f"weight must be (C, 1, K, K), {sizes}; got {got}")
    if per_group != 1 or x.shape[1] not in (channels, -1):
        raise ValueError(f"x must have as many channels as weight, in groups of one; got {got}")
    if bias is not None and list(bias.shape) != [channels]:
        raise ValueError(f"bias must have one value per channel, ({channels},); got {got}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have channels and pixels; got {got}")
    same = kernel // 2
    if padding is not None and padding not in (same, (same, same), [same, same]):
        raise ValueError(
            f'padding must be {same}, "same" for this kernel; got {padding} with {got}'
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float16 or bfloat16; got {got}")
        if paddle.in_dynamic_mode() and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; call its contiguous(); got {got}")


@as_one_operation
class FastDepthwiseConv2D(nn.Conv2D):
    """A depthwise `nn.Conv2D` that computes by `large_kernel_depthwise_conv2d`.

    Only the class of a layer changes (`use_fast_depthwise_conv`): parameters, their names, hooks
    and settings stay those of `nn.Conv2D`. With `impl` "paddle" it computes in float32 by Paddle's
    own, and may have any stride, dilation and padding of zeros.

    While a program is captured (`to_static`, `jit.save`) in evaluation mode it is Paddle's
    convolution, so that exported models run where there is no such operator, or with `matmul` the
    products, which are Paddle's operations, too. In training mode the program has the operator.
    """

    impl = "auto"
    memory_bytes = None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        captured = not paddle.in_dynamic_mode()
        is_paddles = captured and not self.training and self.impl != "matmul"
        if is_paddles or self.weight.dtype not in DTYPES:
            return nn.Conv2D.forward(self, x)
        if self.impl == "paddle":
            return depthwise_conv2d_in_float32(
                x,
                self.weight,
                self.bias,
                stride=self._stride,
                padding=self._padding,
                dilation=self._dilation,
                groups=self._groups,
            )
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
            cache=None if captured else cache_of(self),
        )


def is_eligible(layer: nn.Layer) -> bool:
    """Return whether a depthwise layer is one that `large_kernel_depthwise_conv2d` can compute."""
    if not is_same_conv(layer, FastDepthwiseConv2D):
        return False
    height, width = layer._kernel_size
    return (
        layer._in_channels == layer._out_channels
        and height == width
        and height >= 3
        and height % 2 == 1
    )


def use_fast_depthwise_conv(
    model: nn.Layer, impl: str = "auto", *, memory_bytes: int | None = None
) -> int:
    """Choose what computes the depthwise convolutions of a built network, in place.

    Eligible are those with stride and dilation 1, "same" padding of zeros, and a square kernel of
    odd size from 3 up. Parameters and their names stay as they are. On GPU, all other depthwise
    layers are computed in float32 by Paddle's own, and give maps in the type that they get, since
    Paddle would accumulate in the type of the weights.

    Args:
        model: any network.
        impl: see `large_kernel_depthwise_conv2d`. On CPU, `auto`, `direct` and `fft` take the
            compiled operator for kernels up to 63, and `auto` leaves the layers to Paddle, and
            logs why, where it is unavailable. `matmul` on every device and `auto` on GPU are for
            kernels from 7 up; smaller ones are computed as with `auto` on CPU, and by Paddle on
            GPU. `paddle` makes the layers Paddle's own again, on GPU in float32.
        memory_bytes: bound of the products of a layer beside its inputs and outputs, and of what
            `cache_weights` keeps; see `large_kernel_depthwise_conv2d`.

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
        if not is_depthwise(layer, FastDepthwiseConv2D):
            continue
        kernel = layer._kernel_size[0]
        is_large = kernel >= SMALLEST_PRODUCT_KERNEL
        by = None if on_cpu else "paddle"
        if is_eligible(layer):
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


def fast_depthwise_layers(model: nn.Layer) -> list[nn.Layer]:
    """Return the layers of `FastDepthwiseConv2D`, whose weights stay float32 in mixed precision."""
    return [x for x in model.sublayers(include_self=True) if isinstance(x, FastDepthwiseConv2D)]


def describe_convolutions(model: nn.Layer) -> str:
    """Return what computes the swapped depthwise convolutions of a network, for the log."""
    on_cpu = paddle.device.get_device() == "cpu"
    names = {"matmul": "matrix products", "paddle": "Paddle's own convolution in float32"}
    counts = Counter(
        names.get(layer.impl, "the compiled operator" if on_cpu else "what is faster on this GPU")
        for layer in fast_depthwise_layers(model)
    )
    return ", ".join(f"{count} by {name}" for name, count in counts.items()) or "all by Paddle"


def build_convolutions(model: nn.Layer, config) -> str:
    """Let `model` compute as MODEL.CONV_IMPL says, in place; return what computes, for the log."""
    megabytes = config.MODEL.CONV_MEMORY_MB
    memory_bytes = None if megabytes is None else megabytes * 2**20
    return use_large_kernel_ops(model, config.MODEL.CONV_IMPL, memory_bytes=memory_bytes)


def use_large_kernel_ops(
    model: nn.Layer, impl: str = "auto", *, memory_bytes: int | None = None
) -> str:
    """Choose what computes all convolutions of a built network, in place.

    Args:
        model, impl, memory_bytes: as of `use_fast_depthwise_conv` and `use_fast_pointwise_conv`.

    Returns:
        What computes them, for the log.

    Raises:
        InputError: an unknown impl, or one that is not available here.
    """
    use_fast_depthwise_conv(model, impl, memory_bytes=memory_bytes)
    pointwise = use_fast_pointwise_conv(model, impl)
    return f"depthwise convolutions: {describe_convolutions(model)}; 1x1 convolutions: " + (
        f"{pointwise} by the compiled operator" if pointwise else "all by Paddle"
    )
