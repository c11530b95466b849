"""The training loop itself: accumulation, what advances when, what stops it, what is drawn."""

import dataclasses

import numpy as np
import paddle
import pytest

from replknet_paddle.data.transforms.mixup import Mixup
from replknet_paddle.engine.precision import LOSS_SCALE_FLOOR, LossScaler, Precision
from replknet_paddle.engine.train import DivergedError, Parts, train_epoch
from replknet_paddle.model import RepLKNet
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

CLASSES = 4


def make_model(*, seed=0, drop_path_rate=0.0) -> RepLKNet:
    paddle.seed(seed)
    return RepLKNet(
        large_kernel_sizes=[5, 5, 3, 3],
        layers=[1, 1, 1, 1],
        channels=[4, 4, 6, 6],
        small_kernel=3,
        num_classes=CLASSES,
        drop_path_rate=drop_path_rate,
    )


def freeze_batch_norm(model) -> None:
    """Batch norm by its running statistics, in training too; they are no longer 0 and 1."""
    rng = np.random.default_rng(5)
    norms = [layer for layer in model.sublayers() if isinstance(layer, paddle.nn.BatchNorm2D)]
    assert norms
    for norm in norms:
        norm._mean.set_value(rng.normal(0, 0.1, norm._mean.shape).astype("float32"))
        norm._variance.set_value(rng.uniform(0.5, 2, norm._variance.shape).astype("float32"))
    train = model.train

    def train_but_batch_norm():
        train()
        for norm in norms:
            norm.eval()

    model.train = train_but_batch_norm


class Batches:
    """A loader of given batches; `set_epoch` leaves out the first ones as a real one does."""

    def __init__(self, batches):
        self.batches = batches
        self.batch_sampler = self
        self.calls = []

    def set_epoch(self, epoch, first_batch):
        self.calls.append((epoch, first_batch))
        self.first = first_batch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches[self.first :]:
            yield paddle.to_tensor(images), paddle.to_tensor(labels)


def make_batches(sizes, seed=1) -> Batches:
    """Images and labels that are the same however they are cut into batches."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(sum(sizes), 3, 32, 32)).astype("float32")
    labels = rng.integers(0, CLASSES, sum(sizes))
    cuts = np.cumsum(sizes)[:-1]
    return Batches(list(zip(np.split(images, cuts), np.split(labels, cuts))))


class Recorder:
    """An optimizer that keeps every step's gradients, and steps by `optimizer`, if any."""

    def __init__(self, model, optimizer=None):
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self.optimizer = optimizer
        self.gradients = []
        self.rates = []

    def set_lr(self, rate):
        self.rates.append(rate)
        if self.optimizer is not None:
            self.optimizer.set_lr(rate)

    def step(self):
        self.gradients.append([p.grad.numpy().copy() for p in self.parameters])
        if self.optimizer is not None:
            self.optimizer.step()

    def clear_grad(self, set_to_zero):
        assert not set_to_zero  # filling each with zeros, and adding to them, would take time
        for parameter in self.parameters:
            parameter.clear_gradient(False)


def sgd(model) -> Recorder:
    return Recorder(model, paddle.optimizer.SGD(0.1, parameters=model.parameters()))


PARTS = {field.name for field in dataclasses.fields(Parts)}


def steps_of(model, loader, optimizer, **options):
    """The steps of an epoch; keyword arguments override what is simple."""
    simple = {
        "criterion": LabelSmoothingCrossEntropy(0.1),
        "precision": Precision(),
        "learning_rate": lambda step: 0.1 / (step + 1),
        "accum_iter": 1,
        "seed": 0,
        "epoch": 0,
    }
    options = {**simple, **options}
    parts = {name: options.pop(name) for name in PARTS & options.keys()}
    return train_epoch(Parts(model=model, optimizer=optimizer, **parts), loader, **options)


def train(model, loader, optimizer, **options):
    """All steps of an epoch."""
    return list(steps_of(model, loader, optimizer, **options))


