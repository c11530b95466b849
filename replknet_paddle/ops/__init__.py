"""Operators of our own, for what Paddle computes slowly: depthwise and 1x1 convolutions."""

from replknet_paddle.ops.cache import cache_weights
from replknet_paddle.ops.depthwise import (
    FastDepthwiseConv2D,
    build_convolutions,
    describe_convolutions,
    fast_depthwise_layers,
    large_kernel_depthwise_conv2d,
    use_fast_depthwise_conv,
    use_large_kernel_ops,
)
from replknet_paddle.ops.dispatch import large_kernel_depthwise_conv2d_reference
from replknet_paddle.ops.library import LibraryError, get_library, thread_count
from replknet_paddle.ops.pointwise import (
    FastPointwiseConv2D,
    pointwise_conv2d,
    use_fast_pointwise_conv,
)

__all__ = [
    "FastDepthwiseConv2D",
    "FastPointwiseConv2D",
    "LibraryError",
    "build_convolutions",
    "cache_weights",
    "describe_convolutions",
    "fast_depthwise_layers",
    "get_library",
    "large_kernel_depthwise_conv2d",
    "large_kernel_depthwise_conv2d_reference",
    "pointwise_conv2d",
    "thread_count",
    "use_fast_depthwise_conv",
    "use_fast_pointwise_conv",
    "use_large_kernel_ops",
]
