"""Matrix products in whole networks: equal to Paddle's own, and with nothing private of Paddle."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from harness import finish, metrics
from tiny import ROOT

from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.ops import (
    FastDepthwiseConv2D,
    describe_convolutions,
    use_fast_depthwise_conv,
    use_fast_pointwise_conv,
)

pytestmark = pytest.mark.numbers


def pair(make):
    """Two networks of the same weights: on Paddle's own convolutions, and on products."""
    models = []
    for impl in ("paddle", "matmul"):
        paddle.seed(7)
        models.append(make())
        use_fast_depthwise_conv(models[-1], impl)
        use_fast_pointwise_conv(models[-1], impl)
    return models


def step(model, images):
    """Logits in training mode, and what a step of SGD changes each parameter by."""
    model.train()
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.1, parameters=parameters)
    logits = model(images)
    paddle.nn.functional.cross_entropy(logits, paddle.arange(len(images))).backward()
    optimizer.step()
    optimizer.clear_grad()
    return logits.numpy(), {n: p.numpy() - before[n] for n, p in model.named_parameters()}


def compare_logits(plain, products, images):
    products.set_state_dict(plain.state_dict())
    with paddle.no_grad():
        plain.eval()
        products.eval()
        wanted_logits, logits = plain(images).numpy(), products(images).numpy()
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())


def test_a_small_network_equals_paddles_own():
    def make():
        return RepLKNet(
            large_kernel_sizes=[31, 29, 27, 13],
            layers=[1, 1, 1, 1],
            channels=[4, 6, 8, 10],
            num_classes=5,
            drop_path_rate=0.0,
        )

    plain, products = pair(make)
    large = [x for x in products.sublayers() if getattr(x, "impl", None) == "matmul"]
    assert len(large) == 4 and all(isinstance(x, FastDepthwiseConv2D) for x in large)
    assert "4 by matrix products" in describe_convolutions(products)
    images = paddle.randn([3, 3, 64, 96])
    (logits, changes), (wanted_logits, wanted) = step(products, images), step(plain, images)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())
    for name, change in wanted.items():  # differences of weights up to 1 have 2**-23 of rounding
        largest = np.abs(change).max()
        np.testing.assert_allclose(changes[name], change, atol=2e-3 * largest + 3e-7, err_msg=name)
    compare_logits(plain, products, images)


@pytest.mark.slow
def test_31b_equals_paddles_own():
    """At its full width and depth, with two images of 224 pixels.

    Batch norm over so few values enlarges rounding; by how much, a third network says, which
    differs from Paddle's own in the last places of its weights alone.
    """
    config = get_config(ROOT / "configs" / "replknet_31b.yaml").clone()
    config.defrost()
    config.MODEL.DROPPATH = 0.0
    plain, products = pair(lambda: build_replknet(config))
    rounded, _ = pair(lambda: build_replknet(config))
    for parameter in rounded.parameters():
        noise = 2**-23 * paddle.randn(parameter.shape)
        parameter.set_value(parameter * (1 + noise))
    images = paddle.randn([2, 3, 224, 224])
    (logits, changes), (wanted_logits, wanted) = step(products, images), step(plain, images)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())
    _, by_rounding = step(rounded, images)

    def deviation(got):
        """Root mean square over that of the change, of all parameters of a kind together."""
        names = [name for name in wanted if name.endswith("conv.weight")]
        difference = sum(((got[n] - wanted[n]).astype("float64") ** 2).sum() for n in names)
        return (difference / sum((wanted[n].astype("float64") ** 2).sum() for n in names)) ** 0.5

    assert deviation(changes) < 3 * deviation(by_rounding) < 0.1
    compare_logits(plain, products, images)


def test_a_run_trains_and_evaluates_on_products(tiny_config_file, tiny_data, tmp_path):
    """With the tiny recipe; its losses are those of Paddle's own."""
    losses = []
    for impl in ("paddle", "matmul"):
        folder = tmp_path / impl
        flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder}"]
        keys = ["MODEL.CONV_IMPL", impl, "MODEL.CONV_MEMORY_MB", "16", "TRAIN.NUM_EPOCHS", "1"]
        text = finish([*flags, "-nproc=1", "-opts", *keys], output=tmp_path / f"{impl}.txt")
        assert ("by matrix products" in text) == (impl == "matmul")
        (record,) = metrics(folder)
        losses.append([record["train_loss"], record["val_loss"]])
    np.testing.assert_allclose(*losses, rtol=1e-3)


WITHOUT_PRIVATE_PARTS = """
import sys
import paddle

# A Paddle that has moved what the CPU operators and program capture need of it.
del paddle._C_ops._run_custom_op
for name in ("jit.dy2static.py_layer", "utils.cpp_extension"):
    sys.modules["paddle." + name] = None
paddle.device.get_device = lambda: "gpu:0"

import numpy as np
from replknet_paddle.model import RepLKNet
from replknet_paddle.engine.precision import Precision
from replknet_paddle.ops import depthwise, use_fast_depthwise_conv, use_fast_pointwise_conv

depthwise.is_on_cpu = lambda x: False  # tensors of the GPU, for `auto`
losses = {}
paddle.seed(0)
images, labels = paddle.randn([8, 3, 64, 64]), paddle.arange(8) % 3
for impl in ("paddle", "auto", "matmul"):
    paddle.seed(0)
    model = RepLKNet(large_kernel_sizes=[13, 11, 9, 7], layers=[1] * 4, channels=[4] * 4,
                     num_classes=3, drop_path_rate=0.0)
    assert use_fast_depthwise_conv(model, impl) == (0 if impl == "paddle" else 4)
    assert use_fast_pointwise_conv(model, impl) == 0
    precision = Precision()
    # At ten times this rate rounding alone grows to 0.5 % of the third loss; here to 4e-6.
    optimizer = paddle.optimizer.SGD(0.001, parameters=model.parameters())
    precision.prepare(model, optimizer)
    losses[impl] = []
    for _ in range(3):
        with precision.autocast():
            loss = paddle.nn.functional.cross_entropy(model(images), labels)
        precision.backward(loss)
        precision.step(optimizer, finite=True)
        optimizer.clear_grad()
        losses[impl].append(float(loss))
    model.eval()
    with paddle.no_grad():
        model(images)
np.testing.assert_allclose(losses["auto"], losses["paddle"], rtol=1e-4)
np.testing.assert_allclose(losses["matmul"], losses["paddle"], rtol=1e-4)
"""


def test_training_on_gpu_needs_no_private_part_of_paddle():
    """The device is faked."""
    command = [sys.executable, "-c", WITHOUT_PRIVATE_PARTS]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
