"""The operator against float64, in every way that Paddle can call it."""

import multiprocessing
import threading

import numpy as np
import paddle
import pytest
from double_precision import conv_and_gradients, relative_error
from paddle import nn

from replknet_paddle.ops import (
    dispatch,
    large_kernel_depthwise_conv2d,
    large_kernel_depthwise_conv2d_reference,
)
from replknet_paddle.ops.library import LibraryError, reference_passes
from replknet_paddle.runtime.errors import InputError

pytestmark = [pytest.mark.usefixtures("operators"), pytest.mark.numbers, pytest.mark.paddle_version]

STAGES = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)]
TOLERANCE = {"direct": 2e-6, "fft": 2e-5}


def arrays(batch, channels, height, width, kernel, seed=0):
    """x, weight, bias and dy."""
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, channels, height, width),
        (channels, 1, kernel, kernel),
        (channels,),
        (batch, channels, height, width),
    ]
    return [rng.standard_normal(shape, "float32") for shape in shapes]


def ours(x, weight, bias, dy, impl):
    """Output and gradients by x, weight and bias."""
    tensors = [paddle.to_tensor(a) for a in (x, weight, bias)]
    for tensor in tensors:
        tensor.stop_gradient = False
    y = large_kernel_depthwise_conv2d(*tensors, impl=impl)
    return [t.numpy() for t in (y, *paddle.grad(y, tensors, paddle.to_tensor(dy)))]


def check(shape, impls, seed=0):
    x, weight, bias, dy = arrays(*shape, seed=seed)
    wanted = conv_and_gradients(x, weight, dy, bias)
    for impl in impls:
        got = ours(x, weight, bias, dy, impl)
        for name, a, b in zip(("y", "dx", "dweight", "dbias"), got, wanted):
            error = relative_error(a, b)
            assert error <= TOLERANCE.get(impl, 2e-5), f"{impl} {name} of {shape}: {error:.2e}"


@pytest.mark.parametrize("channels, side, kernel", STAGES)
def test_stages_of_31b_equal_float64(channels, side, kernel):
    check((1, channels, side, side, kernel), ["direct", "fft", "auto"])


@pytest.mark.parametrize("part", range(10))
def test_random_shapes_equal_float64(part):
    rng = np.random.default_rng(part)
    for i in range(50):
        while True:
            batch, channels = rng.integers(1, 4), rng.integers(1, 40)
            (height, width), kernel = rng.integers(1, 48, 2), 2 * rng.integers(1, 32) + 1
            if batch * channels * height * width * kernel**2 < 6e6:
                break
        check(tuple(map(int, (batch, channels, height, width, kernel))), ["direct", "fft"], seed=i)


def test_the_references_agree():
    """Paddle's in float64, and the plain sums of the self-test when the library is loaded."""
    x, weight, bias, dy = arrays(2, 3, 7, 10, 9)
    wanted = conv_and_gradients(x, weight, dy, bias)
    for a, b in zip(reference_passes(x, weight, bias, dy), wanted):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("impl", ["direct", "fft"])
@pytest.mark.parametrize("shape", [(2, 32, 20, 23, 31), (1, 40, 14, 14, 27), (3, 17, 7, 5, 13)])
def test_gradients_are_adjoint_to_the_convolution(shape, impl):
    """<conv(x), g> = <x, dgrad(g)> = <weight, wgrad(g)>."""
    x, weight, _, g = arrays(*shape)
    y, dx, dweight, _ = ours(x, weight, np.zeros(shape[1], "float32"), g, impl)
    products = [np.vdot(a.astype("float64"), b) for a, b in ((y, g), (x, dx), (weight, dweight))]
    scale = np.linalg.norm(y.astype("float64")) * np.linalg.norm(g.astype("float64"))
    assert np.ptp(products) <= 1e-5 * max(abs(p) for p in products) + 1e-9 * scale


@pytest.mark.parametrize("impl", ["direct", "fft"])
def test_gradients_are_finite_differences(impl):
    x, weight, bias, dy = arrays(1, 2, 4, 5, 7)
    _, *gradients = ours(x, weight, bias, dy, impl)

    def loss():
        y = large_kernel_depthwise_conv2d(*map(paddle.to_tensor, (x, weight, bias)), impl=impl)
        return float((y.numpy().astype("float64") * dy).sum())

    for values, gradient in zip((x, weight, bias), gradients):
        for index in np.ndindex(values.shape):
            before = values[index]
            values[index] = before + 0.5
            above = loss()
            values[index] = before - 0.5
            below = loss()
            values[index] = before
            # Linear in each value, so that the step may be large.
            assert abs((above - below) - gradient[index]) < 1e-3


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


