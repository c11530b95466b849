"""The training loop: one epoch, an optimizer step at a time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.precision import LossScaleError, Precision
from replknet_paddle.optim.ema import ModelEma
from replknet_paddle.optim.optimizer import master_weights
from replknet_paddle.runtime.processes import (
    average_over_ranks,
    random_seed,
    rank,
    sum_over_ranks,
    world_size,
)


class DivergedError(RuntimeError):
    """The loss is no number any more; going on would only waste time."""


@dataclass(frozen=True)
class Step:
    """What happened in one optimizer step.

    Attributes:
        batch: forward passes done in this epoch, those before a restart included.
        loss: mean over the step's images on all processes, nats.
        images: how many those are.
        lr: learning rate that was used.
        data_seconds: time that this process waited for data.
    """

    batch: int
    loss: float
    images: int
    lr: float
    data_seconds: float


def train_epoch(
    *,
    model: paddle.nn.Layer,
    loader: Loader,
    mixup: Callable | None,
    criterion: Callable,
    precision: Precision,
    optimizer: paddle.optimizer.Optimizer,
    learning_rate: Callable[[int], float],
    ema: ModelEma | None,
    accum_iter: int,
    seed: int,
    epoch: int,
    first_batch: int,
    first_step: int,
) -> Iterator[Step]:
    """Train through one epoch; yields after every optimizer step, when all is consistent.

    After a step, weights, averages, statistics and optimizer state are the same on all processes.

    Args:
        model: images (N, 3, H, W) -> logits (N, classes).
        loader: batches of one size over `TrainBatches`.
        mixup: (images, labels, random generator) -> (images, targets), or None.
        criterion: (logits, labels or mixed targets) -> mean loss.
        learning_rate: of an optimizer step, counted from 0 over the whole run.
        accum_iter: forward passes per optimizer step; the epoch's last step may have fewer.
        epoch, first_batch, first_step: where to begin; `first_batch` follows a whole step.

    Raises:
        DivergedError: on all processes alike. A loss that is no number has not touched the
            weights.
    """
    model.train()
    loader.batch_sampler.set_epoch(epoch, first_batch)
    total = len(loader.batch_sampler)
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    statistics = [b for b in model.state_dict().values() if b.stop_gradient]
    step = first_step
    loss_sum, images_done, data_seconds = 0.0, 0, 0.0

    waiting_since = time.perf_counter()
    for batch, (images, labels) in enumerate(loader, start=first_batch):
        data_seconds += time.perf_counter() - waiting_since
        # Everything random here depends on the place in the run, not on what came before it.
        batch_seed = random_seed(seed, epoch, batch, rank())
        paddle.seed(batch_seed)
        if mixup is not None:
            images, labels = mixup(images, labels, np.random.default_rng(batch_seed))

        with precision.autocast():
            loss = criterion(model(images), labels)
        group_start = batch // accum_iter * accum_iter
        precision.backward(loss / min(accum_iter, total - group_start))
        loss_sum = loss_sum + loss.detach().astype("float64") * images.shape[0]
        images_done += images.shape[0]

        if (batch + 1) % accum_iter == 0 or batch + 1 == total:
            # All processes learn of a broken loss in the same place, before it does harm.
            all_loss, all_images = sum_over_ranks(np.array([float(loss_sum), images_done]))
            lr = learning_rate(step)
            here = (
                f"epoch {epoch + 1}, step {step}, loss {all_loss / all_images:g}, "
                f"learning rate {lr:.3g}"
            )
            if not np.isfinite(all_loss):
                raise DivergedError(f"{here}: the loss is no number any more. {ADVICE}")
            average_over_ranks([p.grad for p in parameters if p.grad is not None])
            optimizer.set_lr(lr)
            try:
                precision.step(optimizer)
            except LossScaleError as error:
                raise DivergedError(f"{here}: {error}. {ADVICE}") from None
            optimizer.clear_grad()
            if world_size() > 1:
                average_over_ranks(statistics)
            if ema is not None:
                ema.update(
                    model, master_weights(optimizer, model) if precision.half_weights else None
                )
            step += 1
            yield Step(batch + 1, all_loss / all_images, int(all_images), lr, data_seconds)
            loss_sum, images_done, data_seconds = 0.0, 0, 0.0
        waiting_since = time.perf_counter()


ADVICE = (
    "A lower TRAIN.BASE_LR, more TRAIN.WARMUP_EPOCHS, TRAIN.GRAD_CLIP or AMP_DTYPE bfloat16 "
    "may help; -resume goes on from a checkpoint"
)
