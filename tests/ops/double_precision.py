"""References in float64, by Paddle's own convolution."""

import numpy as np
import paddle
from paddle.nn import functional as F


def conv_and_gradients(x, weight, dy, bias=None, *, groups=None):
    """Output and gradients by x, weight and, where there is one, bias, all float64 arrays."""
    tensors = [paddle.to_tensor(a.astype("float64")) for a in (x, weight, bias) if a is not None]
    for tensor in tensors:
        tensor.stop_gradient = False
    padding, groups = weight.shape[-1] // 2, groups or weight.shape[0]
    y = F.conv2d(*tensors, padding=padding, groups=groups)
    gradients = paddle.grad(y, tensors, paddle.to_tensor(dy.astype("float64")))
    return [t.numpy() for t in (y, *gradients)]


def relative_error(got, wanted) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(np.asarray(got, "float64") - wanted).max() / np.abs(wanted).max())