class Net(nn.Layer):
    def __init__(self, bias=True):
        super().__init__()
        self.weight = self.create_parameter([6, 1, 9, 9])
        self.offset = self.create_parameter([6], is_bias=True) if bias else None

    def forward(self, x):
        return large_kernel_depthwise_conv2d(x * 1.0, self.weight, self.offset) * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("full_graph", [True, False])
def test_captured_program_computes_the_same(bias, full_graph):
    net, x = Net(bias), paddle.randn([2, 6, 9, 8])
    parameters = net.parameters()
    y = net(x)
    gradients = paddle.grad((y * y).sum(), parameters)
    captured = paddle.jit.to_static(net, full_graph=full_graph)
    z = captured(x)
    assert (z == y).all()
    for a, b in zip(paddle.grad((z * z).sum(), parameters), gradients):
        assert (a == b).all()


def test_saved_program_computes_the_same_when_loaded(tmp_path):
    net, x = Net(), paddle.randn([2, 6, 9, 8])
    spec = paddle.static.InputSpec([None, 6, None, None], "float32")
    paddle.jit.save(net, str(tmp_path / "net"), input_spec=[spec])
    assert (paddle.jit.load(str(tmp_path / "net"))(x) == net(x)).all()


def test_recomputed_layer_has_the_same_gradients():
    from paddle.distributed.fleet.utils import recompute

    net, x = Net(), paddle.randn([2, 6, 9, 8])
    x.stop_gradient = False
    wanted = paddle.grad(net(x).sum(), [x, *net.parameters()])
    recompute(net, x).sum().backward()
    for tensor, gradient in zip([x, *net.parameters()], wanted):
        assert (tensor.grad == gradient).all()


@pytest.mark.parametrize("impl", ["direct", "fft"])
def test_bits_do_not_depend_on_the_number_of_threads(impl, operators):
    shape = (2, 70, 15, 17, 13)
    x, weight, bias, dy = arrays(*shape)
    results = []
    for threads in range(1, 9):
        y, dx, dweight = np.empty_like(x), np.empty_like(x), np.empty_like(weight)
        px, pweight, pbias, pdy, py, pdx, pdweight = (
            a.ctypes.data for a in (x, weight, bias, dy, y, dx, dweight)
        )
        operators.forward(shape, px, pweight, pbias, py, algorithm=impl, threads=threads)
        operators.gradients(shape, px, pweight, pdy, pdx, pdweight, algorithm=impl, threads=threads)
        results.append(b"".join(a.tobytes() for a in (y, dx, dweight)))
    assert len(set(results)) == 1


def gradients_by_the_kernels(library, shape, x, weight, dy):
    dx, dweight = np.empty_like(x), np.empty_like(weight)
    library.gradients(shape, *(a.ctypes.data for a in (x, weight, dy, dx, dweight)))
    return [dx, dweight]


@paddle.no_grad()
def convolved(x, weight, bias):
    return large_kernel_depthwise_conv2d(*map(paddle.to_tensor, (x, weight, bias))).numpy()


def test_several_python_threads_compute_at_once(operators):
    """The kernels for the gradients: Paddle's own backward pass breaks when threads share it."""
    shape = (1, 40, 14, 14, 27)
    inputs = [arrays(*shape, seed=seed) for seed in range(4)]
    wrong = []

    def results(x, weight, bias, dy):
        both = gradients_by_the_kernels(operators, shape, x, weight, dy)
        return b"".join(a.tobytes() for a in (convolved(x, weight, bias), *both))

    wanted = [results(*values) for values in inputs]

    def work(index):
        for _ in range(20):
            if results(*inputs[index]) != wanted[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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


def test_no_images_give_no_images():
    x, weight = zeros(0, 4, 9, 9), zeros(4, 1, 3, 3)
    assert large_kernel_depthwise_conv2d(x, weight).shape == [0, 4, 9, 9]


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
