"""Large-kernel depthwise convolution: the public function, its reference, and the layer.

Paddle computes a depthwise convolution on CPU channel by channel through im2col, which for the
31x31 kernels of RepLKNet takes some hundred times as long as the arithmetic. The kernels of csrc/
do it directly or by FFT (docs/kernels.md); this module gives them types, gradients and a place in
a network, and falls back on Paddle's own convolution where they cannot be had.
"""

from typing import NamedTuple

import paddle
from paddle import nn
from paddle.nn import functional as F

from replknet_paddle.ops.dispatch import (
    DTYPES,
    as_one_operation,
    check_impl,
    describe,
    is_on_cpu,
    pair,
    run_operator,
    use_operator,
)
from replknet_paddle.ops.library import ALGORITHMS, get_library

KERNEL_SIZES = range(3, 64, 2)
OPERATOR = "large_kernel_depthwise_conv2d"


def large_kernel_depthwise_conv2d_reference(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None
) -> paddle.Tensor:
    """What `large_kernel_depthwise_conv2d` computes, by Paddle's own convolution."""
    if x.dtype == weight.dtype == paddle.float32:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    y = F.conv2d(
        x.astype("float32"),
        weight.astype("float32"),
        None if bias is None else bias.astype("float32"),
        padding=weight.shape[-1] // 2,
        groups=weight.shape[0],
    )
    return y.astype(x.dtype)


@as_one_operation
def large_kernel_depthwise_conv2d(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: paddle.Tensor | None = None,
    padding: int | tuple[int, int] | None = None,
    impl: str = "auto",
) -> paddle.Tensor:
    """Depthwise convolution with stride 1 and "same" padding, with gradients.

    Args:
        x: (N, C, H, W), contiguous; float32, float16 or bfloat16.
        weight: (C, 1, K, K), K odd, from 3 to 63; any of these types.
        bias: (C,), or None.
        padding: K // 2, for both axes or each; None for that.
        impl: `direct` or `fft` for an algorithm of the compiled operator, on CPU; `paddle` for
            Paddle's own convolution; `auto` for the fastest that there is.

    Returns:
        (N, C, H, W) in the type of x. All is computed in float32, whatever the types.

    Raises:
        ValueError: shapes, types or memory layout that this is not made for.
        InputError: an unknown impl, or one that cannot be had here. It is a ValueError, too.
    """
    _check_arguments(x, weight, bias, padding, impl)
    if not use_operator(impl, is_on_cpu(x)):
        return large_kernel_depthwise_conv2d_reference(x, weight, bias)
    attributes = {"algorithm": ALGORITHMS[impl]}
    if bias is None:
        return run_operator(OPERATOR, {"X": x, "Weight": weight}, attributes)
    return run_operator(f"{OPERATOR}_bias", {"X": x, "Weight": weight, "Bias": bias}, attributes)


def _check_arguments(x, weight, bias, padding, impl) -> None:
    check_impl(impl)
    got = f"x {describe(x)}, weight {describe(weight)}, bias {describe(bias)}"
    if len(x.shape) != 4 or len(weight.shape) != 4:
        raise ValueError(f"x must be (N, C, H, W) and weight (C, 1, K, K); got {got}")
    channels, per_group, kernel, other = weight.shape
    if kernel != other or kernel not in KERNEL_SIZES:
        raise ValueError(f"weight must be (C, 1, K, K), K odd and from 3 to 63; got {got}")
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


class _Cached(NamedTuple):
    """A weight's spectrum, what weight it is of, and the map size it is for."""

    size: tuple[int, int]
    weight: paddle.Tensor
    spectrum: paddle.Tensor


