"""The layers of RepLKNet: convolutions with batch norm, stochastic depth, re-parameterized kernels.

Structural re-parameterization is Section 3, guideline 3 of arXiv 2203.06717. A merged convolution
keeps integer stride and padding, so that it is the same kind of layer as the one before.
"""

import math

import paddle
from paddle import nn
from paddle.nn import functional as F


def uniform(fan_in: int) -> paddle.ParamAttr:
    """Uniform in +-1/sqrt(fan_in): the initialization that the paper's models were trained from."""
    bound = 1.0 / math.sqrt(fan_in)
    return paddle.ParamAttr(initializer=nn.initializer.Uniform(-bound, bound))


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2D:
    """A convolution with "same" padding; a depthwise one where groups equals the channels."""
    fan_in = in_channels // groups * kernel_size**2
    return nn.Conv2D(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        weight_attr=uniform(fan_in),
        bias_attr=uniform(fan_in) if bias else False,
    )


class ConvNorm(nn.Layer):
    """Convolution and batch normalization, then ReLU where `relu` is set."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
        norm_layer=nn.BatchNorm2D,
    ):
        super().__init__()
        self.conv = conv2d(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        self.norm = norm_layer(out_channels)
        self.relu = relu

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.norm(self.conv(x))
        return F.relu(x) if self.relu else x


class DropPath(nn.Layer):
    """Stochastic depth (arXiv 1603.09382): drops a sample's branch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = paddle.bernoulli(paddle.full([x.shape[0], 1, 1, 1], keep, dtype="float32"))
        return x * (mask / keep).astype(x.dtype)


class ReparamLargeKernelConv(nn.Layer):
    """Large depthwise convolution with a parallel small one, which merge into a single kernel.

    Three forms: large and small kernel in training; large alone where `small_kernel` is None
    (RepLKNet-XL); one biased convolution after `merge_kernel`, or when built `merged`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        *,
        merged: bool = False,
        norm_layer=nn.BatchNorm2D,
    ):
        super().__init__()
        if merged:
            self.large_kernel_reparam = conv2d(
                channels, channels, kernel_size, groups=channels, bias=True
            )
            return
        self.large_kernel_origin = ConvNorm(
            channels, channels, kernel_size, groups=channels, norm_layer=norm_layer
        )
        if small_kernel is not None:
            self.small_kernel_conv = ConvNorm(
                channels, channels, small_kernel, groups=channels, norm_layer=norm_layer
            )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if hasattr(self, "large_kernel_reparam"):
            return self.large_kernel_reparam(x)
        out = self.large_kernel_origin(x)
        if hasattr(self, "small_kernel_conv"):
            out = out + self.small_kernel_conv(x)
        return out

    @paddle.no_grad()
    def merge_kernel(self) -> None:
        """Replace the branches by the one convolution that computes their sum in evaluation."""
        if hasattr(self, "large_kernel_reparam"):
            return
        weight, bias = fuse_conv_norm(self.large_kernel_origin)
        large = weight.shape[-1]
        if hasattr(self, "small_kernel_conv"):
            small_weight, small_bias = fuse_conv_norm(self.small_kernel_conv)
            margin = (large - small_weight.shape[-1]) // 2
            weight = weight + F.pad(small_weight, [margin] * 4)
            bias = bias + small_bias
            del self.small_kernel_conv
        merged = self.large_kernel_origin.conv  # stays the kind of layer that it has become
        set_weight_and_bias(merged, weight, bias)
        del self.large_kernel_origin
        self.large_kernel_reparam = merged


def scale_and_shift(norm: nn.Layer) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return what a batch norm multiplies by and then adds in evaluation mode.

    Returns:
        Two tensors (channels,), float64: gamma / sqrt(variance + epsilon), beta - mean * that.
    """
    mean, variance, gamma, beta = (
        t.astype("float64") for t in (norm._mean, norm._variance, norm.weight, norm.bias)
    )
    scale = gamma / paddle.sqrt(variance + norm._epsilon)
    return scale, beta - mean * scale


def fuse_conv_norm(layer: ConvNorm) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return weight and bias, float64, of the convolution that equals `layer` in evaluation."""
    scale, shift = scale_and_shift(layer.norm)
    return layer.conv.weight.astype("float64") * scale.reshape([-1, 1, 1, 1]), shift


def set_weight_and_bias(conv: nn.Conv2D, weight: paddle.Tensor, bias: paddle.Tensor) -> None:
    """Give a convolution this weight and bias, in its own precision."""
    dtype = conv.weight.dtype
    if conv.bias is None:
        conv.bias = conv.create_parameter([weight.shape[0]], is_bias=True, dtype=dtype)
    conv.weight.set_value(weight.astype(dtype))
    conv.bias.set_value(bias.astype(dtype))
