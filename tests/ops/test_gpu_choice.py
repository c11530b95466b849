"""How `auto` chooses on GPU, with CPU tensors taken for those of a GPU and times given by hand."""

import functools
import json
import logging
import sys

import paddle
import pytest
from double_precision import arrays, calls_of, conv_and_gradients, relative_error
from harness import finish_ranks
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from replknet_paddle.ops import (
    FastDepthwiseConv2D,
    depthwise,
    gpu_choice,
    large_kernel_depthwise_conv2d,
    matmul_conv,
    use_fast_depthwise_conv,
)
from replknet_paddle.ops.gpu_choice import CHOICES, PADDLE, choose
from replknet_paddle.runtime import processes

pytestmark = pytest.mark.paddle_version

SHAPE = (2, 4, 12, 10)
# Seconds of Paddle's own and of products, forward and for the gradients.
FASTEST = {
    CHOICES[0]: (1, 2, 3, 4),
    CHOICES[1]: (1, 2, 9, 4),
    CHOICES[2]: (2, 1, 9, 4),
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """`auto` measures as on a GPU, afresh."""
    monkeypatch.setattr(depthwise, "is_on_cpu", lambda x: False)
    gpu_choice.start_run({})
    monkeypatch.setattr(matmul_conv, "_default_memory_bytes", lambda device: 2**29)


@pytest.fixture
def seconds(monkeypatch):
    """Sets what the next measurements take, in order; counts them."""
    left = []
    monkeypatch.setattr(gpu_choice, "_seconds", lambda call: left.pop(0))
    return left


def tensors(shape=SHAPE, kernel=9, dtype="float32"):
    x, weight, _, dy = (paddle.to_tensor(a).astype(dtype) for a in arrays(*shape, kernel))
    x.stop_gradient = weight.stop_gradient = False
    return x, weight, dy


@pytest.mark.parametrize("choice", CHOICES)
def test_each_pass_is_computed_by_what_was_faster(choice, seconds, monkeypatch):
    seconds += FASTEST[choice]
    x, weight, dy = tensors()
    y = large_kernel_depthwise_conv2d(x, weight)
    assert gpu_choice._trained == {"2x4x12x10, kernel 9, float32": choice} and not seconds
    used = calls_of(
        monkeypatch,
        (matmul_conv, "convolve"),
        (matmul_conv, "weight_gradient"),
        (matmul_conv, "large_kernel_depthwise_conv2d_reference"),
        (depthwise, "large_kernel_depthwise_conv2d_reference"),
    )
    y = large_kernel_depthwise_conv2d(x, weight)
    forward = {"paddle": "large_kernel_depthwise_conv2d_reference", "matmul": "convolve"}
    assert used == [forward[choice.forward]]
    used.clear()
    gradients = paddle.grad(y, [x, weight], dy)
    assert used == (["convolve", "weight_gradient"] if choice.gradients == "matmul" else [])
    wanted = conv_and_gradients(*(t.numpy() for t in (x, weight, dy)))
    for got, right in zip((y, *gradients), wanted):
        assert relative_error(got.numpy(), right) < 5e-6


@pytest.mark.parametrize(
    "times, choice",
    [
        # Times of two runs that differ by noise.
        ((1.00, 1.01, 2.00, 2.02), CHOICES[0]),
        ((1.01, 1.00, 2.02, 2.00), CHOICES[0]),
        ((1.00, 1.00, 3.00, 2.82), CHOICES[0]),  # less than 5 % of all
        ((1.00, 1.00, 3.00, 2.78), CHOICES[1]),
        ((1.00, 0.86, 9.00, 2.00), CHOICES[1]),
        ((1.00, 0.84, 9.00, 2.00), CHOICES[2]),
        ((1.00, 0.96, 3.00, 2.82), CHOICES[2]),  # together, though neither alone
        ((9.00, 1.00, 1.00, 2.00), CHOICES[2]),
        ((1.00, 9.00, 2.00, 1.00), CHOICES[1]),
        ((1.00, 2.00, 3.00, 3.50), CHOICES[0]),
    ],
)
def test_nothing_is_chosen_that_is_not_faster_by_a_margin(times, choice, seconds):
    seconds += times
    x, weight, _ = tensors()
    assert choose(x, weight, 2**29, training=True) == choice and not seconds


class Queue:
    """A GPU's events, with a queue that takes so many products to stay ahead of the host."""

    def __init__(self, monkeypatch, *, products_needed, milliseconds):
        self.done, self.needed, self.milliseconds = [], products_needed, list(milliseconds)
        self.waits = 0
        queue = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                queue.done.append("event")

            def query(self):  # of the first event, once the calls are queued
                products = queue.done[: queue.done.index("event")]
                return len(products) < queue.needed

            def synchronize(self):
                queue.waits += 1
                queue.queued, queue.done = queue.done, []

            def elapsed_time(self, end):
                return queue.milliseconds.pop(0)

        monkeypatch.setattr(paddle.device, "Event", Event)
        monkeypatch.setattr(paddle, "matmul", lambda *_: self.done.append("product"))


@pytest.mark.parametrize("needed", [1, 5, 1000])
def test_the_time_of_several_calls_behind_other_work_is_taken(needed, monkeypatch):
    queue = Queue(monkeypatch, products_needed=needed, milliseconds=[10, 70, 30])
    assert gpu_choice._seconds(lambda: queue.done.append("call")) == pytest.approx(0.006)
    products = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n >= min(needed, 128))
    assert queue.queued == ["product"] * products + ["event"] + ["call"] * 5 + ["event"]
    assert queue.waits == 3 + products.bit_length() - 1  # as many as were too short


