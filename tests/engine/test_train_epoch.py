"""The training loop itself: accumulation, what advances when, what stops it, what is drawn."""

import weakref

import numpy as np
import pytest
from epochs import (
    CLASSES,
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
from tiny import assert_identical, weights

from replknet_paddle.data.transforms.mixup import Mixup
from replknet_paddle.engine.train import DivergedError
from replknet_paddle.ops import cache, matmul_conv, use_fast_depthwise_conv
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

pytestmark = pytest.mark.paddle_version

# ---- accumulation


@pytest.mark.parametrize(
    "micro, accum_iter, whole",
    [
        ([2, 2, 2, 2], 2, [4, 4]),
        ([2, 2, 2, 2], 4, [8]),
        ([2, 2, 2, 2, 2], 2, [4, 4, 2]),  # the last group is incomplete
        ([2, 2, 2, 2, 2], 3, [6, 4]),
        ([4, 4], 8, [8]),  # all of the epoch is one incomplete group
    ],
)
def test_micro_batches_equal_one_batch_as_large(micro, accum_iter, whole):
    results = []
    for sizes, count in ((micro, accum_iter), (whole, 1)):
        model = make_model()
        freeze_batch_norm(model)
        optimizer = sgd(model)
        steps = train(model, make_batches(sizes), optimizer, accum_iter=count)
        results.append((steps, optimizer, weights(model)))
    (steps, optimizer, ended), (steps_whole, optimizer_whole, ended_whole) = results
    assert len(optimizer.gradients) == len(whole)
    for got, wanted in zip(optimizer.gradients, optimizer_whole.gradients):
        assert_close(got, wanted)
    assert_close(list(ended.values()), list(ended_whole.values()))
    assert optimizer.rates == optimizer_whole.rates
    for step, step_whole in zip(steps, steps_whole):
        assert step.loss == pytest.approx(step_whole.loss, rel=1e-6)
        assert (step.images, step.lr) == (step_whole.images, step_whole.lr)


def test_a_group_that_began_elsewhere_in_the_epoch_keeps_its_size():
    """Going on in mid-epoch, the groups are those of the whole epoch."""
    straight, resumed = make_model(), make_model()
    for model in (straight, resumed):
        freeze_batch_norm(model)
    first, second = sgd(straight), sgd(resumed)
    train(straight, make_batches([2] * 5), first, accum_iter=2)
    resumed.set_state_dict(straight.state_dict())
    weight = straight.head.weight.numpy()
    loader = make_batches([2] * 5)
    steps = train(resumed, loader, second, accum_iter=2, epoch=3, first_batch=4, first_step=11)
    assert loader.calls == [(3, 4)]
    assert [(step.batch, step.images) for step in steps] == [(5, 2)]
    assert second.rates == [0.1 / 12]
    assert len(second.gradients) == 1 and not np.array_equal(weight, resumed.head.weight.numpy())


def test_matrices_of_large_kernels_are_made_once_a_step(monkeypatch):
    """Two for each layer, forward and for the gradient by its input; with the same bits."""
    made, results = [], []
    make = matmul_conv._make_matrix
    monkeypatch.setattr(matmul_conv, "_make_matrix", lambda *a: made.append(1) or make(*a))
    for memory_bytes in (2**29, 1):  # what has no room is made each time
        made.clear()
        model = make_model(large_kernel_sizes=[9, 7, 7, 3])
        use_fast_depthwise_conv(model, "matmul", memory_bytes=2**29)
        monkeypatch.setattr(cache, "memory_of", lambda _, memory_bytes=memory_bytes: memory_bytes)
        optimizer = sgd(model)
        train(model, make_batches([2] * 5), optimizer, accum_iter=2)
        results.append((len(made), weights(model)))
    (kept, got), (anew, wanted) = results
    assert (kept, anew) == (3 * 2 * 3, 3 * 2 * 5)  # layers x directions x steps, or batches
    assert_identical(got, wanted)


@pytest.mark.parametrize("accum_iter", [1, 2])
def test_nothing_of_a_batch_is_kept_while_the_next_one_runs_forward(accum_iter):
    """What hooks have packed for the gradients lives as long as the loss."""
    model, losses, alive = make_model(), [], []
    criterion = LabelSmoothingCrossEntropy(0.1)

    def watched(logits, labels):
        alive.append([loss() for loss in losses if loss() is not None])
        loss = criterion(logits, labels)
        losses.append(weakref.ref(loss))
        return loss

    train(model, make_batches([2] * 4), sgd(model), criterion=watched, accum_iter=accum_iter)
    assert len(losses) == 4 and alive == [[]] * 4


def test_no_gradient_is_left_over_from_one_step_to_the_next():
    once, twice = make_model(), make_model()
    for model in (once, twice):
        freeze_batch_norm(model)
    batches = make_batches([3])
    recorder_once, recorder_twice = Recorder(once), Recorder(twice)
    train(once, batches, recorder_once)
    train(twice, Batches(batches.batches * 2), recorder_twice)
    assert len(recorder_twice.gradients) == 2
    for gradients in recorder_twice.gradients:
        assert_close(gradients, recorder_once.gradients[0], 1e-12)


# ---- what advances when


def test_average_and_schedule_advance_once_per_optimizer_step():
    model = make_model()
    asked, seen = [], []

    class Average:
        def update(self, updated, masters):
            assert updated is model and masters is None
            seen.append(model.head.weight.numpy().copy())

    def rate(step):
        asked.append(step)
        return 0.01 * step

    steps = []
    optimizer = sgd(model)
    for step in steps_of(
        model,
        make_batches([2] * 7),
        optimizer,
        criterion=LabelSmoothingCrossEntropy(0.0),
        learning_rate=rate,
        ema=Average(),
        accum_iter=3,
        epoch=2,
        first_step=20,
    ):
        steps.append(step)
        assert len(seen) == len(steps)  # at every yield all is of the same step
        np.testing.assert_array_equal(seen[-1], model.head.weight.numpy())
    assert asked == [20, 21, 22]
    assert optimizer.rates == [step.lr for step in steps] == [0.2, 0.21, 0.22]
    assert [(step.batch, step.images) for step in steps] == [(3, 6), (6, 6), (7, 2)]


# ---- what stops it


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("broken", [2, 3])  # either micro-batch of the second step
def test_a_loss_that_is_not_finite_stops_before_weights_change(value, broken):
    model = make_model()
    ema = ModelEma(model, decay=0.5)
    optimizer = sgd(model)
    steps = steps_of(
        model,
        make_batches([2] * 6),
        optimizer,
        criterion=breaking([broken], lambda loss, _: loss * value),
        learning_rate=lambda step: 0.1,
        ema=ema,
        accum_iter=2,
        epoch=6,
        first_step=41,
    )
    next(steps)
    after_first = trainable_weights(model)
    average = ema.state()["head.weight"].copy()
    with pytest.raises(DivergedError) as caught:
        next(steps)
    message = str(caught.value)
    assert "epoch 7, step 42, loss " in message, message
    assert f"loss {value:g}" in message, message
    assert "TRAIN.BASE_LR" in message and "-resume" in message
    assert_identical(trainable_weights(model), after_first)
    np.testing.assert_array_equal(ema.state()["head.weight"], average)
    assert len(optimizer.gradients) == 1


# ---- what is drawn: the same after a restart, as whole runs show, and otherwise not


def draws(*, seed=0, epoch=4):
    """Weights after an epoch with drop path, and what mixup made of each batch's labels."""
    model = make_model(drop_path_rate=0.5)
    mixup = Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        cutmix_minmax=None,
        prob=1.0,
        switch_prob=0.5,
        label_smoothing=0.1,
        num_classes=CLASSES,
    )
    seen = []

    def recorded(images, labels, rng):
        mixed, targets = mixup(images, labels, rng)
        seen.append(targets.numpy().tobytes())
        return mixed, targets

    options = dict(mixup=recorded, criterion=SoftTargetCrossEntropy(), seed=seed, epoch=epoch)
    train(model, make_batches([4] * 5), sgd(model), **options)
    return seen, weights(model)["head.weight"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 5}])
def test_another_seed_or_epoch_draws_anew(other):
    assert not np.array_equal(draws()[1], draws(**other)[1])


def test_batches_of_one_epoch_are_drawn_apart():
    seen, _ = draws()
    assert len(set(seen)) == len(seen) == 5
