"""What a CPU can show of mixed precision: the loss scale, its state, and the types of layers."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from epochs import (
    Batches,
    Recorder,
    assert_close,
    breaking,
    freeze_batch_norm,
    make_batches,
    make_model,
    sgd,
    steps_of,
    train,
    trainable_weights,
)
from harness import finish_ranks
from paddle.base import core
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional
from tiny import assert_identical, flags, weights

from replknet_paddle.config import get_config, update_config
from replknet_paddle.engine import run
from replknet_paddle.engine.precision import LOSS_SCALE_FLOOR, Precision
from replknet_paddle.engine.train import DivergedError, is_synchronized
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import (
    large_kernel_depthwise_conv2d_reference,
    use_fast_depthwise_conv,
)
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version


def overflowing(at):
    """A criterion whose gradients, though not its loss, overflow in these calls."""
    # What is added is 0, of infinite slope.
    return breaking(at, lambda loss, x: loss + paddle.sqrt(x.sum() - x.detach().sum()))


def scaled(scale=2.0**16) -> Precision:
    """As with float16 on a GPU, but for the type that is computed in."""
    precision = Precision()
    precision.loss_scale = scale
    return precision


def test_a_loss_scale_below_its_floor_stops_with_the_place_and_the_scale():
    model = make_model()
    options = dict(precision=scaled(LOSS_SCALE_FLOOR * 4), first_step=9)
    overflow = overflowing(range(6))
    steps = steps_of(model, make_batches([2] * 6), sgd(model), criterion=overflow, **options)
    before = trainable_weights(model)
    done = [next(steps), next(steps)]  # 2 and 1: at the floor, not below it
    assert len(done) == 2
    with pytest.raises(DivergedError, match="epoch 1, step 11, loss .*loss scale fell to 0.5"):
        next(steps)
    assert_identical(trainable_weights(model), before)


def test_a_step_whose_gradients_overflow_is_left_out_and_halves_the_scale():
    model, other = make_model(), make_model()
    for each in (model, other):
        freeze_batch_norm(each)
    precision, optimizer = scaled(), sgd(model)
    options = dict(criterion=overflowing([1, 3]), precision=precision)
    seen = []
    for _ in steps_of(model, make_batches([2] * 5), optimizer, **options):
        seen.append((precision.loss_scale, precision.good_steps))
    assert seen == [(2.0**16, 1), (2.0**15, 0), (2.0**15, 1), (2.0**14, 0), (2.0**14, 1)]
    assert len(optimizer.gradients) == 3
    # The same as never having met those batches, but for the rates, which follow the step.
    batches = make_batches([2] * 5).batches
    wanted = sgd(other)
    train(other, Batches(batches[::2]), wanted, learning_rate=lambda i: 0.1 / (2 * i + 1))
    for got, want in zip(optimizer.gradients, wanted.gradients):
        assert_close(got, want)
    assert_close(list(weights(model).values()), list(weights(other).values()))


def after_steps(precision, *are_finite):
    """The scale after each of some steps."""
    optimizer = SimpleNamespace(step=lambda: None)
    scales = []
    for finite in are_finite:
        precision.step(optimizer, finite=finite)
        scales.append(precision.loss_scale)
    return scales


def test_the_loss_scale_doubles_after_many_good_steps(monkeypatch):
    monkeypatch.setattr("replknet_paddle.engine.precision.STEPS_UNTIL_DOUBLED", 3)
    scales = after_steps(scaled(8.0), True, True, False, True, True, True, True)
    assert scales == [8, 8, 4, 4, 4, 8, 8]


def test_the_loss_scale_goes_on_from_its_state():
    precision, resumed = scaled(), scaled()
    after_steps(precision, False, True)
    state = precision.state()
    assert state == {"scale": 2.0**15, "incr_count": 1}
    resumed.load_state(state)
    assert after_steps(precision, True, False, True) == after_steps(resumed, True, False, True)
    assert resumed.state() == precision.state() == {"scale": 2.0**14, "incr_count": 1}
    resumed.load_state({})  # of a run without a scale
    assert resumed.state() == precision.state()
    # As Paddle's own scaler was saved by earlier versions.
    resumed.load_state({"scale": 4.0, "incr_count": 7, "decr_count": 0, "incr_ratio": 2.0})
    assert resumed.state() == {"scale": 4.0, "incr_count": 7}
    assert Precision().state() == {}


def test_loss_scale_leaves_the_loss_and_the_gradients_alone():
    plain, other = make_model(), make_model()
    recorders = Recorder(plain), Recorder(other)
    (step,) = train(plain, make_batches([4]), recorders[0])
    (step_scaled,) = train(other, make_batches([4]), recorders[1], precision=scaled(2.0**30))
    assert step.loss == step_scaled.loss
    assert_close(recorders[1].gradients[0], recorders[0].gradients[0])


# ---- over ranks


def ranks_with_one_that_breaks(arguments: list[str]) -> int:
    """Five steps on each rank; on rank 1 gradients overflow in two of them, or a loss breaks."""
    what, output = arguments
    processes.init()
    model = make_model()
    precision, optimizer = scaled(), sgd(model)
    criterion = LabelSmoothingCrossEntropy(0.1)
    if what == "overflow" and processes.rank() == 1:
        criterion = overflowing([1, 3])
    if what == "loss" and processes.rank() == 1:
        criterion = breaking([3], lambda loss, _: loss * float("nan"))
    scales, message = [], ""
    ema = ModelEma(model, decay=0.5)
    batches = make_batches([2] * 5, seed=processes.rank())
    options = dict(criterion=criterion, precision=precision, ema=ema)
    try:
        for _ in steps_of(model, batches, optimizer, **options):
            scales.append(precision.loss_scale)
            kept = trainable_weights(model)
    except DivergedError as error:
        message = str(error)
    now = trainable_weights(model)
    np.savez(
        f"{output}.{processes.rank()}.npz",
        **weights(model),
        scales=scales,
        message=message,
        optimizer_steps=len(optimizer.gradients),
        untouched=all(np.array_equal(now[name], kept[name]) for name in now),
        **{f"ema/{name}": value for name, value in ema.state().items()},
    )
    return 0


@pytest.mark.parametrize(
    "what, scales, optimizer_steps",
    [
        ("overflow", [2.0**16, 2.0**15, 2.0**15, 2.0**14, 2.0**14], 3),
        ("loss", [2.0**16] * 3, 3),
    ],
)
def test_all_ranks_decide_alike_where_one_breaks(tmp_path, what, scales, optimizer_steps):
    finish_ranks([what, tmp_path / "out"], target=ranks_with_one_that_breaks)
    first, second = (dict(np.load(tmp_path / f"out.{rank}.npz")) for rank in range(2))
    assert first.keys() == second.keys()
    different = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    statistics = {name for name in different if name.endswith(("_mean", "_variance"))}
    assert not set(different) - statistics
    assert first["scales"].tolist() == scales
    assert first["optimizer_steps"] == optimizer_steps
    assert ("step 3" in str(first["message"])) == (what == "loss")
    if what == "loss":
        assert first["untouched"]
    else:
        assert not statistics


# ---- types of layers


@pytest.fixture
def on_gpu(monkeypatch):
    """Paddle's preparation for AMP, which does nothing on a CPU, believes that this is a GPU."""
    auto_cast = sys.modules["paddle.amp.auto_cast"]
    place = SimpleNamespace(
        is_gpu_place=lambda: True, is_xpu_place=lambda: False, is_custom_place=lambda: False
    )
    monkeypatch.setattr(
        auto_cast, "_dygraph_tracer", lambda: SimpleNamespace(_expected_place=place)
    )
    monkeypatch.setattr(auto_cast, "_is_gpu_float16_supported", lambda: True)
    monkeypatch.setattr(auto_cast, "_is_gpu_bfloat16_supported", lambda: True)
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: (8, 0))


