"""Large depthwise kernels stay float32 where Paddle's own kernel would sum in half precision."""

import sys

import paddle
import pytest

from replknet_paddle.engine import precision as precision_module
from replknet_paddle.engine.precision import Precision
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import (
    large_kernel_depthwise_conv2d_reference,
    large_kernel_layers,
    reference,
    use_fast_depthwise_conv,
)

pytestmark = pytest.mark.paddle_version


@pytest.fixture
def gpu(monkeypatch):
    """The device is faked; Paddle's own `decorate` casts nothing on CPU, its inner part does."""
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(precision_module.processes, "supports_bfloat16", lambda device: True)
    inner = sys.modules["paddle.amp.auto_cast"].amp_initialize

    def decorate(models, level, dtype, excluded_layers, **options):
        inner(models=[models], dtype=dtype, excluded_layers=excluded_layers)

    monkeypatch.setattr(precision_module.paddle.amp, "decorate", decorate)


@pytest.mark.parametrize("impl", ["auto", "paddle", "matmul"])
@pytest.mark.parametrize("trained", [True, False])
def test_o2_leaves_the_weights_of_large_kernels_in_float32(impl, trained, gpu):
    model = RepLKNet(
        large_kernel_sizes=[13, 11, 9, 7], layers=[1] * 4, channels=[4] * 4, num_classes=3
    )
    use_fast_depthwise_conv(model, impl)
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters()) if trained else None
    precision = Precision(enabled=True, level="O2", dtype="bfloat16")
    precision.prepare(model, optimizer)
    large = {id(layer.weight) for layer in large_kernel_layers(model)}
    assert len(large) == 4
    for name, parameter in model.named_parameters():
        is_norm = any(part in name for part in ("norm", "_bn"))
        expected = paddle.float32 if is_norm or id(parameter) in large else paddle.bfloat16
        assert parameter.dtype == expected, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_paddles_own_convolution_gets_float32_outside_of_autocast(dtype, monkeypatch):
    seen, contexts = [], []
    conv2d, auto_cast = reference.F.conv2d, paddle.amp.auto_cast

    def spied(x, weight, bias, **options):
        seen.extend(t.dtype for t in (x, weight, bias))
        return conv2d(x, weight, bias, **options)

    monkeypatch.setattr(reference.F, "conv2d", spied)
    monkeypatch.setattr(
        paddle.amp, "auto_cast", lambda **options: contexts.append(options) or auto_cast(**options)
    )
    x = paddle.randn([1, 2, 8, 8]).astype(dtype)
    y = large_kernel_depthwise_conv2d_reference(x, paddle.randn([2, 1, 7, 7]), paddle.ones([2]))
    assert seen == 3 * [paddle.float32] and contexts == [{"enable": False}]
    assert y.dtype == x.dtype
