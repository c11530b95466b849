"""The training loop: one epoch, an optimizer step at a time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from distributed import average_over_ranks, random_seed, rank, sum_over_ranks, world_size


class DivergedError(RuntimeError):
    """The loss is no number any more; going on would only waste time."""


@dataclass(frozen=True)
class Step:
    """What happened up to the end of one optimizer step.

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


def train_epoch(*, model: paddle.nn.Layer, loader: paddle.io.DataLoader, criterion: Callable,
                mixup: Callable | None, optimizer: paddle.optimizer.Optimizer,
                ema, learning_rate: Callable[[int], float], accum_iter: int, seed: int,
                epoch: int, first_batch: int, first_step: int, autocast: Callable,
                scaler: paddle.amp.GradScaler | None) -> Iterator[Step]:
    """Train through one epoch; yields after every optimizer step, when all is consistent.

    Args:
        model: images (N, 3, H, W) -> logits (N, classes).
        loader: batches of one size over `TrainBatches`.
        criterion: (logits, labels or mixed targets) -> mean loss.
        mixup: (images, labels, random generator) -> (images, targets), or None.
        ema: `ModelEma`, or None.
        learning_rate: of an optimizer step, counted from 0 over the whole run.
        accum_iter: forward passes per optimizer step; the epoch's last step may have fewer.
        epoch, first_batch, first_step: where to begin; `first_batch` follows a whole step.
        autocast: makes the context that the network runs in (mixed precision, or none).
        scaler: of the loss, with float16.

    Raises:
        DivergedError: on all processes alike, before the weights are touched.
    """
    model.train()
    loader.batch_sampler.set_epoch(epoch, first_batch)
    total = len(loader.batch_sampler)
    parameters = [p for p in model.parameters() if not p.stop_gradient]
    buffers = [b for b in model.state_dict().values() if b.stop_gradient]
    step = first_step
    losses, images_done, data_seconds = 0.0, 0, 0.0

    ready = time.perf_counter()
    for batch, (images, labels) in enumerate(loader, start=first_batch):
        data_seconds += time.perf_counter() - ready
        group = min(accum_iter, total - batch // accum_iter * accum_iter)
        # Everything random here depends on the place in the run, not on what came before it.
        batch_seed = random_seed(seed, epoch, batch, rank())
        paddle.seed(batch_seed)
        if mixup is not None:
            images, labels = mixup(images, labels, np.random.default_rng(batch_seed))

        with autocast():
            loss = criterion(model(images), labels)
        scaled = loss / group if scaler is None else scaler.scale(loss / group)
        scaled.backward()
        losses = losses + loss.detach().astype('float64') * images.shape[0]
        images_done += images.shape[0]

        if (batch + 1) % accum_iter == 0 or batch + 1 == total:
            loss_sum, count = sum_over_ranks(np.array([float(losses), images_done]))
            lr = learning_rate(step)
            if not np.isfinite(loss_sum):
                raise DivergedError(
                    f'epoch {epoch + 1}, step {step}: the loss is {loss_sum / count} at learning '
                    f'rate {lr:.3g}. A lower TRAIN.BASE_LR, more TRAIN.WARMUP_EPOCHS or '
                    'TRAIN.GRAD_CLIP may help; -resume goes on from the last checkpoint')
            average_over_ranks([p.grad for p in parameters if p.grad is not None])
            optimizer.set_lr(lr)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.clear_grad()
            if world_size() > 1:
                average_over_ranks(buffers)
            if ema is not None:
                ema.update(model)
            step += 1
            yield Step(batch + 1, loss_sum / count, int(count), lr, data_seconds)
            losses, images_done, data_seconds = 0.0, 0, 0.0
        ready = time.perf_counter()