@pytest.mark.parametrize("broken", ["convolve", "weight_gradient", "paddle_conv", "_seconds"])
def test_memory_that_runs_out_means_paddles_own(broken, monkeypatch, caplog):
    def run_out(*_, **__):
        raise MemoryError("pages of what Paddle says of it")

    monkeypatch.setattr(gpu_choice, broken, run_out)
    x, weight, dy = tensors()
    y = large_kernel_depthwise_conv2d(x, weight)
    y.backward(dy)
    assert list(gpu_choice._trained.values()) == [PADDLE]
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert warning == (
        "depthwise convolution 2x4x12x10, kernel 9, float32: memory ran out while matrix products "
        "were tried; using Paddle's own convolution"
    )


def test_a_deterministic_run_takes_products_and_times_nothing(seconds, monkeypatch, caplog):
    monkeypatch.setattr(processes, "_deterministic", True)
    x, weight, _ = tensors()
    assert choose(x, weight, 2**29, training=True) == CHOICES[2]
    assert choose(tensors((1, 4, 9, 9))[0], weight, 2**29, training=False) == CHOICES[2]
    assert choose(tensors((1, 4, 8, 9))[0], weight, 1000, training=True) == PADDLE
    function = gpu_choice.weight_gradient
    monkeypatch.setattr(gpu_choice, "weight_gradient", lambda *a, **k: 1.01 * function(*a, **k))
    assert choose(tensors((1, 4, 9, 8))[0], weight, 2**29, training=True) == PADDLE


def test_what_was_chosen_is_chosen_again(seconds):
    x, weight, _ = tensors()
    other = tensors((1, 4, 30, 20))[0]
    seconds += FASTEST[CHOICES[1]] + (2, 1)
    chosen = [choose(x, weight, 2**29, training=True)]
    chosen += [choose(other, weight.astype("bfloat16"), 2**29, training=False)]
    recorded = json.loads(json.dumps(gpu_choice.choices()))
    assert recorded == {
        "2x4x12x10, kernel 9, float32": "paddle matmul",
        "4 channels, kernel 9, float32": "matmul matmul",
    }
    unknown = {"1x4x30x20, kernel 9, float32": "cudnn cudnn"}
    gpu_choice.start_run({**recorded, **unknown})
    assert gpu_choice.choices() == recorded  # for the next checkpoint, whatever comes first
    # A resumed run may begin with an evaluation, of the shape of training, too.
    assert choose(x, weight, 2**29, training=False) == chosen[0]
    assert [choose(t, weight, 2**29, training=t is x) for t in (x, other)] == chosen
    assert not seconds and gpu_choice.choices() == recorded
    seconds += FASTEST[PADDLE]
    assert choose(other, weight, 2**29, training=True) == PADDLE  # that name is unknown here


@pytest.mark.parametrize("trouble", ["memory", "deviation"])
def test_what_was_chosen_is_dropped_where_it_is_impossible_now(trouble, seconds, monkeypatch):
    """With less memory allowed, or on a GPU whose products are wrong."""
    x, weight, _ = tensors()
    gpu_choice.start_run({"2x4x12x10, kernel 9, float32": "matmul matmul"})
    if trouble == "deviation":
        convolve = gpu_choice.convolve
        monkeypatch.setattr(gpu_choice, "convolve", lambda *a, **k: 2 * convolve(*a, **k))
    memory = 1000 if trouble == "memory" else 2**29
    assert choose(x, weight, memory, training=True) == PADDLE
    y = large_kernel_depthwise_conv2d(x, weight, memory_bytes=memory)
    assert y.shape == x.shape and not seconds


