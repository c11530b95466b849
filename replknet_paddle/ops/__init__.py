"""Operators of our own, for what Paddle computes slowly on CPU: depthwise and 1x1 convolutions."""

from replknet_paddle.ops.depthwise_conv import (
    FastDepthwiseConv2D,
    large_kernel_depthwise_conv2d,
    large_kernel_depthwise_conv2d_reference,
    use_fast_depthwise_conv,
)
from replknet_paddle.ops.dispatch import describe_operator
from replknet_paddle.ops.library import LibraryError, get_library, thread_count
from replknet_paddle.ops.pointwise_conv import (
    FastPointwiseConv2D,
    pointwise_conv2d,
    use_fast_pointwise_conv,
)

__all__ = [
    "FastDepthwiseConv2D",
    "FastPointwiseConv2D",
    "LibraryError",
    "describe_operator",
    "get_library",
    "large_kernel_depthwise_conv2d",
    "large_kernel_depthwise_conv2d_reference",
    "pointwise_conv2d",
    "thread_count",
    "use_fast_depthwise_conv",
    "use_fast_pointwise_conv",
]
