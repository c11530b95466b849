"""Depthwise convolutions against float64, in every way that Paddle can call them."""

import functools
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from double_precision import (
    STAGES,
    arrays,
    conv_and_gradients,
    conv_and_gradients_by_fft,
    relative_error,
    with_gradients,
)
from paddle import nn

from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import (
    dispatch,
    large_kernel_depthwise_conv2d,
    large_kernel_depthwise_conv2d_reference,
    use_fast_depthwise_conv,
)
from replknet_paddle.ops.library import LibraryError, reference_passes
from replknet_paddle.runtime.errors import InputError

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]

IMPLS = ["direct", "fft", "matmul", "paddle"]
# Types of x and weight: without mixed precision, at level O1 or O2, and of halved networks.
MIXED = [("float32", "float32"), ("bfloat16", "float32"), ("float16", "float16")]
TOLERANCE = {"direct": 2e-6, "fft": 2e-5, "auto": 2e-5, "matmul": 2e-6}


def ours(x, weight, bias, dy, impl, **options):
    """Output and gradients by x, weight and bias."""
    convolution = functools.partial(large_kernel_depthwise_conv2d, impl=impl, **options)
    return with_gradients(convolution, x, weight, bias, dy)


def check(shape, impls, seed=0, memory_bytes=2**29):
    x, weight, bias, dy = arrays(*shape, seed=seed)
    y, dx, dweight = conv_and_gradients_by_fft(x, weight, dy)
    wanted = [y + bias[:, None, None], dx, dweight, dy.sum((0, 2, 3), dtype="float64")]
    for impl in impls:
        got = ours(x, weight, bias, dy, impl, memory_bytes=memory_bytes)
        names = ["y", "dx", "dweight"]
        if impl != "matmul":  # by products it is Paddle's own sum of what may cancel out
            names.append("dbias")
        for name, a, b in zip(names, got, wanted):
            error = relative_error(a, b)
            assert error <= TOLERANCE[impl], f"{impl} {name} of {shape}: {error:.2e}"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels, side, kernel", STAGES)
def test_stages_of_31b_equal_float64(batch, channels, side, kernel):
    check((batch, channels, side, side, kernel), TOLERANCE)


@pytest.mark.parametrize("part", range(10))
def test_random_shapes_equal_float64(part):
    """Rectangular maps, smaller than the kernel, of one row or pixel; kernels from 1 to 63."""
    rng = np.random.default_rng(part)
    for i in range(30):
        batch, channels = rng.integers(1, 4), rng.integers(1, 40)
        (height, width), kernel = rng.integers(1, 40, 2), 2 * rng.integers(0, 32) + 1
        memory = rng.choice([2**21, 2**23, 2**29])  # small ones make chunks of channels
        shape = tuple(map(int, (batch, channels, height, width, kernel)))
        impls = ["direct", "fft", "matmul"] if kernel > 1 else ["matmul"]
        check(shape, impls, seed=i, memory_bytes=int(memory))


def test_the_references_agree():
    """Transforms, Paddle's in float64, and the plain sums of the library's self-test."""
    x, weight, bias, dy = arrays(2, 3, 9, 14, 11)
    for ours, paddles in (
        (reference_passes(x, weight, bias, dy), conv_and_gradients(x, weight, dy, bias)),
        (conv_and_gradients_by_fft(x, weight, dy), conv_and_gradients(x, weight, dy)),
    ):
        assert all(relative_error(a, b) < 1e-13 for a, b in zip(ours, paddles))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_float32_rounded_at_the_end(dtype):
    x, weight, bias, dy = map(paddle.to_tensor, arrays(2, 5, 9, 8, 7))
    x, dy = x.astype(dtype), dy.astype(dtype)
    for weight_dtype in ("float32", dtype):
        halves = [x, weight.astype(weight_dtype), bias.astype(weight_dtype)]
        for tensor in halves:
            tensor.stop_gradient = False
        y = large_kernel_depthwise_conv2d(*halves)
        gradients = paddle.grad(y, halves, dy)
        wanted = ours(*(t.astype("float32").numpy() for t in (*halves, dy)), "auto")
        for got, like, exact in zip((y, *gradients), (x, *halves), wanted):
            assert got.dtype == like.dtype
            rounded = paddle.to_tensor(exact).astype(like.dtype)
            assert (got == rounded).all()
        reference = large_kernel_depthwise_conv2d_reference(*halves)
        assert reference.dtype == x.dtype
        difference = (reference.astype("float32") - y.astype("float32")).abs().max()
        assert float(difference) < 0.02 * float(y.astype("float32").abs().max())


