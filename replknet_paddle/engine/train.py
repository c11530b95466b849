"""The training loop: one epoch, an optimizer step at a time, and what must hold for it.

A step waits for the device once, when it reads the loss, the image count, what the ranks asked for
and, where the loss is scaled, whether the gradients overflowed. By then the next batch is on its
way to the device.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.checkpoints.run_folder import Checkpoint
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.precision import LossScaleError, Precision
from replknet_paddle.ops import cache_weights
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.gradients import Gradients
from replknet_paddle.optim.optimizer import frozen_layers, master_weights
from replknet_paddle.runtime.processes import (
    average_over_ranks,
    random_seed,
    rank,
    sum_on_device,
    sum_over_ranks,
    world_size,
)


class DivergedError(RuntimeError):
    """The loss or a weight is no longer finite; going on would only waste time."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The network and what trains it, for a whole run."""

    model: paddle.nn.Layer  # images (N, 3, H, W) -> logits (N, classes)
    criterion: Callable  # (logits, labels or mixed targets) -> mean loss
    optimizer: paddle.optimizer.Optimizer
    learning_rate: Callable[[int], float]  # of a step, counted from 0 over the whole run
    precision: Precision
    mixup: Callable | None = None  # (images, labels, random generator) -> (images, targets)
    ema: ModelEma | None = None
    average_statistics: bool = True  # over the ranks, where batch norm is not synchronized


@dataclass(frozen=True)
class Step:
    """What happened in one optimizer step."""

    batch: int  # forward passes done in this epoch, those before a restart included
    loss: float  # mean over the step's images on all processes, nats
    images: int  # how many those are
    lr: float
    data_seconds: float  # that this process waited for data
    requests: Sequence[float] = ()  # sums over all processes


