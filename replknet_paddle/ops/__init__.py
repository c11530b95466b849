"""Operators of our own, for what Paddle computes slowly: depthwise and 1x1 convolutions."""

from replknet_paddle.ops.depthwise_conv import large_kernel_depthwise_conv2d
from replknet_paddle.ops.depthwise_layer import (
    FastDepthwiseConv2D,
    describe_convolutions,
    large_kernel_layers,
    use_fast_depthwise_conv,
)
from replknet_paddle.ops.frozen import frozen_weights
from replknet_paddle.ops.library import LibraryError, get_library, thread_count
from replknet_paddle.ops.pointwise_conv import (
    FastPointwiseConv2D,
    pointwise_conv2d,
    use_fast_pointwise_conv,
)
from replknet_paddle.ops.reference import large_kernel_depthwise_conv2d_reference

__all__ = [
    "FastDepthwiseConv2D",
    "FastPointwiseConv2D",
    "LibraryError",
    "describe_convolutions",
    "frozen_weights",
    "get_library",
    "large_kernel_depthwise_conv2d",
    "large_kernel_depthwise_conv2d_reference",
    "large_kernel_layers",
    "pointwise_conv2d",
    "thread_count",
    "use_fast_depthwise_conv",
    "use_fast_pointwise_conv",
]