@as_one_operation
class FastDepthwiseConv2D(nn.Conv2D):
    """A depthwise `nn.Conv2D` that computes by `large_kernel_depthwise_conv2d`.

    Only the class of a layer changes (`use_fast_depthwise_conv`): parameters, their names, hooks
    and settings stay those of `nn.Conv2D`. In evaluation mode without gradients it keeps the
    spectrum of its weight, where the kernels use one. Paddle's own version counter of a tensor does
    not notice optimizer steps, `set_value` or `copy_`, so the weight is compared with a copy of the
    one that the spectrum was made of, which takes microseconds.

    While a program is captured (`to_static`, `jit.save`) in evaluation mode it is Paddle's
    convolution, so that exported models run where there is no such operator; in training mode the
    program has the operator.
    """

    impl = "auto"
    _cached: _Cached | None = None

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        captured = not paddle.in_dynamic_mode()
        if (captured and not self.training) or self.weight.dtype not in DTYPES:
            return nn.Conv2D.forward(self, x)
        if captured:
            return large_kernel_depthwise_conv2d(x, self.weight, self.bias, impl=self.impl)
        x = x if x.is_contiguous() else x.contiguous()
        if self.training or paddle.is_grad_enabled():
            self._cached = None
        elif self.impl in ("auto", "fft") and _is_plain(x, self.weight, self.bias):
            _check_arguments(x, self.weight, self.bias, None, self.impl)
            spectrum = self._spectrum(x)
            if spectrum is not None:
                return self._forward_cached(x, spectrum)
        return large_kernel_depthwise_conv2d(x, self.weight, self.bias, impl=self.impl)

    def _spectrum(self, x: paddle.Tensor) -> paddle.Tensor | None:
        """The spectrum of the present weight, or None where none is of use."""
        cached, weight, size = self._cached, self.weight, tuple(x.shape[2:])
        if cached is not None and cached.size == size and _equal(cached.weight, weight):
            return cached.spectrum
        self._cached = None
        if not use_operator(self.impl, True):
            return None
        library, shape = get_library(), _shape(x, weight)
        floats = library.spectrum_floats(shape)
        if floats == 0:
            return None
        spectrum = paddle.empty([floats], dtype="float32")
        library.make_spectrum(shape, weight.data_ptr(), spectrum.data_ptr())
        self._cached = _Cached(size, weight.detach().clone(), spectrum)
        return spectrum

    def _forward_cached(self, x: paddle.Tensor, spectrum: paddle.Tensor) -> paddle.Tensor:
        y = paddle.empty(x.shape, dtype="float32")
        bias = None if self.bias is None else self.bias.data_ptr()
        get_library().forward_cached(
            _shape(x, self.weight), x.data_ptr(), spectrum.data_ptr(), bias, y.data_ptr()
        )
        return y


def _shape(x: paddle.Tensor, weight: paddle.Tensor) -> tuple[int, int, int, int, int]:
    return (*x.shape, weight.shape[-1])


def _is_plain(x, *parameters) -> bool:
    """Whether the C interface can work on their memory as it is."""
    return x.ndim == 4 and all(
        tensor is None
        or (
            tensor.dtype == paddle.float32
            and tensor.place.is_cpu_place()
            and tensor.is_contiguous()
        )
        for tensor in (x, *parameters)
    )


def _equal(a: paddle.Tensor, b: paddle.Tensor) -> bool:
    """Whether two contiguous float32 tensors on CPU hold the same bytes."""
    return a.shape == b.shape and get_library().same_bytes(a.data_ptr(), b.data_ptr(), 4 * a.size)


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
        and height in KERNEL_SIZES
        and pair(layer._stride) == [1, 1]
        and pair(layer._dilation) == [1, 1]
        and layer._padding_mode == "zeros"
        and layer._data_format == "NCHW"
        and pair(layer._padding) == [same, same]
    )


def use_fast_depthwise_conv(model: nn.Layer, impl: str = "auto") -> int:
    """Let the depthwise convolutions of a built network compute by the compiled operator, in place.

    Eligible are those with stride and dilation 1, "same" padding of zeros, and a square kernel of
    odd size from 3 to 63. Parameters and their names stay as they are.

    Args:
        model: any network.
        impl: see `large_kernel_depthwise_conv2d`. `paddle` makes the layers Paddle's own again;
            `auto` does that, and says why, where the operator cannot be had.

    Returns:
        How many layers compute by the operator now.

    Raises:
        InputError: an unknown impl, or one that cannot be had here.
    """
    check_impl(impl)
    fast = use_operator(impl, paddle.device.get_device() == "cpu")
    layers = [layer for layer in model.sublayers(include_self=True) if is_eligible(layer)]
    for layer in layers:
        layer.__class__ = FastDepthwiseConv2D if fast else nn.Conv2D
        layer.__dict__.pop("_cached", None)
        layer.__dict__.pop("impl", None)
        if fast:
            layer.impl = impl
    return len(layers) if fast else 0
