"""What a CPU can show of mixed precision: the loss scale, its state, and the types of layers."""

import pytest
from epochs import (
    Batches,
    Recorder,
    assert_close,
    assert_identical,
    freeze_batch_norm,
    make_batches,
    make_model,
    sgd,
    steps_of,
    train,
    weights,
)

from replknet_paddle.engine.precision import LOSS_SCALE_FLOOR, LossScaler, Precision
from replknet_paddle.engine.train import DivergedError
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy


def overflowing(steps):
    """A criterion whose gradients, though not its loss, overflow in these calls."""
    criterion = LabelSmoothingCrossEntropy(0.1)
    calls = []

    def loss_of(logits, labels):
        if len(calls) in steps:
            logits.register_hook(lambda gradient: gradient * float("inf"))
        calls.append(1)
        return criterion(logits, labels)

    return loss_of


def scaled(scale=2.0**16) -> Precision:
    """As with float16 on a GPU, but for the type that is computed in."""
    precision = Precision()
    precision.scaler = LossScaler(scale)
    return precision


def test_a_loss_scale_below_its_floor_stops_with_the_place_and_the_scale():
    model = make_model()
    steps = steps_of(
        model,
        make_batches([2] * 6),
        sgd(model),
        criterion=overflowing(range(6)),
        precision=scaled(LOSS_SCALE_FLOOR * 4),
        first_step=9,
    )
    before = weights(model)
    done = [next(steps), next(steps)]  # 2 and 1: at the floor, not below it
    assert len(done) == 2
    with pytest.raises(DivergedError, match="epoch 1, step 11, loss .*loss scale fell to 0.5"):
        next(steps)
    trainable = [name for name, p in model.named_parameters() if not p.stop_gradient]
    now = weights(model)
    assert_identical({n: now[n] for n in trainable}, {n: before[n] for n in trainable})


def test_a_step_whose_gradients_overflow_is_left_out_and_halves_the_scale():
    model, other = make_model(), make_model()
    for each in (model, other):
        freeze_batch_norm(each)
    precision, optimizer = scaled(), sgd(model)
    seen = []
    for _ in steps_of(
        model,
        make_batches([2] * 5),
        optimizer,
        criterion=overflowing([1, 3]),
        precision=precision,
    ):
        seen.append((precision.scaler.scale, precision.scaler.good_steps))
    assert seen == [(2.0**16, 1), (2.0**15, 0), (2.0**15, 1), (2.0**14, 0), (2.0**14, 1)]
    assert len(optimizer.gradients) == 3
    # The same as never having met those batches, but for the rates, which follow the step.
    batches = make_batches([2] * 5).batches
    wanted = sgd(other)
    train(other, Batches(batches[::2]), wanted, learning_rate=lambda i: 0.1 / (2 * i + 1))
    for got, want in zip(optimizer.gradients, wanted.gradients):
        assert_close(got, want)
    assert_close(list(weights(model).values()), list(weights(other).values()))


def test_the_loss_scale_doubles_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(LossScaler, "STEPS_UNTIL_DOUBLED", 3)
    scaler = LossScaler(8.0)
    scales = []
    for finite in [True, True, False, True, True, True, True]:
        scaler.update(finite=finite)
        scales.append(scaler.scale)
    assert scales == [8, 8, 4, 4, 4, 8, 8]


def test_a_scaler_goes_on_from_its_state():
    precision, resumed = scaled(), scaled()
    precision.scaler.update(finite=False)
    precision.scaler.update(finite=True)
    state = precision.state()
    assert state == {"scale": 2.0**15, "incr_count": 1}
    resumed.load_state(state)
    for finite in (True, False, True):
        for each in (precision, resumed):
            each.scaler.update(finite=finite)
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
