"""Matrix products: their rounding, bits and memory. test_depthwise_conv.py has values."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from double_precision import arrays, calls_of, conv_and_gradients, relative_error

from replknet_paddle.ops import large_kernel_depthwise_conv2d, matmul_conv

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

HALF = ("float16", "bfloat16")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight_dtype", ["float32", "half"])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28, 29), (3, 4, 14, 14, 27), (2, 2, 30, 41, 31)])
def test_half_precision_has_the_rounding_of_products_summed_in_float32(shape, weight_dtype, dtype):
    """On CPU values are rounded where a GPU rounds them: inputs, T, windows and products."""
    weight_dtype = dtype if weight_dtype == "half" else weight_dtype
    exact = [paddle.to_tensor(a).astype(dtype).astype("float32").numpy() for a in arrays(*shape)]
    x, weight, bias, dy = exact
    tensors = [
        paddle.to_tensor(a).astype(t)
        for a, t in zip((x, weight, bias), (dtype, weight_dtype, weight_dtype))
    ]
    for tensor in tensors:
        tensor.stop_gradient = False
    result = large_kernel_depthwise_conv2d(*tensors, impl="matmul")
    gradients = paddle.grad(result, tensors, paddle.to_tensor(dy).astype(dtype))
    assert [t.dtype for t in (result, *gradients)] == [t.dtype for t in (tensors[0], *tensors)]
    got = [t.astype("float32").numpy() for t in (result, *gradients)]
    unit = largest_rounding_error(dtype)
    y, dx, dweight, _ = conv_and_gradients(x, weight, dy, bias)
    # y: the product's rounding and the bias's. dweight: that of dT and of its first sum, many of
    # each in one value, and of the result where the weight is half. Of the largest value. Sums in
    # half precision would be many times as far off.
    bounds = (2 * unit, unit, unit if weight_dtype == "float32" else 2 * unit)
    for name, a, b, bound in zip(("y", "dx", "dweight"), got, (y, dx, dweight), bounds):
        assert relative_error(a, b) <= 1.02 * bound, name


def largest_rounding_error(dtype):
    """Relative; half a unit in the last place, or in some of Paddle's versions on CPU a whole."""
    values = np.random.default_rng(0).uniform(1, 2, 10000).astype("float32")
    rounded = paddle.to_tensor(values).astype(dtype).astype("float32").numpy()
    error = (np.abs(rounded - values) / values).max()
    assert error < {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    return error


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_weights_gradient_has_the_same_bits_each_time(dtype):
    x, _, _, dy = arrays(3, 16, 28, 28, 29)
    x, dy = (paddle.to_tensor(a).astype(dtype) for a in (x, dy))
    first, second = (matmul_conv.weight_gradient(x, dy, 29, 2**23).numpy() for _ in range(2))
    assert first.dtype == np.float32 and first.tobytes() == second.tobytes()


def test_the_gradients_of_inputs_that_need_none_are_not_computed(monkeypatch):
    calls = calls_of(monkeypatch, (matmul_conv, "convolve"), (matmul_conv, "weight_gradient"))
    x, weight, _, dy = (paddle.to_tensor(a) for a in arrays(1, 2, 8, 8, 7))
    weight.stop_gradient = False
    large_kernel_depthwise_conv2d(x, weight, impl="matmul").backward(dy)
    assert calls == ["convolve", "weight_gradient"] and x.grad is None
    calls.clear()
    x.stop_gradient, weight.stop_gradient = False, True
    large_kernel_depthwise_conv2d(x, weight, impl="matmul").backward(dy)
    assert calls == ["convolve", "convolve"]
    calls.clear()
    with paddle.no_grad():
        assert large_kernel_depthwise_conv2d(x, weight, impl="matmul").stop_gradient
    assert calls == ["convolve"]


PEAK = """
import sys
import paddle
from paddle.base import core
from replknet_paddle.ops import large_kernel_depthwise_conv2d
memory, batch = int(sys.argv[1]), 8
x, weight = paddle.randn([batch, 128, 56, 56]), paddle.randn([128, 1, 31, 31])
x.stop_gradient = weight.stop_gradient = False
dy = paddle.randn(x.shape)
size, before = 4 * x.size, core.host_memory_stat_current_value("Allocated", 0)
assert core.host_memory_stat_peak_value("Allocated", 0) < before + size  # nothing larger before
y = large_kernel_depthwise_conv2d(x, weight, impl="matmul", memory_bytes=memory)
forward = core.host_memory_stat_peak_value("Allocated", 0) - before - 2 * size
dx, dweight = paddle.grad(y, [x, weight], dy)
both = core.host_memory_stat_peak_value("Allocated", 0) - before - 3 * size
print(forward, both)
"""


@pytest.mark.parametrize("megabytes", [24, pytest.param(96, marks=pytest.mark.slow)])
def test_peak_memory_of_a_layer_at_56_pixels_is_within_the_bound(megabytes):
    """Beside inputs, outputs, and chunks of the output until they are joined."""
    command = [sys.executable, "-c", PEAK, str(megabytes * 2**20)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    forward, both = map(int, done.stdout.split())
    assert megabytes * 2**18 < forward <= megabytes * 2**20
    assert both <= megabytes * 2**20