@pytest.mark.parametrize("x_dtype, weight_dtype", MIXED, ids=" ".join)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_leaf", [True, False])
def test_gradients_by_some_of_the_inputs_are_those_by_all(is_leaf, impl, x_dtype, weight_dtype):
    dtypes = (x_dtype, weight_dtype, weight_dtype)
    *values, dy = map(paddle.to_tensor, arrays(2, 3, 9, 8, 7))
    leaves = [value.astype(dtype) for value, dtype in zip(values, dtypes)]
    for leaf in leaves:
        leaf.stop_gradient = False

    def convolution():
        inputs = leaves if is_leaf else [1 * leaf for leaf in leaves]
        return large_kernel_depthwise_conv2d(*inputs, impl=impl)

    convolution().backward(dy.astype(x_dtype))
    wanted = [leaf.grad.numpy() for leaf in leaves]
    assert all(np.abs(gradient).max() > 0 for gradient in wanted)
    for chosen in [[0], [1], [2], [0, 1], [1, 0], [2, 1], [0, 1, 2]]:
        inputs = [leaves[i] for i in chosen]
        got = paddle.grad(convolution(), inputs, dy.astype(x_dtype))
        for i, gradient in zip(chosen, got):
            assert np.array_equal(gradient.numpy(), wanted[i]), (chosen, i)
    y = convolution()
    twice = [paddle.grad(y, leaves[:1], dy.astype(x_dtype), retain_graph=True) for _ in range(2)]
    assert np.array_equal(twice[0][0].numpy(), wanted[0])
    assert np.array_equal(twice[1][0].numpy(), wanted[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_training", [True, False])
def test_a_network_has_gradients_by_its_images_or_one_weight_alone(is_training, impl):
    network = RepLKNet(large_kernel_sizes=[13, 11, 9, 7], layers=[1] * 4, channels=[4] * 4)
    use_fast_depthwise_conv(network, impl)
    network.train() if is_training else network.eval()
    images = paddle.randn([2, 3, 64, 64])
    images.stop_gradient = False
    large = network.stages[0].blocks[0].large_kernel.large_kernel_origin.conv.weight
    small = network.stages[1].blocks[0].large_kernel.small_kernel_conv.conv.weight

    def loss():
        paddle.seed(0)  # of dropped paths
        return (network(images) ** 2).mean()

    loss().backward()
    for tensor in (images, large, small):
        (alone,) = paddle.grad(loss(), [tensor])
        assert float(alone.abs().max()) > 0
        assert np.array_equal(alone.numpy(), tensor.grad.numpy())


class Net(nn.Layer):
    def __init__(self, bias):
        super().__init__()
        self.weight = self.create_parameter([6, 1, 9, 9])
        self.offset = self.create_parameter([6], is_bias=True) if bias else None

    def forward(self, x):
        return large_kernel_depthwise_conv2d(x * 1.0, self.weight, self.offset) * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("full_graph", [True, False])
def test_captured_and_saved_programs_compute_the_same(bias, full_graph, tmp_path):
    net, x = Net(bias), paddle.randn([2, 6, 9, 8])
    spec = paddle.static.InputSpec([None, 6, None, None], "float32")
    paddle.jit.save(net, str(tmp_path / "net"), input_spec=[spec])
    y = net(x)
    assert (paddle.jit.load(str(tmp_path / "net"))(x) == y).all()
    gradients = paddle.grad((y * y).sum(), net.parameters())
    z = paddle.jit.to_static(net, full_graph=full_graph)(x)
    assert (z == y).all()
    for a, b in zip(paddle.grad((z * z).sum(), net.parameters()), gradients):
        assert (a == b).all()


def test_several_python_threads_compute_at_once(operators):
    """The kernels for the gradients: Paddle's own backward pass breaks when threads share it."""
    shape = (1, 40, 14, 14, 27)

    @paddle.no_grad()
    def results(seed):
        x, weight, bias, dy = arrays(*shape, seed=seed)
        y = large_kernel_depthwise_conv2d(*map(paddle.to_tensor, (x, weight, bias))).numpy()
        dx, dweight = np.empty_like(x), np.empty_like(weight)
        operators.gradients(shape, *(a.ctypes.data for a in (x, weight, dy, dx, dweight)))
        return b"".join(a.tobytes() for a in (y, dx, dweight))

    wanted = [results(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(results, list(range(4)) * 20)) == wanted * 20


def _in_child(values, wanted):
    got = ours(*values, "auto")
    raise SystemExit(any(a.tobytes() != b.tobytes() for a, b in zip(got, wanted)))


def test_a_process_forked_after_use_computes_too():
    values = arrays(1, 40, 14, 14, 27)
    wanted = ours(*values, "auto")
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(values, wanted))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert ours(*values, "auto")[0].tobytes() == wanted[0].tobytes()


def zeros(*shape, dtype="float32"):
    return paddle.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((zeros(1, 4, 9, 9), zeros(4, 1, 4, 4)), "(4, 1, 4, 4)"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 3, 5)), "(4, 1, 3, 5)"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 65, 65)), "(4, 1, 65, 65)"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 1, 1)), "(4, 1, 1, 1)"),
        ((zeros(4, 9, 9), zeros(4, 1, 3, 3)), "(4, 9, 9)"),
        ((zeros(1, 4, 9, 9), zeros(4, 3, 3)), "(4, 3, 3)"),
        ((zeros(1, 5, 9, 9), zeros(4, 1, 3, 3)), "(1, 5, 9, 9)"),
        ((zeros(1, 4, 9, 9), zeros(4, 2, 3, 3)), "(4, 2, 3, 3)"),
        ((zeros(1, 4, 0, 9), zeros(4, 1, 3, 3)), "(1, 4, 0, 9)"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 3, 3), zeros(5)), "(5,)"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 3, 3), None, 2), "padding must be 1"),
        ((zeros(1, 4, 9, 9, dtype="float64"), zeros(4, 1, 3, 3)), "float64"),
        ((zeros(1, 4, 9, 8).transpose([0, 1, 3, 2]), zeros(4, 1, 3, 3)), "contiguous"),
        ((zeros(1, 4, 9, 9), zeros(3, 3, 1, 4).transpose([3, 2, 0, 1])), "contiguous"),
        ((zeros(1, 4, 9, 9), zeros(4, 1, 3, 3), None, None, "cuda"), "auto, paddle, direct, fft"),
    ],
)
def test_bad_input_is_a_value_error_that_shows_it(arguments, told):
    with pytest.raises(ValueError) as error:
        large_kernel_depthwise_conv2d(*arguments)
    assert told in str(error.value)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_images_give_no_images(impl):
    x, weight = zeros(0, 4, 9, 9), zeros(4, 1, 7, 7)
    x.stop_gradient = weight.stop_gradient = False
    y = large_kernel_depthwise_conv2d(x, weight, impl=impl)
    dx, dweight = paddle.grad(y.sum(), [x, weight])
    assert y.shape == dx.shape == [0, 4, 9, 9] and not dweight.any()


def test_without_the_operator_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    def get_library():
        raise LibraryError("it is raining")

    monkeypatch.setattr(dispatch, "get_library", get_library)
    x, weight = paddle.randn([1, 4, 9, 9]), paddle.randn([4, 1, 5, 5])
    with caplog.at_level("WARNING"):
        for _ in range(3):
            y = large_kernel_depthwise_conv2d(x, weight)
    assert (y == large_kernel_depthwise_conv2d_reference(x, weight)).all()
    assert [record.getMessage() for record in caplog.records] == [
        "depthwise convolutions run on Paddle's own, not on the compiled operator: it is raining"
    ]
    with pytest.raises(InputError, match="'fft' needs the compiled operator: it is raining"):
        large_kernel_depthwise_conv2d(x, weight, impl="fft")
