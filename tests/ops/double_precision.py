"""What tests of convolutions share: random inputs, references in float64, records of calls."""

import numpy as np
import paddle
from paddle.nn import functional as F

STAGES = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]  # channels, side, kernel


def arrays(batch, channels, height, width, kernel, seed=0):
    """x, weight, bias and dy of a depthwise convolution."""
    rng = np.random.default_rng(seed)
    image = (batch, channels, height, width)
    shapes = [image, (channels, 1, kernel, kernel), (channels,), image]
    return [rng.standard_normal(shape, "float32") for shape in shapes]


def with_gradients(convolution, *inputs):
    """Output of a function of tensors, and gradients by each, for float32 arrays: inputs and dy."""
    *tensors, dy = map(paddle.to_tensor, inputs)
    for tensor in tensors:
        tensor.stop_gradient = False
    y = convolution(*tensors)
    return [t.numpy() for t in (y, *paddle.grad(y, tensors, dy))]


def conv_and_gradients(x, weight, dy, bias=None, *, groups=None):
    """Output and gradients by x, weight and, where there is one, bias, by Paddle's in float64."""
    padding, groups = weight.shape[-1] // 2, groups or weight.shape[0]
    inputs = [a.astype("float64") for a in (x, weight, bias, dy) if a is not None]
    return with_gradients(lambda *t: F.conv2d(*t, padding=padding, groups=groups), *inputs)


def calls_of(monkeypatch, *functions) -> list[str]:
    """The names of functions, given as (module, name), in the order in which they are called."""
    calls = []
    for module, name in functions:
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k)
        )
    return calls


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
