"""Epochs of the training loop over given batches, with a network of a few thousand parameters."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import paddle
from tiny import weights

from replknet_paddle.engine.precision import Precision
from replknet_paddle.engine.train import TrainState, train_epoch
from replknet_paddle.model import RepLKNet
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy

CLASSES = 4


def make_model(
    *, seed=0, drop_path_rate=0.0, large_kernel_sizes: Sequence[int] = (5, 5, 3, 3)
) -> RepLKNet:
    paddle.seed(seed)
    return RepLKNet(
        large_kernel_sizes=list(large_kernel_sizes),
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


def breaking(at, spoil):
    """A criterion of whose losses `spoil(loss, logits)` is taken in these calls, from 0."""
    criterion, calls = LabelSmoothingCrossEntropy(0.1), itertools.count()

    def loss_of(logits, labels):
        loss = criterion(logits, labels)
        return spoil(loss, logits) if next(calls) in at else loss

    return loss_of


STATE = {field.name for field in dataclasses.fields(TrainState)}


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
    parts = {name: options.pop(name) for name in STATE & options.keys()}
    return train_epoch(TrainState(model=model, optimizer=optimizer, **parts), loader, **options)


def train(model, loader, optimizer, **options):
    """All steps of an epoch."""
    return list(steps_of(model, loader, optimizer, **options))


def trainable_weights(model) -> dict[str, np.ndarray]:
    names = [name for name, p in model.named_parameters() if not p.stop_gradient]
    return {name: value for name, value in weights(model).items() if name in names}


def assert_close(left, right, tolerance=1e-6) -> None:
    """Equal within `tolerance` of the arrays' joint norm."""
    difference = np.sqrt(sum(((a - b).astype("float64") ** 2).sum() for a, b in zip(left, right)))
    norm = np.sqrt(sum((b.astype("float64") ** 2).sum() for b in right))
    assert difference <= tolerance * norm, difference / norm
