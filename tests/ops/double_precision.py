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


def conv_and_gradients_by_fft(x, weight, dy):
    """Output and gradients by x and weight for large shapes, by numpy's float64 transforms."""
    (height, width), kernel = x.shape[2:], weight.shape[-1]
    size, half = (height + kernel, width + kernel), kernel // 2

    def transform(a):
        return np.fft.rfft2(a.astype("float64"), size)

    def inverse(spectrum, first, rows, columns):
        values = np.roll(np.fft.irfft2(spectrum, size), (-first, -first), axis=(2, 3))
        return values[:, :, :rows, :columns]

    fx, fweight, fdy = transform(x), transform(weight.transpose(1, 0, 2, 3)), transform(dy)
    y = inverse(fx * fweight.conj(), -half, height, width)
    dx = inverse(fdy * fweight, half, height, width)
    dweight = inverse((fx * fdy.conj()).sum(0, keepdims=True), -half, kernel, kernel)
    return y, dx, dweight.transpose(1, 0, 2, 3)
