"""Operators of our own: depthwise convolution with large kernels, which Paddle computes slowly."""

from ops.depthwise_conv import (
    FastDepthwiseConv2D,
    describe_operator,
    large_kernel_depthwise_conv2d,
    large_kernel_depthwise_conv2d_reference,
    use_fast_depthwise_conv,
)
from ops.library import LibraryError, get_library, thread_count

__all__ = [
    "FastDepthwiseConv2D",
    "LibraryError",
    "describe_operator",
    "get_library",
    "large_kernel_depthwise_conv2d",
    "large_kernel_depthwise_conv2d_reference",
    "thread_count",
    "use_fast_depthwise_conv",
]