def weights(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


def assert_identical(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def assert_close(left, right, tolerance=1e-6) -> None:
    """Equal within `tolerance` of the arrays' joint norm."""
    difference = np.sqrt(sum(((a - b).astype("float64") ** 2).sum() for a, b in zip(left, right)))
    norm = np.sqrt(sum((b.astype("float64") ** 2).sum() for b in right))
    assert difference <= tolerance * norm, difference / norm


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


def test_average_follows_its_closed_form_over_a_whole_epoch():
    model = make_model()
    ema = ModelEma(model, decay=0.5)
    wanted = model.head.weight.numpy().astype("float64")
    for _ in steps_of(
        model,
        make_batches([2] * 5),
        sgd(model),
        criterion=LabelSmoothingCrossEntropy(0.0),
        learning_rate=lambda step: 0.1,
        ema=ema,
        accum_iter=2,
    ):
        wanted = 0.5 * wanted + 0.5 * model.head.weight.numpy()
    np.testing.assert_allclose(ema.state()["head.weight"], wanted, rtol=1e-6)


def test_the_network_is_in_training_mode_even_after_an_evaluation():
    model = make_model()
    model.eval()
    before = weights(model)
    train(model, make_batches([4]), sgd(model))
    assert model.training
    assert not np.array_equal(before["norm._mean"], weights(model)["norm._mean"])


# ---- what stops it


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("broken", [2, 3])  # either micro-batch of the second step
def test_a_loss_that_is_not_finite_stops_before_weights_change(value, broken):
    model = make_model()
    ema = ModelEma(model, decay=0.5)
    optimizer = sgd(model)
    criterion = LabelSmoothingCrossEntropy(0.1)
    calls = []

    def breaking(logits, labels):
        calls.append(1)
        loss = criterion(logits, labels)
        return loss * value if len(calls) == broken + 1 else loss

    after_first = None
    steps = steps_of(
        model,
        make_batches([2] * 6),
        optimizer,
        criterion=breaking,
        learning_rate=lambda step: 0.1,
        ema=ema,
        accum_iter=2,
        epoch=6,
        first_step=41,
    )
    next(steps)
    trainable = [name for name, p in model.named_parameters() if not p.stop_gradient]
    after_first = weights(model)
    average = ema.state()["head.weight"].copy()
    with pytest.raises(DivergedError) as caught:
        next(steps)
    message = str(caught.value)
    assert "epoch 7, step 42, loss " in message, message
    assert f"loss {value:g}" in message, message
    assert "TRAIN.BASE_LR" in message and "-resume" in message
    now = weights(model)
    assert_identical({n: now[n] for n in trainable}, {n: after_first[n] for n in trainable})
    np.testing.assert_array_equal(ema.state()["head.weight"], average)
    assert len(optimizer.gradients) == 1


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


# ---- what is drawn


def draws(*, first_batch=0, first_step=0, start=None, disturb=False, seed=0, epoch=4):
    """Weights after part of an epoch with mixup and drop path, and the mixup's own draws."""
    model = make_model(drop_path_rate=0.5)
    if start is not None:
        model.set_state_dict({name: paddle.to_tensor(value) for name, value in start.items()})
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
        seen.append(targets.numpy().copy())
        return mixed, targets

    if disturb:
        paddle.seed(99)
        paddle.randn([1000])
        np.random.seed(7)
    states = []
    for _ in steps_of(
        model,
        make_batches([4] * 5),
        sgd(model),
        mixup=recorded,
        criterion=SoftTargetCrossEntropy(),
        learning_rate=lambda step: 0.05,
        accum_iter=2,
        seed=seed,
        epoch=epoch,
        first_batch=first_batch,
        first_step=first_step,
    ):
        states.append(weights(model))
        if disturb:
            paddle.randn([17])
    return seen, states


def test_draws_depend_on_the_place_in_the_run_alone():
    seen, states = draws()
    seen_disturbed, states_disturbed = draws(disturb=True)
    assert_identical(states[-1], states_disturbed[-1])
    assert all(np.array_equal(a, b) for a, b in zip(seen, seen_disturbed))

    seen_resumed, states_resumed = draws(first_batch=2, first_step=1, start=states[0], disturb=True)
    assert_identical(states[-1], states_resumed[-1])
    assert len(seen_resumed) == 3
    assert all(np.array_equal(a, b) for a, b in zip(seen[2:], seen_resumed))


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 5}])
def test_another_seed_or_epoch_draws_anew(other):
    _, states = draws()
    _, others = draws(**other)
    assert not np.array_equal(states[-1]["head.weight"], others[-1]["head.weight"])


def test_batches_of_one_epoch_are_drawn_apart():
    seen, _ = draws()
    assert len({targets.tobytes() for targets in seen}) == len(seen)
