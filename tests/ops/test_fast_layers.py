"""Networks whose layers are swapped: which are, what stays, what they compute, train and export."""

import copy
import subprocess
import sys

import numpy as np
import paddle
import pytest
from harness import finish, metrics
from paddle import nn
from tiny import ROOT

from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.ops import FastDepthwiseConv2D, use_fast_depthwise_conv, use_large_kernel_ops

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]

VARIANTS = {  # kernels, small kernel, ratio, large and small kernels in each block
    "31B": ([31, 29, 27, 13], 5, 1.0, 2),
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
        num_classes=5,
    )


def twin(model, impl):
    """The same network, whose convolutions are computed by `impl`."""
    other = copy.deepcopy(model)
    use_large_kernel_ops(other, impl)
    return other


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


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize(
    "out_channels, kernel, options",
    [
        (6, 5, dict(padding=2, groups=1)),  # not depthwise
        (12, 5, dict(padding=2)),
        (6, 5, dict(padding=2, stride=2)),
        (6, 5, dict(padding=4, dilation=2)),
        (6, 5, dict(padding=1)),
        (6, 4, dict(padding=2)),
        (6, (5, 3), dict(padding=(2, 1))),
        (6, 65, dict(padding=32)),
        (6, 1, {}),
        (6, 5, dict(padding=2, padding_mode="circular")),
        (6, 5, dict(padding=2, data_format="NHWC")),
        (6, 5, dict(padding="SAME")),
    ],
)
def test_ineligible_layers_stay(out_channels, kernel, options):
    layer = nn.Conv2D(6, out_channels, kernel, **{"groups": 6, **options})
    assert use_fast_depthwise_conv(layer) == 0 and type(layer) is nn.Conv2D


def test_padding_may_be_given_for_each_axis():
    assert use_fast_depthwise_conv(nn.Conv2D(6, 6, 5, padding=(2, 2), groups=6)) == 1


def logits_and_gradients(model, images):
    """Logits, and gradients by name; the model has none afterwards."""
    logits = model(images)
    nn.functional.cross_entropy(logits, paddle.arange(len(images))).backward()
    gradients = {
        n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None
    }
    model.clear_gradients()
    return logits.numpy(), gradients


@pytest.mark.parametrize("impl", ["auto", "matmul"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_equal_those_of_paddles_convolutions(training, impl):
    plain = network("31B")
    fast = twin(plain, impl)
    images = paddle.randn([4, 3, 64, 96])
    for model in (plain, fast):
        model.train() if training else model.eval()
    logits, gradients = logits_and_gradients(fast, images)
    wanted_logits, wanted = logits_and_gradients(plain, images)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())
    # Those of norms before norms cancel out: they are what is left of values as large as the
    # largest gradient, 1e5 times theirs, and have its rounding.
    rounding = 2e-7 * max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        atol = 2e-3 * np.abs(gradient).max() + rounding
        np.testing.assert_allclose(gradients[name], gradient, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["auto", "matmul"])
def test_31b_equals_paddles_own(impl):
    """At its full width and depth, with two images of 224 pixels.

    Batch norm over so few values enlarges rounding; by how much, a third network says, which
    differs from Paddle's own in the last places of its weights alone.
    """
    plain = build_replknet(get_config("configs/replknet_31b.yaml", MODEL__DROPPATH=0.0))
    fast, rounded = twin(plain, impl), copy.deepcopy(plain)
    for parameter in rounded.parameters():
        parameter.set_value(parameter * (1 + 2**-23 * paddle.randn(parameter.shape)))
    images = paddle.randn([2, 3, 224, 224])
    wanted_logits, wanted = logits_and_gradients(plain, images)
    logits, gradients = logits_and_gradients(fast, images)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4 * np.abs(wanted_logits).max())

    def deviation(got):
        """Root mean square over that of the gradient, of all convolutions together."""
        names = [name for name in wanted if name.endswith("conv.weight")]
        difference = sum(((got[n] - wanted[n]).astype("float64") ** 2).sum() for n in names)
        return (difference / sum((wanted[n].astype("float64") ** 2).sum() for n in names)) ** 0.5

    assert deviation(gradients) < 3 * deviation(logits_and_gradients(rounded, images)[1]) < 0.1


class Net(nn.Layer):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2D(3, 6, 1)
        self.large = nn.Conv2D(6, 6, 9, padding=4, groups=6)
        self.last = nn.Linear(6, 2)
        self.run = lambda layers, x: layers(x)

    def forward(self, x):
        return self.run(lambda x: self.last(self.large(self.first(x)).mean([2, 3])), x)


@pytest.mark.parametrize("impl", ["auto", "matmul"])
@pytest.mark.parametrize("full_graph", [True, False])
def test_a_captured_program_trains_like_eager_mode(full_graph, impl):
    plain, images = Net(), paddle.randn([2, 3, 12, 10])
    fast = twin(plain, impl)
    wanted_logits, wanted = logits_and_gradients(plain, images)
    eager_logits, _ = logits_and_gradients(fast, images)
    logits, got = logits_and_gradients(paddle.jit.to_static(fast, full_graph=full_graph), images)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eager_logits, wanted_logits, rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(got[name], gradient, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("impl", ["auto", "matmul"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(reentrant, impl):
    from paddle.distributed.fleet.utils import recompute

    model, images = twin(Net(), impl), paddle.randn([2, 3, 12, 10])
    _, wanted = logits_and_gradients(model, images)
    images.stop_gradient = False
    model.run = lambda layers, x: recompute(layers, x, use_reentrant=reentrant)
    _, got = logits_and_gradients(model, images)
    for name, gradient in wanted.items():
        assert np.array_equal(got[name], gradient), name


EXPORTED = """
import sys
import numpy as np
import paddle
case = np.load(sys.argv[1] + "/case.npz")
program = paddle.jit.load(sys.argv[1] + "/net")
operations = program.program().global_block().ops
names = [op.name() if hasattr(op, "name") else op.type for op in operations]
assert any("depthwise" in n for n in names) == (sys.argv[2] == "auto"), names
got = program(paddle.to_tensor(case["images"])).numpy()
np.testing.assert_allclose(got, case["wanted"], atol=1e-5)
assert "replknet_paddle" not in sys.modules
"""


@pytest.mark.parametrize("impl", ["auto", "matmul"])
@pytest.mark.parametrize("batch", [None, 2])
def test_an_exported_program_is_made_of_paddles_operations(batch, impl, tmp_path):
    model, images = Net(), paddle.randn([2, 3, 12, 10])
    model.eval()
    with paddle.no_grad():
        wanted = model(images).numpy()
    spec = paddle.static.InputSpec([batch, 3, 12, 10], "float32")
    paddle.jit.save(twin(model, impl), str(tmp_path / "net"), input_spec=[spec])
    np.savez(tmp_path / "case.npz", images=images.numpy(), wanted=wanted)
    command = [sys.executable, "-c", EXPORTED, str(tmp_path), impl]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr


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
from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.engine.precision import Precision
from replknet_paddle.ops import depthwise, gpu_choice, matmul_conv
from replknet_paddle.ops import use_fast_depthwise_conv, use_fast_pointwise_conv

depthwise.is_on_cpu = lambda x: False  # tensors of the GPU, for `auto`
gpu_choice._seconds = lambda call: 1.0  # whose events a CPU has not
matmul_conv._default_memory_bytes = lambda device: 2**29
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