def small_network():
    """All kinds of layers of RepLKNet; of depthwise ones 4 with large kernels, 4 with 5x5 ones
    beside them, and the 5 of the stem and the transitions, of which 4 have a stride of 2."""
    return RepLKNet(
        large_kernel_sizes=[13, 11, 9, 7], layers=[1] * 4, channels=[4] * 4, num_classes=3
    )


def depthwise_layers(model):
    layers = [x for x in model.sublayers() if isinstance(x, paddle.nn.Conv2D) and x._groups > 1]
    assert len(layers) == 13
    return layers


@pytest.mark.parametrize("impl", ["auto", "paddle", "matmul"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("trained", [False, True])
def test_types_of_all_layers(on_gpu, level, dtype, trained, impl):
    """Batch norm keeps float32, for its sums over a batch need it, and so do all depthwise
    convolutions, which Paddle's own kernels would sum in half precision."""
    model = small_network()
    use_fast_depthwise_conv(model, impl)
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
    precision = Precision(enabled=True, level=level, dtype=dtype)
    precision.prepare(model, optimizer if trained else None)
    depthwise = {id(layer) for layer in depthwise_layers(model)}
    half = getattr(paddle, dtype) if level == "O2" else paddle.float32
    for name, layer in model.named_sublayers(include_self=True):
        is_full = isinstance(layer, paddle.nn.BatchNorm2D) or id(layer) in depthwise
        own = dict(layer.named_parameters(include_sublayers=False))
        assert {p.dtype for p in own.values()} <= {paddle.float32 if is_full else half}, name
    assert optimizer._multi_precision == (level == "O2" and trained)
    assert (precision.loss_scale is None) == (dtype == "bfloat16")
    assert precision.half_weights == (level == "O2")


@pytest.mark.parametrize("impl", ["paddle", "matmul"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_depthwise_layers_sum_in_float32_and_give_the_type_that_they_get(
    on_gpu, level, dtype, impl, monkeypatch
):
    """Each layer with half-precision maps: types at Paddle's own convolution, and gradients."""
    model = small_network()
    use_fast_depthwise_conv(model, impl)
    Precision(enabled=True, level=level, dtype=dtype).prepare(model)
    monkeypatch.undo()  # from here on this is a CPU
    conv2d, seen = functional.conv2d, []

    def spied(x, weight, bias, **options):
        seen.append({x.dtype, weight.dtype})
        return conv2d(x, weight, bias, **options)

    monkeypatch.setattr(functional, "conv2d", spied)
    for layer in depthwise_layers(model):
        x = paddle.randn([4, layer._in_channels, 15, 14]).astype(dtype)
        x.stop_gradient = False
        y = layer(x)
        assert y.dtype == x.dtype
        dy = paddle.randn(y.shape).astype(dtype)
        dx, dweight = paddle.grad(y, [x, layer.weight], dy)
        assert (dx.dtype, dweight.dtype) == (x.dtype, paddle.float32)
        exact = [t.astype("float64").detach() for t in (x, layer.weight)]
        for tensor in exact:
            tensor.stop_gradient = False
        options = dict(stride=layer._stride, padding=layer._padding, groups=layer._groups)
        wanted = paddle.grad(conv2d(*exact, **options), exact, dy.astype("float64"))
        kernel, is_small = layer._kernel_size[0], layer._kernel_size[0] <= 5
        # Products round T's gradient; Paddle's own is float32.
        for got, right, bound in zip((dx, dweight), wanted, (0.01, 1e-6 if is_small else 0.01)):
            error = (got.astype("float64") - right).abs().max() / right.abs().max()
            assert float(error) < bound, kernel
    assert seen == [{paddle.float32}] * (13 if impl == "paddle" else 9)


def test_the_tape_keeps_no_float32_copy_of_half_precision_maps():
    x, weight = paddle.randn([8, 16, 40, 40]).astype("bfloat16"), paddle.randn([16, 1, 5, 5])
    x.stop_gradient = weight.stop_gradient = False
    held = core.host_memory_stat_current_value("Allocated", 0)
    y = large_kernel_depthwise_conv2d_reference(x, weight)
    held = core.host_memory_stat_current_value("Allocated", 0) - held
    assert y.dtype == x.dtype and held == 2 * y.size


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_paddles_own_in_float32_is_recomputed_in_both_ways(use_reentrant):
    """The second has hooks for what the tape keeps, of which there may be one pair at a time."""
    x, weight = paddle.randn([2, 4, 12, 12]).astype("bfloat16"), paddle.randn([4, 1, 5, 5])
    x.stop_gradient = weight.stop_gradient = False

    def squared(x):
        return large_kernel_depthwise_conv2d_reference(x, weight).astype("float32") ** 2

    wanted = paddle.grad(squared(x).sum(), [x, weight])
    recompute(squared, x, use_reentrant=use_reentrant).sum().backward()
    for got, gradient in zip((x.grad, weight.grad), wanted):
        assert got.dtype == gradient.dtype and (got == gradient).all()


def test_bfloat16_on_a_gpu_without_it_is_refused(on_gpu, monkeypatch):
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(InputError, match="AMP_DTYPE is bfloat16.*float16"):
        Precision(enabled=True, dtype="bfloat16")
    assert Precision(enabled=True, dtype="float16").loss_scale == 2.0**16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_paddles_own_convolution_gets_float32_outside_of_autocast(dtype, monkeypatch):
    seen, contexts = [], []
    conv2d, auto_cast = functional.conv2d, paddle.amp.auto_cast

    def spied(x, weight, bias, **options):
        seen.extend(t.dtype for t in (x, weight, bias))
        return conv2d(x, weight, bias, **options)

    monkeypatch.setattr(functional, "conv2d", spied)
    monkeypatch.setattr(
        paddle.amp, "auto_cast", lambda **options: contexts.append(options) or auto_cast(**options)
    )
    x = paddle.randn([1, 2, 8, 8]).astype(dtype)
    y = large_kernel_depthwise_conv2d_reference(x, paddle.randn([2, 1, 7, 7]), paddle.ones([2]))
    # Paddle's GradScaler asks for the type of the last context.
    assert seen == 3 * [paddle.float32] and contexts == [{"enable": False, "dtype": dtype}]
    assert y.dtype == x.dtype


# ---- synchronized batch norm


class Averaging(paddle.nn.BatchNorm2D):
    """Synchronized as far as its running mean goes."""

    def forward(self, x):
        return super().forward(paddle.full_like(x, (processes.world_size() - 1) / 2))


def check_layers(arguments: list[str]) -> int:
    """On each rank: what is found of a layer that averages, and of one that does not, and what a
    run makes of it."""
    processes.init()
    found = [is_synchronized(layer) for layer in (Averaging, paddle.nn.BatchNorm2D)]
    processes.on_gpu = lambda: True
    for wanted in (False, True, "auto"):
        config = update_config(get_config(), flags(opts=["MODEL.SYNC_BN", wanted]))
        for layer in (Averaging, paddle.nn.BatchNorm2D):
            run.is_synchronized = partial(is_synchronized, layer)
            try:
                found.append(run.synchronizes_batch_norm(config))
            except InputError as error:
                found.append(str(error))
    processes.on_gpu = lambda: False
    found.append(run.synchronizes_batch_norm(config))
    print("found", json.dumps(found))
    return 0


@pytest.mark.parametrize("ranks", [2, 3])  # of three, one has the mean of all
def test_batch_norm_that_stays_local_is_found_on_every_rank(tmp_path, ranks):
    for said in finish_ranks([], ranks=ranks, target=check_layers):
        found = json.loads(said.partition("found ")[2].splitlines()[0])
        error = found.pop(5)
        assert found == [True, False, False, False, True, True, False, False]
        assert error.startswith("MODEL.SYNC_BN is True: Paddle") and "each GPU by itself" in error
        assert error.endswith("allowed here: auto or False")
        warnings = [line for line in said.splitlines() if "MODEL.SYNC_BN: " in line]
        assert len(warnings) == 2 and "each GPU by itself" in warnings[0]
        assert "it needs GPUs; each process normalizes by its own 64 images" in warnings[1]
