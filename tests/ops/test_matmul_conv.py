"""Matrix products: their rounding, bits and memory. test_depthwise_conv.py has values."""

import subprocess
import sys

import numpy as np
import paddle
import pytest
from double_precision import arrays, calls_of, conv_and_gradients, relative_error
from paddle.nn import functional as F

from replknet_paddle.ops import large_kernel_depthwise_conv2d, matmul_conv
from replknet_paddle.ops.matmul_plan import (
    GATHER,
    PAD,
    PASSES,
    REORDER,
    Axis,
    Plan,
    make_plan,
)

pytestmark = [pytest.mark.numbers, pytest.mark.paddle_version]

HALF = ("float16", "bfloat16")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weight_dtype", ["float32", "half"])
@pytest.mark.parametrize("shape", [(2, 3, 28, 28, 29), (3, 4, 14, 14, 27), (2, 2, 30, 41, 31)])
def test_half_precision_has_the_rounding_of_products_summed_in_float32(shape, weight_dtype, dtype):
    """On CPU values are rounded where a GPU rounds them: inputs, T, windows and products."""
    weight_dtype = dtype if weight_dtype == "half" else weight_dtype
    exact = [paddle.to_tensor(a).astype(dtype).astype("float32").numpy() for a in arrays(*shape)]
    x, weight, bias, dy = exact
    tensors = [
        paddle.to_tensor(a).astype(t)
        for a, t in zip((x, weight, bias), (dtype, weight_dtype, weight_dtype))
    ]
    for tensor in tensors:
        tensor.stop_gradient = False
    result = large_kernel_depthwise_conv2d(*tensors, impl="matmul")
    gradients = paddle.grad(result, tensors, paddle.to_tensor(dy).astype(dtype))
    assert [t.dtype for t in (result, *gradients)] == [t.dtype for t in (tensors[0], *tensors)]
    got = [t.astype("float32").numpy() for t in (result, *gradients)]
    unit = largest_rounding_error(dtype)
    y, dx, dweight, _ = conv_and_gradients(x, weight, dy, bias)
    # y: the product's rounding and the bias's. dweight: that of dT and of its first sum, many of
    # each in one value, and of the result where the weight is half. Of the largest value. Sums in
    # half precision would be many times as far off.
    bounds = (2 * unit, unit, unit if weight_dtype == "float32" else 2 * unit)
    for name, a, b, bound in zip(("y", "dx", "dweight"), got, (y, dx, dweight), bounds):
        assert relative_error(a, b) <= 1.02 * bound, name


