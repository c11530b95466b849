"""Whether the compiled operators compute, how Paddle runs them, and Paddle's own convolution."""

import contextlib
import functools
import logging
from typing import TypeVar

import paddle
from paddle import nn
from paddle.autograd import PyLayer, saved_tensors_hooks
from paddle.nn import functional as F

from replknet_paddle.ops.library import LibraryError, get_library
from replknet_paddle.runtime.errors import InputError

IMPLS = ("auto", "paddle", "direct", "fft", "matmul")
DTYPES = (paddle.float32, paddle.float16, paddle.bfloat16)

Target = TypeVar("Target")

logger = logging.getLogger(__name__)


def check_impl(impl: str) -> None:
    """Raise InputError for an implementation that does not exist."""
    if impl not in IMPLS:
        raise InputError(f"impl is {impl!r}; allowed: {', '.join(IMPLS)}")


def cast(x, dtype):
    """Return x in another type; x itself where it has that type, which Paddle would copy."""
    return x if x.dtype == dtype else x.astype(dtype)


def is_on_cpu(x) -> bool:
    """Return whether a tensor is on the CPU, or a program is being captured there."""
    if paddle.in_dynamic_mode():
        return x.place.is_cpu_place()
    return paddle.device.get_device() == "cpu"


def without_autocast(x):
    """Return the context in which nothing is cast; a program being captured stays as it is.

    Paddle keeps the last context's type, by which its `GradScaler` decides whether to scale: it
    stays that of x, where this is half precision.
    """
    if not paddle.in_dynamic_mode():
        return contextlib.nullcontext()
    dtype = "bfloat16" if x.dtype == paddle.bfloat16 else "float16"
    return paddle.amp.auto_cast(enable=False, dtype=dtype)


def autocast_dtype(x):
    """Return the type in which `paddle.matmul` computes x now: autocast's for float32."""
    if x.dtype != paddle.float32 or is_on_cpu(x) or not paddle.in_dynamic_mode():
        return x.dtype
    one = _one_value(str(x.place))
    return paddle.matmul(one, one).dtype  # Paddle 3.1 has no public way to ask


@functools.cache
def _one_value(place: str) -> paddle.Tensor:
    return paddle.ones([1, 1], dtype="float32")


_reported: set[str] = set()


def use_operator(impl: str, on_cpu: bool) -> bool:
    """Return whether to compute by the compiled operator; log once why not where `auto` would have.

    Raises:
        InputError: it is asked for by name and unavailable.
    """
    if impl in ("paddle", "matmul"):
        return False
    why = "it computes on CPU alone"
    if on_cpu:
        try:
            get_library()
            return True
        except LibraryError as error:
            why = str(error)
    if impl != "auto":
        raise InputError(f"depthwise convolution {impl!r} needs the compiled operator: {why}")
    if on_cpu and why not in _reported:  # elsewhere Paddle's own is what one expects
        _reported.add(why)
        logger.warning(
            "depthwise convolutions run on Paddle's own, not on the compiled operator: %s", why
        )
    return False


def type_name(tensor) -> str:
    """Return the name of a tensor's type, without Paddle's prefix."""
    return str(tensor.dtype).split(".")[-1]


def describe(tensor) -> str:
    """Return shape and type of a tensor, for messages."""
    return "None" if tensor is None else f"{tuple(tensor.shape)} {type_name(tensor)}"


def is_depthwise(layer: nn.Layer, fast: type[nn.Conv2D]) -> bool:
    """Return whether a layer, of Paddle's or the `fast` class, is what Paddle's depthwise kernels
    compute: any kernel, stride and dilation, with one or more outputs for each channel."""
    return (
        type(layer) in (nn.Conv2D, fast)
        and layer._groups == layer._in_channels > 1
        and layer._padding_mode == "zeros"
        and layer._data_format == "NCHW"
    )


def is_same_conv(layer: nn.Layer, fast: type[nn.Conv2D]) -> bool:
    """Return whether a layer, of Paddle's or the `fast` class, keeps the size of maps."""
    if type(layer) not in (nn.Conv2D, fast):
        return False
    padding = layer._padding  # one value, or one for each axis
    padding = [padding, padding] if isinstance(padding, int) else list(padding)
    return (
        layer._stride == layer._dilation == [1, 1]
        and padding == [size // 2 for size in layer._kernel_size]
        and layer._padding_mode == "zeros"
        and layer._data_format == "NCHW"
    )


def as_one_operation(target: Target) -> Target:
    """Let program capture take a function or a layer as a whole, not follow its Python code."""
    return paddle.jit.marker.unified(target)


def apply_layer(layer: type[PyLayer], *arguments):
    """Apply a layer with gradients of its own to tensors and constants, in a program, too."""
    if paddle.in_dynamic_mode():
        wanted = [a for a in arguments if isinstance(a, paddle.Tensor) and not a.stop_gradient]
        return _OneArgument.apply(wanted, lambda: (layer, arguments))
    from paddle.jit.dy2static.py_layer import StaticPyLayer

    return StaticPyLayer(layer).apply(*arguments)


class _OneArgument(PyLayer):
    """A layer whose inputs are one argument, for `paddle.grad` by some of them.

    With several arguments Paddle demands None for those that were not asked for, and does not say
    which these are. From one argument it takes what it needs.
    """

    @staticmethod
    def forward(ctx, wanted, layer_and_arguments):
        ctx.layer, arguments = layer_and_arguments()
        return ctx.layer.forward(ctx, *arguments)

    @staticmethod
    def backward(ctx, dy):
        return [gradient for gradient in ctx.layer.backward(ctx, dy) if gradient is not None]


def keeps_by_hooks() -> bool:
    """Return whether others' hooks decide what the tape keeps: there is one pair at a time."""
    try:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            return False
    except ValueError:
        return True


def run_operator(name: str, *arguments) -> paddle.Tensor:
    """Return the output of a registered operator, or its place in the program being captured.

    Arguments are inputs, then attributes, in the order of registration.
    """
    out = paddle._C_ops._run_custom_op(name, *arguments)
    return out[0] if isinstance(out, (list, tuple)) else out


def large_kernel_depthwise_conv2d_reference(
    x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Return what `large_kernel_depthwise_conv2d` computes, by Paddle's own, in float32."""
    padding, groups = weight.shape[-1] // 2, weight.shape[0]
    return depthwise_conv2d_in_float32(x, weight, bias, padding=padding, groups=groups)


def depthwise_conv2d_in_float32(x, weight, bias, **options):
    """Return Paddle's own convolution in the type of x, computed in float32 with any `options`.

    In half precision, and so under autocast at level O2, Paddle's kernels for GPUs accumulate in
    half precision: an rms error of 2.6 % in bfloat16 with a kernel of 31, and of up to 2.7 % in
    weight gradients of 3x3 and 5x5 ones. The tape keeps x as it is, not a float32 copy, until the
    graph is gone: after a backward pass, too, while the loss is alive.
    """
    dtype, wide = paddle.float32, cast(x, paddle.float32)
    with without_autocast(x), contextlib.ExitStack() as hooks:
        weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
        # Others' hooks are those of recomputation, which keeps neither.
        if paddle.in_dynamic_mode() and wide is not x and not keeps_by_hooks():
            copy = wide.data_ptr()
            hooks.enter_context(
                saved_tensors_hooks(
                    lambda tensor: x if tensor.data_ptr() == copy else tensor,
                    lambda tensor: cast(tensor, dtype),
                )
            )
        y = F.conv2d(wide, weight, bias, **options)
        hooks.close()
        return cast(y, x.dtype)