def test_a_run_knows_nothing_of_another_in_its_process(seconds, monkeypatch):
    x, weight, _ = tensors()
    seconds += FASTEST[PADDLE]
    assert choose(x, weight, 2**29, training=True) == PADDLE
    gpu_choice.start_run({})
    assert gpu_choice.choices() == {}
    monkeypatch.setattr(processes, "_deterministic", True)
    assert choose(x, weight, 2**29, training=True) == CHOICES[2] and not seconds


def conv_by(weight, impl, x):
    return large_kernel_depthwise_conv2d(x, weight, impl=impl)


def test_shapes_that_are_met_within_recomputation_are_measured_forward_alone(seconds):
    """Its hooks for what the tape keeps would run, and measure, again and again."""
    x, weight, dy = tensors()
    seconds += (2, 1)
    for use_reentrant, impl in ((False, "auto"), (False, "matmul"), (True, "auto")):
        x.clear_gradient()
        weight.clear_gradient()
        conv = functools.partial(conv_by, weight, impl)
        recompute(conv, x, use_reentrant=use_reentrant).backward(dy)
        assert list(gpu_choice._trained.values()) == [CHOICES[2]] and not seconds
        wanted = conv_and_gradients(*(t.numpy() for t in (x, weight, dy)))[1:]
        for got, right in zip((x.grad, weight.grad), wanted):
            assert relative_error(got.numpy(), right) < 5e-6


def test_large_activations_of_float16_are_no_deviation(seconds):
    """The sums of a weight's gradient stay finite where real ones would."""
    seconds += FASTEST[CHOICES[2]]
    x, weight, _ = tensors((64, 2, 14, 14), 13, "float16")
    large = (8 * x.detach().astype("float32")).astype("float16")
    assert choose(large, weight, 2**29, training=True) == CHOICES[2]
    gpu_choice.start_run({})
    seconds += FASTEST[CHOICES[2]]
    zeros = paddle.zeros(SHAPE)
    assert choose(zeros, tensors()[1], 2**29, training=True) == CHOICES[2]


def test_a_shape_and_type_is_measured_and_logged_once(seconds, caplog):
    caplog.set_level(logging.INFO)
    x, weight, _ = tensors()
    for _ in range(3):
        seconds += FASTEST[CHOICES[2]] if not gpu_choice._trained else ()
        choose(x, weight, 2**29, training=True)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "depthwise convolution 2x4x12x10, kernel 9, float32, forward: matrix products 1000.000 ms, "
        "Paddle's own 2000.000 ms",
        "depthwise convolution 2x4x12x10, kernel 9, float32, gradients: matrix products "
        "4000.000 ms, Paddle's own 9000.000 ms",
        "depthwise convolution 2x4x12x10, kernel 9, float32: forward by matrix products, gradients "
        "by matrix products",
    ]
    seconds += FASTEST[PADDLE]
    assert choose(tensors((3, 4, 12, 10))[0], weight, 2**29, training=True) == PADDLE
    seconds += FASTEST[CHOICES[1]]
    half, half_weight, _ = tensors(dtype="bfloat16")
    assert choose(half, half_weight, 2**29, training=True) == CHOICES[1]
    assert len(gpu_choice._trained) == 3 and not seconds


def test_evaluation_takes_the_choice_of_training_or_of_its_first_shape(seconds):
    x, weight, _ = tensors()
    other = tensors((1, 4, 30, 20))[0]
    seconds += (2, 1)
    assert choose(x, weight, 2**29, training=False).forward == "matmul"
    assert choose(other, weight, 2**29, training=False).forward == "matmul"
    seconds += FASTEST[PADDLE]
    assert choose(other, weight, 2**29, training=True) == PADDLE
    assert choose(other, weight, 2**29, training=False) == PADDLE
    assert choose(x, weight, 2**29, training=False).forward == "matmul"
    assert not seconds


