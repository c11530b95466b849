"""Large-kernel depthwise convolution: the public function over all implementations.

On CPU, Paddle computes a depthwise convolution channel by channel through im2col, which for the
31x31 kernels of RepLKNet takes some hundred times as long as the arithmetic; the kernels of csrc/
do it directly or by FFT. On GPU, Paddle has one thread per output that loops over all taps;
`matmul_conv` uses the tensor cores (docs/kernels.md).
"""

import paddle

from replknet_paddle.ops.dispatch import (
    DTYPES,
    as_one_operation,
    autocast_dtype,
    cast,
    check_impl,
    describe,
    is_on_cpu,
    run_operator,
    use_operator,
)
from replknet_paddle.ops.frozen import Kept
from replknet_paddle.ops.gpu_choice import choose
from replknet_paddle.ops.library import ALGORITHMS, get_library
from replknet_paddle.ops.matmul_conv import add_bias, convolve, matmul_conv
from replknet_paddle.ops.matmul_plan import DEFAULT_MEMORY_BYTES
from replknet_paddle.ops.reference import large_kernel_depthwise_conv2d_reference

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
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> paddle.Tensor:
    """Depthwise convolution with stride 1 and "same" padding, with gradients.

    Args:
        x: (N, C, H, W), contiguous; float32, float16 or bfloat16.
        weight: (C, 1, K, K), K odd, from 3 to 63, with `matmul` any odd K; any of these types.
        bias: (C,), or None.
        padding: K // 2, for both axes or each; None for that.
        impl: `direct` or `fft` for an algorithm of the compiled operator, on CPU; `matmul` for
            matrix products, on every device; `paddle` for Paddle's own convolution. `auto`: on CPU
            the compiled operator where there is one; on GPU, for kernels above 5, the faster of
            `matmul` and `paddle`, as measured when a shape first comes.
        memory_bytes: that products may use beside their inputs and outputs.

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
def compute(x, weight, bias, impl, memory_bytes, *, training: bool, kept: Kept | None = None):
    """`large_kernel_depthwise_conv2d` of arguments that are known to be right.

    Args:
        training: whether `auto` is to find what is fastest with gradients, and whether programs are
            to have the gradients of `matmul_conv`; others differentiate its operations.
        kept: what may be kept of the weight; None for nothing.
    """
    forward = gradients = impl
    if impl == "auto" and _is_measured(x, weight):
        x = cast(x, autocast_dtype(x))
        forward, gradients = choose(x, weight, memory_bytes, training=training)
    elif impl == "matmul":
        x = cast(x, autocast_dtype(x))
    elif use_operator(impl, is_on_cpu(x)):
        return _by_operator(x, weight, bias, impl, kept)
    else:
        forward = gradients = "paddle"
    if not wants_gradients(x, weight):
        gradients = forward
    if (forward, gradients) == ("paddle", "paddle"):
        return large_kernel_depthwise_conv2d_reference(x, weight, bias)
    matrices = None if kept is None else kept.matrices(x, weight, memory_bytes)
    if matrices is None:
        y = matmul_conv(x, weight, memory_bytes, forward=forward, training=training)
    else:
        y = convolve(x, weight, memory_bytes, kept=matrices)
    return y if bias is None else add_bias(y, bias)


def wants_gradients(x, weight) -> bool:
    """Whether the tape records; a program does not say."""
    if not paddle.in_dynamic_mode():
        return False
    return paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient)


def _is_measured(x, weight) -> bool:
    """Whether `auto` measures: on GPU, outside of programs, where Paddle has no kernel for it."""
    return (
        not is_on_cpu(x)
        and paddle.in_dynamic_mode()
        and weight.shape[-1] >= SMALLEST_PRODUCT_KERNEL
    )


def _by_operator(x, weight, bias, impl, kept: Kept | None):
    """The compiled operator, or its kernel for a kept spectrum."""
    spectrum = None
    if kept is not None and impl != "direct" and _is_plain(x, weight, bias):
        spectrum = kept.spectrum(x, weight)
    if spectrum is not None:
        y = paddle.empty(x.shape, dtype="float32")
        pointers = (
            x.data_ptr(),
            spectrum.data_ptr(),
            bias.data_ptr() if bias is not None else None,
        )
        get_library().forward_cached((*x.shape, weight.shape[-1]), *pointers, y.data_ptr())
        return y
    attributes = {"algorithm": ALGORITHMS[impl]}
    if bias is None:
        return run_operator(OPERATOR, {"X": x, "Weight": weight}, attributes)
    return run_operator(f"{OPERATOR}_bias", {"X": x, "Weight": weight, "Bias": bias}, attributes)


def _is_plain(*tensors) -> bool:
    """Whether the C interface can work on their memory as it is."""
    return all(t is None or (t.dtype == paddle.float32 and t.is_contiguous()) for t in tensors)


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