def largest_rounding_error(dtype):
    """Relative; half a unit in the last place, or in some of Paddle's versions on CPU a whole."""
    values = np.random.default_rng(0).uniform(1, 2, 10000).astype("float32")
    rounded = paddle.to_tensor(values).astype(dtype).astype("float32").numpy()
    error = (np.abs(rounded - values) / values).max()
    assert error < {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    return error


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_weights_gradient_has_the_same_bits_each_time(dtype):
    x, _, _, dy = arrays(3, 16, 28, 28, 29)
    x, dy = (paddle.to_tensor(a).astype(dtype) for a in (x, dy))
    first, second = (matmul_conv.weight_gradient(x, dy, 29, 2**23).numpy() for _ in range(2))
    assert first.dtype == np.float32 and first.tobytes() == second.tobytes()


def test_the_gradients_of_inputs_that_need_none_are_not_computed(monkeypatch):
    calls = calls_of(monkeypatch, (matmul_conv, "convolve"), (matmul_conv, "weight_gradient"))
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


@pytest.fixture
def half_on_cpu(monkeypatch):
    """Paddle's moves of half-precision values, which its CPU lacks, by way of integers."""
    for owner, name in ((paddle, "index_select"), (F, "pad")):
        function = getattr(owner, name)

        def move(x, *arguments, function=function):
            if x.element_size() > 2:
                return function(x, *arguments)
            moved = function(x.view("int16").astype("int32"), *arguments)
            return moved.astype("int16").view(x.dtype)

        monkeypatch.setattr(owner, name, move)


@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shift", [0, 1, 3, 4])  # of the first value in its memory
@pytest.mark.parametrize("width, padding", [(56, (0, 4)), (14, (0, 2)), (12, (3, 1)), (7, (0, 1))])
def test_values_moved_in_words_are_the_same_bits(width, padding, shift, dtype):
    """Any bits, of values that are not finite and of words of such, too."""
    rng = np.random.default_rng(width + shift)
    bits = f"uint{32 if dtype == 'float32' else 16}"
    shape, (left, right) = (3, 5, 6, width), padding
    values = rng.integers(0, np.iinfo(bits).max, 3 * 5 * 6 * width, dtype=bits, endpoint=True)
    shifted = np.concatenate([np.zeros(shift, bits), values]).view(bits[1:])
    tensor = paddle.to_tensor(shifted).view(dtype)[shift:].reshape(shape)
    values = values.reshape(shape)
    assert tensor.data_ptr() % 64 == shift * values.itemsize % 64

    def assert_same(got, wanted):
        assert got.dtype == tensor.dtype and got.is_contiguous()
        assert np.array_equal(got.view(bits[1:]).numpy().view(bits), wanted)

    axis = Axis.of(6, 5, 2, spare=False)  # 3 windows of 6 rows
    rows = np.array([0, 1, 2, 3, 2, 3, 4, 5][: axis.count * axis.window])
    got = matmul_conv._select_rows(tensor, 2, lambda a: rows, axis)
    assert_same(got, values[:, :, rows])
    got = matmul_conv._select_rows(tensor[:, :, 1:5], 2, lambda a: rows % 4, axis)
    assert_same(got, values[:, :, 1 + rows % 4])
    assert_same(matmul_conv._reordered(tensor, [2, 0, 1, 3]), values.transpose(2, 0, 1, 3))
    assert_same(
        matmul_conv._channels_first(tensor, slice(1, 4)), values[:, 1:4].transpose(1, 0, 2, 3)
    )
    wanted = np.pad(values, [(0, 0), (0, 0), (2, 1), (left, right)])
    assert_same(matmul_conv._padded(tensor, left, right, 2, 1), wanted)


def test_memory_that_begins_within_a_word_is_not_taken_for_words():
    """A GPU cannot read such words. The tensor is NumPy's memory."""
    values = np.random.default_rng(0).standard_normal(2 * 3 * 8 * 8 + 1, "float32")
    x = paddle.utils.dlpack.from_dlpack(values[1:].reshape(2, 3, 8, 8))
    assert (x.offset, x.data_ptr() % 8) == (0, 4)
    assert matmul_conv._word_values(x) == 1 and matmul_conv._word_values(x.clone()) == 2


@pytest.mark.usefixtures("half_on_cpu")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seed", range(6))
def test_passes_in_words_of_four_values_are_those_of_single_values(seed, dtype, monkeypatch):
    """Half-precision tensors all the way, as on a GPU, whose products are summed in float32,
    beside those that the CPU computes in float32 and rounds in between."""
    rng = np.random.default_rng(seed)
    shapes = [(2, 4, 56, 56, 31), (3, 5, 14, 14, 27)] if seed == 0 else []
    for _ in range(8):
        batch, channels = rng.integers(1, 4), rng.integers(1, 6)
        (height, width), kernel = rng.integers(1, 60, 2), 2 * rng.integers(0, 16) + 1
        shapes.append(tuple(map(int, (batch, channels, height, width, kernel))))
    for shape in shapes:
        x, weight, _, dy = (paddle.to_tensor(a).astype(dtype) for a in arrays(*shape, seed=seed))
        memory = int(rng.choice([2**21, 2**29]))
        wanted = passes(x, weight, dy, memory)
        with monkeypatch.context() as patch:
            patch.setattr(matmul_conv, "is_on_cpu", lambda x: False)
            patch.setattr(paddle, "matmul", matmul_in_float32)
            for got, right in zip(passes(x, weight, dy, memory), wanted):
                assert got.dtype == right.dtype
                assert np.array_equal(got.numpy(), right.numpy()), shape


def passes(x, weight, dy, memory) -> list[paddle.Tensor]:
    """Output and gradients by x and weight."""
    return [
        matmul_conv.convolve(x, weight, memory),
        matmul_conv.convolve(dy, weight, memory, flipped=True),
        matmul_conv.weight_gradient(x, dy, weight.shape[-1], memory),
    ]


def matmul_in_float32(a, b, *, matmul=paddle.matmul, **options):
    """A half-precision product as a GPU has it."""
    return matmul(a.astype("float32"), b.astype("float32"), **options).astype(a.dtype)


@pytest.mark.parametrize("width, tile", [(56, 16), (24, 8), (20, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_windows_of_whole_words_are_cut_in_words(width, tile, dtype, monkeypatch):
    plan = Plan("convolution", 2, 3, 2, *(Axis.of(width, 9, tile, spare=False, multiple=4),) * 2, 3)
    x = paddle.randn([2, 3, width, width]).astype(dtype)
    seen, select = [], paddle.index_select
    monkeypatch.setattr(
        paddle, "index_select", lambda x, *rest: seen.append(x.dtype) or select(x, *rest)
    )
    windows = matmul_conv._cut(x, slice(0, 3), plan)
    assert seen == 2 * [paddle.int64]
    axis = plan.columns
    before, after = axis.padding
    padded = np.pad(x.astype("float32").numpy(), [(0, 0), (0, 0), (before, after), (before, after)])
    starts = [tile * i for i in range(axis.count)]
    wanted = np.stack(
        [
            padded[:, :, row : row + axis.window, column : column + axis.window]
            for column in starts
            for row in starts
        ]
    )  # (n, N, C, r, q)
    wanted = wanted.transpose(2, 1, 0, 3, 4).reshape(3, -1, axis.window**2)
    assert np.array_equal(windows.astype("float32").numpy(), wanted)


# A word of Paddle's kernels that move values about, by what is called; `test_the_cost_model_...`.
MOVES = {"index_select": GATHER, "pad": PAD, "contiguous": REORDER}


@pytest.fixture
def moved(monkeypatch, half_on_cpu):
    """Words that are moved, by the operation."""
    words = dict.fromkeys(MOVES, 0)

    def count(owner, name):
        function = getattr(owner, name)

        def counting(x, *arguments, **options):
            is_move = name != "contiguous" or not x.is_contiguous()
            result = function(x, *arguments, **options)
            words[name] += is_move * result.size
            return result

        monkeypatch.setattr(owner, name, counting)

    for owner, name in ((paddle, "index_select"), (F, "pad"), (paddle.Tensor, "contiguous")):
        count(owner, name)
    return words


@pytest.mark.parametrize(
    "shape", [(2, 4, 56, 56, 31), (8, 3, 28, 28, 29), (2, 3, 14, 14, 27), (2, 5, 7, 7, 13)]
    + [(1, 2, 64, 96, 31), (2, 2, 30, 41, 13), (1, 3, 128, 128, 29), (3, 2, 9, 50, 7)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cost_model_counts_the_words_that_are_moved(dtype, shape, moved, monkeypatch):
    x, weight, _, dy = (paddle.to_tensor(a).astype(dtype) for a in arrays(*shape))
    monkeypatch.setattr(matmul_conv, "is_on_cpu", lambda x: False)
    monkeypatch.setattr(paddle, "matmul", matmul_in_float32)
    for kind in PASSES:
        moved.update(dict.fromkeys(moved, 0))
        plan = make_plan(kind, shape, x.element_size(), 2**29)
        assert plan.chunk == plan.channels
        if kind == "convolution":
            matmul_conv.convolve(x, weight, 2**29)
        else:
            matmul_conv.weight_gradient(x, dy, shape[-1], 2**29)
        assert plan.instructions == sum(MOVES[name] * words for name, words in moved.items()), kind


def test_gradients_of_gradients_are_those_of_a_dense_convolution():
    """Whose weight has the kernels on its diagonal, since Paddle's depthwise one has none."""
    x, weight, _, _ = (paddle.to_tensor(a) for a in arrays(2, 3, 9, 8, 7))
    x.stop_gradient = weight.stop_gradient = False

    def dense(x, weight):
        return F.conv2d(x, weight * paddle.eye(3).reshape([3, 3, 1, 1]), padding=3)

    results = []
    for conv in (dense, lambda x, weight: large_kernel_depthwise_conv2d(x, weight, impl="matmul")):
        first = paddle.grad((conv(x, weight) ** 3).sum(), [x, weight], create_graph=True)
        second = paddle.grad(sum((g**2).sum() for g in first), [x, weight])
        results.append([g.numpy() for g in second])
    for got, wanted in zip(*results[::-1]):
        assert relative_error(got, wanted) < 1e-5


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