@pytest.mark.parametrize("name, kind", [("convolve", "forward"), ("weight_gradient", "gradients")])
@pytest.mark.parametrize("factor, shown", [(1.01, "0.01"), (float("nan"), "nan")])
def test_products_that_deviate_are_not_used(name, kind, factor, shown, monkeypatch, caplog):
    function = getattr(gpu_choice, name)
    monkeypatch.setattr(gpu_choice, name, lambda *a, **k: factor * function(*a, **k))
    x, weight, _ = tensors()
    assert choose(x, weight, 2**29, training=True) == PADDLE
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "2x4x12x10, kernel 9, float32" in warning
    assert f"by {shown} of the largest value ({kind}; allowed: 2e-05)" in warning


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_half_precision_is_no_deviation(dtype, seconds):
    seconds += FASTEST[CHOICES[2]]
    x, weight, _ = tensors((2, 4, 28, 28), 27, dtype)
    assert choose(x, weight.astype("float32"), 2**29, training=True) == CHOICES[2]


def test_products_that_need_more_memory_are_not_used(caplog):
    x, weight, _ = tensors()
    assert choose(x, weight, 1000, training=True) == PADDLE
    assert "1000 bytes of memory allowed" in caplog.text and "using Paddle's own" in caplog.text


def test_measuring_leaves_the_hook_of_master_gradients_registered(seconds, monkeypatch):
    """paddle.grad runs, and so removes, what `decorate(master_grad=True)` has registered."""
    state = sys.modules["paddle.amp.auto_cast"].amp_global_state()
    monkeypatch.setattr(state, "use_master_grad", True)
    monkeypatch.setattr(state, "model_parameters", [])
    x, weight, dy = tensors()
    with paddle.amp.auto_cast(enable=False):
        assert state.already_register_final_backward_hook
        seconds += (1.0, 2.0, 3.0, 4.0)
        choose(x, weight, 2**29, training=True)
        assert state.already_register_final_backward_hook
    large_kernel_depthwise_conv2d(x, weight, impl="matmul").backward(dy)
    monkeypatch.setattr(state, "use_master_grad", False)
    (x * 1).sum().backward()
    assert not state.already_register_final_backward_hook


def test_layers_on_gpu(monkeypatch, seconds):
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    model = nn.Sequential(
        *(nn.Conv2D(4, 4, k, padding=k // 2, groups=4) for k in (3, 5, 7, 31)),
        nn.Conv2D(4, 4, 9, padding=4, groups=4, stride=2),
        nn.Conv2D(4, 8, 9, padding=4, groups=4),
        nn.Conv2D(8, 8, 9, padding=4, groups=2),
    )
    for impl, swapped in (("auto", 2), ("matmul", 2), ("paddle", 0)):
        assert use_fast_depthwise_conv(model, impl) == swapped
        # All that are depthwise are of the class that has float32 sums.
        assert [type(x) for x in model] == 6 * [FastDepthwiseConv2D] + [nn.Conv2D]
        assert [x.impl for x in model[:6]] == 2 * ["paddle"] + 2 * [impl] + 2 * ["paddle"]
    with pytest.raises(ValueError, match="needs the compiled operator: it computes on CPU alone"):
        use_fast_depthwise_conv(model, "fft")


def test_training_mode_without_gradients_is_measured_as_training(monkeypatch, seconds):
    """So that recomputation, whose first forward pass has no gradients, uses one choice."""
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    layer = nn.Conv2D(4, 4, 9, padding=4, groups=4)
    use_fast_depthwise_conv(layer)
    seconds += FASTEST[CHOICES[2]]
    with paddle.no_grad():
        layer(paddle.randn(SHAPE))
    assert list(gpu_choice._trained.values()) == [CHOICES[2]]


def choose_on_a_rank(arguments) -> int:
    """Prints the choice; rank 0 measures that products are faster, the other the opposite."""
    processes.init()
    is_first, trouble = processes.rank() == 0, arguments[0]
    left = [2, 1, 9, 4] if is_first else [1, 2, 3, 4]
    gpu_choice._seconds = lambda call: left.pop(0)
    if trouble != "none" and not is_first:
        convolve = gpu_choice.convolve

        def troubled(*arguments, **options):
            if trouble == "memory":
                raise MemoryError
            return 2 * convolve(*arguments, **options)

        gpu_choice.convolve = troubled
    x, weight, _ = tensors()
    print("chose", *choose(x, weight, 2**29, training=True))
    return 0


@pytest.mark.parametrize(
    "trouble, chosen",
    [("none", "matmul matmul"), ("deviation", "paddle paddle"), ("memory", "paddle paddle")],
)
def test_all_ranks_take_the_choice_of_rank_0_unless_products_fail_on_one(trouble, chosen, tmp_path):
    for output in finish_ranks([trouble], folder=tmp_path, target=choose_on_a_rank):
        assert f"chose {chosen}" in output
