"""Swapping the layers of a network: which, what stays, and what is exported."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from paddle import nn

from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import (
    FastDepthwiseConv2D,
    use_fast_depthwise_conv,
    use_fast_pointwise_conv,
    use_large_kernel_ops,
)

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]

VARIANTS = {  # kernels, small kernel, ratio, large and small kernels in each block
    "31B": ([31, 29, 27, 13], 5, 1.0, 2),
    "31L": ([31, 29, 27, 13], 5, 1.0, 2),
    "XL": ([27, 27, 27, 13], None, 1.5, 1),
}


def network(variant, layers=(1, 1, 2, 1)):
    kernels, small, ratio, _ = VARIANTS[variant]
    return RepLKNet(
        large_kernel_sizes=kernels,
        layers=list(layers),
        channels=[4, 4, 8, 8],
        small_kernel=small,
        dw_ratio=ratio,
        num_classes=3,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_depthwise_layer_of_stride_one_is_swapped(variant):
    model = network(variant, layers=(2, 2, 18, 2))
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # The stem has one of stride 1; the others, and the transitions', have stride 2.
    assert use_fast_depthwise_conv(model) == 24 * VARIANTS[variant][3] + 1
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == names
    assert use_fast_depthwise_conv(model) == 24 * VARIANTS[variant][3] + 1  # again: the same
    assert use_fast_depthwise_conv(model, "paddle") == 0
    assert not [x for x in model.sublayers() if isinstance(x, FastDepthwiseConv2D)]


def test_one_call_swaps_both_kinds_and_says_what_computes_them():
    model = network("31B")
    said = use_large_kernel_ops(model)
    assert said.startswith("depthwise convolutions: 11 by the compiled operator; 1x1 convolutions:")
    said = use_large_kernel_ops(model, "matmul", memory_bytes=2**20)
    assert "6 by the compiled operator, 5 by matrix products" in said
    assert use_large_kernel_ops(model, "paddle").endswith("1x1 convolutions: all by Paddle")


@pytest.mark.parametrize("variant", ["31B", "XL"])
def test_merged_network_stays_fast(variant):
    model = network(variant)
    use_fast_depthwise_conv(model)
    model.eval()
    with paddle.no_grad():
        images = paddle.randn([1, 3, 64, 64])
        before = model(images)
        model.structural_reparam()
        after = model(images)
    merged = [
        block.large_kernel.large_kernel_reparam for s in model.stages for block in s.blocks[::2]
    ]
    assert all(type(layer) is FastDepthwiseConv2D for layer in merged)
    np.testing.assert_allclose(after.numpy(), before.numpy(), atol=1e-5)


def test_ineligible_layers_stay():
    channels = 6
    layers = [
        nn.Conv2D(channels, channels, 5, padding=2),  # not depthwise
        nn.Conv2D(channels, 2 * channels, 5, padding=2, groups=channels),
        nn.Conv2D(channels, channels, 5, padding=2, stride=2, groups=channels),
        nn.Conv2D(channels, channels, 5, padding=4, dilation=2, groups=channels),
        nn.Conv2D(channels, channels, 5, padding=1, groups=channels),
        nn.Conv2D(channels, channels, 4, padding=2, groups=channels),
        nn.Conv2D(channels, channels, (5, 3), padding=(2, 1), groups=channels),
        nn.Conv2D(channels, channels, 65, padding=32, groups=channels),
        nn.Conv2D(channels, channels, 1, groups=channels),
        nn.Conv2D(channels, channels, 5, padding=2, groups=channels, padding_mode="circular"),
        nn.Conv2D(channels, channels, 5, padding=2, groups=channels, data_format="NHWC"),
    ]
    assert use_fast_depthwise_conv(nn.Sequential(*layers)) == 0
    assert all(type(layer) is nn.Conv2D for layer in layers)
    same = nn.Conv2D(channels, channels, 5, padding=(2, 2), groups=channels)
    assert use_fast_depthwise_conv(same) == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_training_step_equals_that_of_paddles_convolutions(training):
    paddle.seed(3)
    plain, fast = network("31B"), network("31B")
    fast.set_state_dict(plain.state_dict())
    assert use_fast_depthwise_conv(fast) and use_fast_pointwise_conv(fast)
    images = paddle.randn([4, 3, 64, 64])
    losses = []
    for model in (plain, fast):
        model.train() if training else model.eval()
        losses.append((model(images) ** 2).mean())
        losses[-1].backward()
    np.testing.assert_allclose(float(losses[1]), float(losses[0]), rtol=1e-4)
    for (name, a), (_, b) in zip(plain.named_parameters(), fast.named_parameters()):
        if a.grad is not None:
            scale = float(a.grad.abs().max())
            np.testing.assert_allclose(
                b.grad.numpy(), a.grad.numpy(), atol=2e-3 * scale + 1e-6, err_msg=name
            )


def test_exported_network_runs_where_there_is_no_operator(tmp_path):
    model = RepLKNet(large_kernel_sizes=[7] * 4, layers=[1] * 4, channels=[4] * 4, num_classes=3)
    images = paddle.randn([1, 3, 64, 64])
    assert use_fast_depthwise_conv(model) and use_fast_pointwise_conv(model)
    model.eval()
    spec = paddle.static.InputSpec([None, 3, 64, 64], "float32")
    paddle.jit.save(model, str(tmp_path / "net"), input_spec=[spec])
    with paddle.no_grad():
        np.savez(tmp_path / "case.npz", images=images.numpy(), logits=model(images).numpy())
    code = """
import sys
import numpy as np
import paddle
case = np.load(sys.argv[1] + "/case.npz")
logits = paddle.jit.load(sys.argv[1] + "/net")(paddle.to_tensor(case["images"]))
np.testing.assert_allclose(logits.numpy(), case["logits"], rtol=1e-3, atol=1e-5)
assert "ops" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
