"""What only a GPU can show of matrix products: real sizes, half precision, memory, the choice."""

import numpy as np
import paddle
import pytest
from double_precision import STAGES, conv_and_gradients_by_fft, relative_error
from figures import report
from paddle import nn

from replknet_paddle.engine.precision import Precision
from replknet_paddle.model import RepLKNet
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
    paddle.device.cuda.empty_cache()
    before = paddle.device.cuda.memory_allocated()
    paddle.device.cuda.reset_max_memory_allocated()  # what other tests have taken
    run()
    peak = paddle.device.cuda.max_memory_allocated() - before
    assert peak <= megabytes * 2**20 + 3 * size  # y, dx, and chunks until they are joined


def test_the_time_of_a_call_is_the_gpus():
    square = paddle.randn([4096, 4096])
    seconds = gpu_choice._seconds(lambda: paddle.matmul(square, square))
    assert 1e-5 < seconds < 0.1  # 1 TFLOP/s to 10 PFLOP/s, which no GPU exceeds
    rate = 2 * 4096**3 / seconds / 1e12
    report("a float32 product of 4096 x 4096, by events", f"{rate:.1f} TFLOP/s")


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("impl", ["auto", "paddle"])
def test_depthwise_layers_give_the_type_that_they_get_and_sum_in_float32(impl, level, dtype):
    """In a network under real autocasting; the weight gradient of each layer against float64."""
    paddle.seed(0)
    network = RepLKNet(large_kernel_sizes=[13, 11, 9, 7], layers=[1] * 4, channels=[16] * 4)
    use_fast_depthwise_conv(network, impl)
    precision = Precision(enabled=True, level=level, dtype=dtype)
    precision.prepare(network, paddle.optimizer.AdamW(parameters=network.parameters()))
    layers = [x for x in network.sublayers() if isinstance(x, nn.Conv2D) and x._groups > 1]
    seen = []
    hooks = [x.register_forward_post_hook(lambda *call: seen.append(call)) for x in layers]
    with precision.autocast():
        network(paddle.randn([16, 3, 64, 64]))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) == 13
    for layer, (x,), y in seen:
        assert layer.weight.dtype == paddle.float32 and x.dtype == y.dtype == getattr(paddle, dtype)
        x, dy = x.detach(), paddle.randn(y.shape).astype(dtype)
        with precision.autocast():
            (got,) = paddle.grad(layer(x), [layer.weight], dy)
        assert got.dtype == paddle.float32
        paddle.set_device("cpu")
        exact = [paddle.to_tensor(t.astype("float64").numpy()) for t in (x, layer.weight, dy)]
        exact[1].stop_gradient = False
        options = dict(stride=layer._stride, padding=layer._padding, groups=layer._groups)
        y = paddle.nn.functional.conv2d(*exact[:2], **options)
        (wanted,) = paddle.grad(y, [exact[1]], exact[2])
        paddle.set_device("gpu")
        bound = 1e-4 if layer.impl == "paddle" else gpu_choice.TOLERANCE[dtype]
        assert relative_error(got.numpy(), wanted.numpy()) < bound, layer


def test_gradients_by_one_input_alone():
    _, (x, weight, dy) = case(4, 64, 28, 29, "bfloat16")
    both = paddle.grad(large_kernel_depthwise_conv2d(x, weight, impl="matmul"), [x, weight], dy)
    for tensor, wanted in zip((x, weight), both):
        (alone,) = paddle.grad(large_kernel_depthwise_conv2d(x, weight, impl="matmul"), tensor, dy)
        assert np.array_equal(alone.astype("float32").numpy(), wanted.astype("float32").numpy())


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
