"""Matrix products against float64: values, gradients, rounding, bits, memory, captured programs."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from double_precision import (
    conv_and_gradients,
    conv_and_gradients_by_fft,
    relative_error,
)
from paddle import nn

from replknet_paddle.ops import large_kernel_depthwise_conv2d, use_fast_depthwise_conv
from replknet_paddle.ops.matmul_conv import weight_gradient

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

STAGES = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]
NAMES = ("y", "dx", "dweight", "dbias")
HALF = ("float16", "bfloat16")


def arrays(batch, channels, height, width, kernel, seed=0):
    """x, weight, bias and dy."""
    rng = np.random.default_rng(seed)
    image = (batch, channels, height, width)
    shapes = [image, (channels, 1, kernel, kernel), (channels,), image]
    return [rng.standard_normal(shape, "float32") for shape in shapes]


def ours(x, weight, bias, dy, memory=2**29, dtype="float32", weight_dtype="float32"):
    """Output and gradients by x, weight and bias."""
    dtypes = (dtype, weight_dtype, weight_dtype)
    tensors = [paddle.to_tensor(a).astype(t) for a, t in zip((x, weight, bias), dtypes)]
    for tensor in tensors:
        tensor.stop_gradient = False
    y = large_kernel_depthwise_conv2d(*tensors, impl="matmul", memory_bytes=memory)
    gradients = paddle.grad(y, tensors, paddle.to_tensor(dy).astype(dtype))
    assert [t.dtype for t in (y, *gradients)] == [t.dtype for t in (tensors[0], *tensors)]
    return [t.astype("float32").numpy() for t in (y, *gradients)]


def check(shape, got, wanted):
    """The bias's gradient, Paddle's own sum of what may cancel out, is not compared."""
    for name, a, b in zip(NAMES[:3], got, wanted):
        error = relative_error(a, b)
        assert error <= 2e-6, f"{name} of {shape}: {error:.2e}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels, side, kernel", STAGES)
def test_stages_of_31b_equal_float64(batch, channels, side, kernel):
    x, weight, bias, dy = arrays(batch, channels, side, side, kernel)
    y, dx, dweight = conv_and_gradients_by_fft(x, weight, dy)
    got = ours(x, weight, bias, dy)
    check(x.shape, got, (y + bias[:, None, None], dx, dweight))


def test_the_references_agree():
    x, weight, _, dy = arrays(2, 3, 9, 14, 11)
    for a, b in zip(conv_and_gradients_by_fft(x, weight, dy), conv_and_gradients(x, weight, dy)):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("part", range(10))
def test_random_shapes_equal_float64(part):
    """Rectangular maps, smaller than the kernel, of one row or pixel; kernels from 1 to 63."""
    rng = np.random.default_rng(part)
    for i in range(30):
        batch, channels = rng.integers(1, 4), rng.integers(1, 12)
        (height, width), kernel = rng.integers(1, 40, 2), 2 * rng.integers(0, 32) + 1
        memory = rng.choice([2**21, 2**23, 2**29])  # small ones make chunks of channels
        shape = tuple(map(int, (batch, channels, height, width, kernel)))
        x, weight, bias, dy = arrays(*shape, seed=i)
        got = ours(x, weight, bias, dy, int(memory))
        check(shape, got, conv_and_gradients(x, weight, dy, bias))


@pytest.mark.parametrize("shape", [(2, 6, 20, 23, 31), (1, 8, 14, 14, 27), (3, 5, 7, 5, 13)])
def test_gradients_are_adjoint_to_the_convolution(shape):
    """<conv(x), g> = <x, dgrad(g)> = <weight, wgrad(g)>."""
    x, weight, _, g = arrays(*shape)
    y, dx, dweight, _ = ours(x, weight, np.zeros(shape[1], "float32"), g)
    products = [np.vdot(a.astype("float64"), b) for a, b in ((y, g), (x, dx), (weight, dweight))]
    assert np.ptp(products) <= 1e-5 * np.linalg.norm(y.astype("float64")) * np.linalg.norm(g)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight_dtype", ["float32", "half"])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28, 29), (3, 4, 14, 14, 27), (2, 2, 30, 41, 31)])
def test_half_precision_has_the_rounding_of_products_summed_in_float32(shape, weight_dtype, dtype):
    """On CPU values are rounded where a GPU rounds them: inputs, T, windows and products."""
    weight_dtype = dtype if weight_dtype == "half" else weight_dtype
    exact = [paddle.to_tensor(a).astype(dtype).astype("float32").numpy() for a in arrays(*shape)]
    x, weight, bias, dy = exact
    got = ours(x, weight, bias, dy, dtype=dtype, weight_dtype=weight_dtype)
    unit = largest_rounding_error(dtype)
    y, dx, dweight, _ = conv_and_gradients(x, weight, dy, bias)
    # y: the product's rounding and the bias's. dweight: that of dT and of its first sum, many of
    # each in one value, and of the result where the weight is half. Of the largest value.
    bounds = (2 * unit, unit, unit if weight_dtype == "float32" else 2 * unit)
    for name, a, b, bound in zip(NAMES, got, (y, dx, dweight), bounds):
        assert relative_error(a, b) <= 1.02 * bound, name
    # Sums in half precision would be many times as far off.
    assert relative_error(got[1], dx) < 0.25 * half_sums_error(dy, weight, dtype)


def largest_rounding_error(dtype):
    """Relative; half a unit in the last place, or in some of Paddle's versions on CPU a whole."""
    values = np.random.default_rng(0).uniform(1, 2, 10000).astype("float32")
    rounded = paddle.to_tensor(values).astype(dtype).astype("float32").numpy()
    error = (np.abs(rounded - values) / values).max()
    assert error < {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    return error


def half_sums_error(dy, weight, dtype):
    """What summing one output in half precision, tap by tap, loses of the largest value."""
    flipped, half = weight[:1, 0, ::-1, ::-1], weight.shape[-1] // 2
    margins = [(half, half), (half, half)]
    padded, (height, width) = np.pad(dy[0, 0], margins), dy.shape[2:]
    sums, exact = np.zeros((height, width), "float32"), np.zeros((height, width))
    for u, v in np.ndindex(*flipped.shape[1:]):
        window = padded[u : u + height, v : v + width]
        exact += flipped[0, u, v].astype("float64") * window
        sums = paddle.to_tensor(sums + flipped[0, u, v] * window).astype(dtype)
        sums = sums.astype("float32").numpy()
    return relative_error(sums, exact)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_weights_gradient_has_the_same_bits_each_time(dtype):
    x, _, _, dy = arrays(3, 16, 28, 28, 29)
    x, dy = (paddle.to_tensor(a).astype(dtype) for a in (x, dy))
    first, second = (weight_gradient(x, dy, 29, 2**23).numpy() for _ in range(2))
    assert first.dtype == np.float32 and first.tobytes() == second.tobytes()


def test_the_gradients_of_inputs_that_need_none_are_not_computed(monkeypatch):
    from replknet_paddle.ops import matmul_conv

    calls = []
    for name in ("convolve", "weight_gradient"):
        function = getattr(matmul_conv, name)
        monkeypatch.setattr(
            matmul_conv, name, lambda *a, f=function, n=name, **k: calls.append(n) or f(*a, **k)
        )
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


class Net(nn.Layer):
    def __init__(self, kernel=9):
        super().__init__()
        self.first = nn.Conv2D(3, 6, 1)
        self.large = nn.Conv2D(6, 6, kernel, padding=kernel // 2, groups=6)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.large(self.first(x)).mean([2, 3]))


def losses_and_gradients(model, images):
    loss = (model(images) ** 2).mean()
    loss.backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.clear_gradients()
    return float(loss), gradients


@pytest.mark.parametrize("full_graph", [True, False])
def test_a_captured_program_trains_like_eager_mode(full_graph):
    model, images = Net(), paddle.randn([2, 3, 12, 10])
    wanted_loss, wanted = losses_and_gradients(model, images)  # Paddle's own
    assert use_fast_depthwise_conv(model, "matmul") == 1
    eager_loss, _ = losses_and_gradients(model, images)
    loss, got = losses_and_gradients(paddle.jit.to_static(model, full_graph=full_graph), images)
    assert loss == pytest.approx(wanted_loss, rel=1e-5) == pytest.approx(eager_loss, rel=1e-5)
    for name, gradient in wanted.items():
        np.testing.assert_allclose(got[name], gradient, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(reentrant):
    from paddle.distributed.fleet.utils import recompute

    model, images = Net(), paddle.randn([2, 3, 12, 10])
    use_fast_depthwise_conv(model, "matmul")
    _, wanted = losses_and_gradients(model, images)
    images.stop_gradient = False
    _, got = losses_and_gradients(
        Recomputed(model, lambda m, x: recompute(m, x, use_reentrant=reentrant)), images
    )
    for name, gradient in wanted.items():
        assert np.array_equal(got[f"model.{name}"], gradient), name


class Recomputed(nn.Layer):
    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x):
        return self.run(self.model, x)


@pytest.mark.parametrize("batch", [None, 2])
def test_an_exported_program_is_made_of_paddles_operations(batch, tmp_path):
    model = Net()
    model.eval()
    images = paddle.randn([2, 3, 12, 10])
    with paddle.no_grad():
        wanted = model(images).numpy()
    use_fast_depthwise_conv(model, "matmul")
    spec = paddle.static.InputSpec([batch, 3, 12, 10], "float32")
    paddle.jit.save(model, str(tmp_path / "net"), input_spec=[spec])
    np.savez(tmp_path / "case.npz", images=images.numpy(), wanted=wanted)
    code = """
import sys
import numpy as np
import paddle
case = np.load(sys.argv[1] + "/case.npz")
program = paddle.jit.load(sys.argv[1] + "/net")
operations = program.program().global_block().ops
names = [op.name() if hasattr(op, "name") else op.type for op in operations]
assert any("matmul" in n for n in names) and not any("depthwise" in n for n in names), names
got = program(paddle.to_tensor(case["images"])).numpy()
np.testing.assert_allclose(got, case["wanted"], atol=1e-5)
assert "replknet_paddle" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
