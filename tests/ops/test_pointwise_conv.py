"""The 1x1 convolution against float64."""

import os
import subprocess
import sys

import numpy as np
import paddle
import pytest
from double_precision import conv_and_gradients, relative_error, with_gradients
from paddle import nn
from tiny import ROOT

from replknet_paddle.ops import LibraryError, pointwise_conv2d, use_fast_pointwise_conv

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]


@pytest.mark.parametrize(
    "batch, channels, out_channels, height, width",
    [(1, 128, 512, 56, 56), (2, 512, 128, 28, 28), (3, 1024, 300, 7, 7), (1, 1, 1, 1, 1)]
    + [tuple(map(int, np.random.default_rng(i).integers(1, 30, 5))) for i in range(20)],
)
def test_output_and_gradients_equal_float64(batch, channels, out_channels, height, width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, channels, height, width), "float32")
    weight = rng.standard_normal((out_channels, channels, 1, 1), "float32")
    dy = rng.standard_normal((batch, out_channels, height, width), "float32")
    for got, wanted in zip(
        with_gradients(pointwise_conv2d, x, weight, dy),
        conv_and_gradients(x, weight, dy, groups=1),
    ):
        assert relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_float32_rounded_at_the_end(dtype):
    x, weight = paddle.randn([2, 5, 9, 8]).astype(dtype), paddle.randn([7, 5, 1, 1])
    y = pointwise_conv2d(x, weight)
    assert y.dtype == x.dtype
    assert (y == pointwise_conv2d(x.astype("float32"), weight).astype(dtype)).all()


SIGNALLED = """
import signal, paddle
from replknet_paddle.ops import pointwise_conv2d

def outputs():
    y = pointwise_conv2d(x, weight)
    return [y, *paddle.grad((y * y).sum(), [x, weight])]

def note(*_):
    global signals
    signals += 1

x, weight, signals = paddle.randn([4, 24, 48, 48]), paddle.randn([96, 24, 1, 1]), 0
x.stop_gradient = weight.stop_gradient = False
before = outputs()
signal.signal(signal.SIGVTALRM, note)
signal.setitimer(signal.ITIMER_VIRTUAL, 0.001, 0.001)  # of this process's time on the CPU
while signals < 100:
    assert all((a == b).all() for a, b in zip(outputs(), before))
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
"""


def test_signals_corrupt_nothing():
    # A process with a corrupt heap may hang.
    command, environment = [sys.executable, "-c", SIGNALLED], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_swapped_layer_gives_what_it_gave_before():
    layers = [
        nn.Conv2D(12, 20, 1),
        nn.Conv2D(20, 8, 1, bias_attr=False),
        nn.Conv2D(8, 8, 1, groups=2),  # not eligible, and neither are those below
        nn.Conv2D(8, 8, 3, padding=1),
        nn.Conv2D(8, 8, 1, stride=2),
        nn.Conv2D(8, 8, 1, padding=1),
    ]
    model, x = nn.Sequential(*layers), paddle.randn([2, 12, 8, 8])
    wanted = model(x)
    names = list(model.state_dict())
    assert use_fast_pointwise_conv(model) == 2
    assert list(model.state_dict()) == names
    np.testing.assert_allclose(model(x).numpy(), wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert use_fast_pointwise_conv(model, "paddle") == 0
    assert all(type(layer) is nn.Conv2D for layer in model)
    assert (model(x) == wanted).all()


@pytest.mark.parametrize("full_graph", [True, False])
def test_captured_network_computes_the_same(full_graph):
    model, x = nn.Sequential(nn.Conv2D(12, 20, 1)), paddle.randn([2, 12, 8, 8])
    use_fast_pointwise_conv(model)
    y = model(x)
    gradients = paddle.grad((y * y).sum(), model.parameters())
    z = paddle.jit.to_static(model, full_graph=full_graph)(x)
    assert (z == y).all()
    for a, b in zip(paddle.grad((z * z).sum(), model.parameters()), gradients):
        assert (a == b).all()


@pytest.mark.parametrize(
    "x, weight, told",
    [
        ([1, 4, 9], [4, 4, 1, 1], "(1, 4, 9)"),
        ([1, 4, 9, 9], [4, 4, 3, 3], "(4, 4, 3, 3)"),
        ([1, 4, 9, 9], [4, 5, 1, 1], "(4, 5, 1, 1)"),
        ([1, 4, 0, 9], [4, 4, 1, 1], "(1, 4, 0, 9)"),
    ],
)
def test_bad_input_is_a_value_error_that_shows_it(x, weight, told):
    with pytest.raises(ValueError) as error:
        pointwise_conv2d(paddle.zeros(x), paddle.zeros(weight))
    assert told in str(error.value)


def test_without_onednn_layers_stay_paddles_and_one_line_says_so(operators, monkeypatch, caplog):
    monkeypatch.setattr(type(operators), "has_pointwise", False)
    layer = nn.Conv2D(3, 4, 1)
    assert use_fast_pointwise_conv(layer) == 0 and type(layer) is nn.Conv2D
    [record] = caplog.records
    assert "libdnnl.so.3" in record.getMessage()
    with pytest.raises(LibraryError, match="libdnnl"):
        pointwise_conv2d(paddle.randn([1, 3, 2, 2]), layer.weight)
