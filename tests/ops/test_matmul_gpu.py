"""What only a GPU can show of matrix products: real sizes, half precision, memory, the choice."""

import numpy as np
import paddle
import pytest
from double_precision import STAGES, conv_and_gradients_by_fft, relative_error
from paddle import nn

from replknet_paddle.ops import (
    gpu_choice,
    large_kernel_depthwise_conv2d,
    use_fast_depthwise_conv,
)
from replknet_paddle.runtime import processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(processes.visible_devices() == 0, reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def device():
    before = paddle.device.get_device()
    paddle.set_device("gpu")
    yield
    paddle.set_device(before)


def case(batch, channels, side, kernel, dtype):
    """Arrays as the type holds them, and their tensors."""
    rng = np.random.default_rng(0)
    image = (batch, channels, side, side)
    shapes = (image, (channels, 1, kernel, kernel), image)
    tensors = [paddle.to_tensor(rng.standard_normal(s, "float32")).astype(dtype) for s in shapes]
    arrays = [t.astype("float32").numpy() for t in tensors]
    for tensor in tensors[:2]:
        tensor.stop_gradient = False
    return arrays, tensors


def passes(x, weight, dy, impl):
    y = large_kernel_depthwise_conv2d(x, weight, impl=impl)
    return [y, *paddle.grad(y, [x, weight], dy)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channels, side, kernel", STAGES)
@pytest.mark.parametrize("impl", ["matmul", "auto"])
def test_stages_equal_float64_and_the_weights_gradient_is_deterministic(
    impl, channels, side, kernel, dtype
):
    arrays, tensors = case(8, channels, side, kernel, dtype)
    got, again = (passes(*tensors, impl) for _ in range(2))
    for ours, right in zip(got, conv_and_gradients_by_fft(*arrays)):
        error = relative_error(ours.astype("float32").numpy(), right)
        assert error <= gpu_choice._tolerance(tensors[0]), (impl, dtype, error)
    if impl == "matmul":
        assert np.array_equal(*(g[2].astype("float32").numpy() for g in (got, again)))


@pytest.mark.parametrize("megabytes", [128, 512])
def test_peak_memory_is_within_the_bound(megabytes):
    _, (x, weight, dy) = case(64, 128, 56, 31, "float16")
    size = 2 * x.size

    def run():
        y = large_kernel_depthwise_conv2d(x, weight, impl="matmul", memory_bytes=megabytes * 2**20)
        return paddle.grad(y, [x, weight], dy)

    run()  # makes the index arrays, and cuBLAS its workspace
    before = paddle.device.cuda.memory_allocated()
    paddle.device.cuda.empty_cache()
    run()
    peak = paddle.device.cuda.max_memory_allocated() - before
    assert peak <= megabytes * 2**20 + 3 * size  # y, dx, and chunks until they are joined


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("impl", ["auto", "matmul", "paddle"])
def test_layers_train_in_mixed_precision(impl, level):
    paddle.seed(0)
    model = nn.Sequential(
        nn.Conv2D(3, 64, 1), nn.Conv2D(64, 64, 31, padding=15, groups=64), nn.Conv2D(64, 4, 1)
    )
    use_fast_depthwise_conv(model, impl)
    large, images = model[1], paddle.randn([4, 3, 56, 56])
    wanted = model(images)
    (wanted**2).mean().backward()
    gradient = large.weight.grad.numpy()
    model.clear_gradients()
    with paddle.amp.auto_cast(level=level, dtype="float16"):
        y = model(images)
        loss = (y.astype("float32") ** 2).mean()
    loss.backward()
    assert relative_error(y.astype("float32").numpy(), wanted.numpy()) < 2e-2
    assert large.weight.grad.dtype == paddle.float32
    assert relative_error(large.weight.grad.numpy(), gradient) < 5e-2