class Prefetcher:
    """The batches of a loader, each fetched on demand while the device still computes.

    An error of the loader is raised by `take`, when it is the turn of that batch.
    """

    def __init__(self, loader: Loader):
        self.iterator = iter(loader)
        self.batch = self.error = None
        self.seconds = 0.0  # waited for data since the last step

    def fetch(self) -> None:
        """Get the next batch, if there is one."""
        start = time.perf_counter()
        try:
            self.batch = next(self.iterator, None)
        except Exception as error:
            self.error = error
        self.seconds += time.perf_counter() - start

    def take(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return the batch that was fetched last."""
        if self.error is not None:
            raise self.error
        batch, self.batch = self.batch, None
        return batch


def train_epoch(
    state: TrainState,
    loader: Loader,
    *,
    accum_iter: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    first_step: int = 0,
    requests: Callable[[], Sequence[float]] = tuple,
) -> Iterator[Step]:
    """Train through one epoch; yield after every optimizer step, when weights, EMA weights,
    statistics and optimizer state are the same on all processes.

    Args:
        loader: batches of one size over `TrainBatches`.
        accum_iter: forward passes per optimizer step; the epoch's last step may have fewer.
        epoch, first_batch, first_step: where to begin; `first_batch` follows a whole step.
        requests: numbers of this process that all processes shall learn the sum of, asked for in
            each step; they travel with the loss.

    DivergedError comes on all processes alike. A loss that is not finite has not touched weights.
    """
    model, precision = state.model, state.precision
    model.train()
    for layer in frozen_layers(model):  # `train` has set all layers
        layer.training = False
    loader.batch_sampler.set_epoch(epoch, first_batch)
    total = len(loader.batch_sampler)
    gradients = Gradients(model)
    statistics = []
    if state.average_statistics:
        norms = [x for x in model.sublayers() if x.training and hasattr(x, "_variance")]
        statistics = [tensor for norm in norms for tensor in (norm._mean, norm._variance)]
    step = first_step

    ahead = Prefetcher(loader)
    ahead.fetch()
    for first in range(first_batch, total, accum_iter):
        batches = range(first, min(first + accum_iter, total))
        loss_sum, images_done = 0.0, 0
        # What layers make of their weights serves all forward and backward passes of a step.
        with cache_weights(model) if len(batches) > 1 else contextlib.nullcontext():
            for batch in batches:
                images, labels = ahead.take()
                # Everything random here depends on the place in the run, not on what came before.
                batch_seed = random_seed(seed, epoch, batch, rank())
                paddle.seed(batch_seed)
                if state.mixup is not None:
                    images, labels = state.mixup(images, labels, np.random.default_rng(batch_seed))

                with precision.autocast():
                    loss = state.criterion(model(images), labels)
                precision.backward(loss / len(batches))
                gradients.collect()
                loss_sum = loss_sum + loss.detach().astype("float64") * images.shape[0]
                images_done += images.shape[0]
                del loss  # and what is kept for its gradients, before the next forward pass
                ahead.fetch()

        totals = sum_on_device([loss_sum, images_done, *requests()])
        finite = gradients.finish(precision.loss_scale)
        average_over_ranks(statistics)
        if finite is not None:
            totals = paddle.concat([finite.astype("float64").reshape([1]), totals])
        # The one place where a step waits for the device. All processes learn of a loss that is
        # not finite here, before it does harm.
        values = totals.numpy().tolist()
        gradients_finite = bool(values.pop(0)) if finite is not None else True
        all_loss, all_images, *requested = values
        lr = state.learning_rate(step)
        here = (
            f"epoch {epoch + 1}, step {step}, loss {all_loss / all_images:g}, "
            f"learning rate {lr:.3g}"
        )
        if not np.isfinite(all_loss):
            raise DivergedError(f"{here}: the loss is no longer finite. {ADVICE}")
        state.optimizer.set_lr(lr)
        try:
            precision.step(state.optimizer, finite=gradients_finite)
        except LossScaleError as error:
            raise DivergedError(f"{here}: {error}. {ADVICE}") from None
        state.optimizer.clear_grad(set_to_zero=False)
        if state.ema is not None:
            masters = master_weights(state.optimizer, model) if precision.half_weights else None
            state.ema.update(model, masters)
        step += 1
        mean_loss, image_count = all_loss / all_images, int(all_images)
        yield Step(batches.stop, mean_loss, image_count, lr, ahead.seconds, requested)
        ahead.seconds = 0.0


def check_is_finite(checkpoint: Checkpoint) -> None:
    """Raise DivergedError for weights that are not finite, which no later step can mend."""
    weights = [*checkpoint.model.items(), *checkpoint.model_ema.items()]
    wrong = [name for name, value in weights if not np.isfinite(value).all()]
    if wrong:
        progress = checkpoint.progress
        raise DivergedError(
            f"epoch {progress.epoch + 1}, step {progress.step}: {len(wrong)} of {len(weights)} "
            f"weights are no longer finite, such as {wrong[0]}; they are not saved. {ADVICE}"
        )


@paddle.no_grad()
def is_synchronized(make_layer: Callable[[int], nn.Layer] = nn.SyncBatchNorm) -> bool:
    """Return, on all ranks alike, whether batch norm's statistics are those of all ranks.

    Paddle 3's `SyncBatchNorm` skips its reduction without an error where its communicator is not
    set up. Every rank must call this; their inputs differ.
    """
    layer = make_layer(1)
    layer.train()
    layer(paddle.full([2, 1, 4, 4], float(rank())))
    mean = (1 - layer._momentum) * (world_size() - 1) / 2  # of 0, 1, 2, ..., from a mean of 0
    is_local = not np.isclose(layer._mean.numpy()[0], mean, rtol=1e-3)
    return not sum_over_ranks([is_local]).any()


ADVICE = (
    "A lower TRAIN.BASE_LR, more TRAIN.WARMUP_EPOCHS, TRAIN.GRAD_CLIP or AMP_DTYPE bfloat16 "
    "may help; -resume continues from a checkpoint"
)
