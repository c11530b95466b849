"""What the training loop costs beside the network: it, and nothing but it, on the same batches."""

import numpy as np
import paddle

from analysis.timing import time_in_turn
from datasets import TrainBatches
from engine.precision import Precision
from engine.train import train_epoch
from losses import LabelSmoothingCrossEntropy
from ops import use_fast_depthwise_conv, use_fast_pointwise_conv
from optim.optimizer import build_optimizer
from replknet import build_replknet


class Batches(list):
    """Ready batches in the shape of a loader."""

    def __init__(self, batches: list):
        super().__init__(batches)
        size = batches[0][0].shape[0]
        self.batch_sampler = TrainBatches(len(batches) * size, size, rank=0, world_size=1, seed=0)


def time_train_loop(config, *, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of `train_epoch` and of a bare forward, backward, step, in turn.

    Args:
        config: the network, batch size and optimizer; mixing and the average of weights stay out
            of both sides.
        steps: of one timed run.
        rounds: timed runs of each side.

    Returns:
        Seconds per step under 'loop' and 'bare'.
    """
    rng = np.random.default_rng(config.SEED)
    shape = (config.DATA.BATCH_SIZE, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE)
    loader = Batches(
        [
            (
                paddle.to_tensor(rng.normal(size=shape).astype("float32")),
                paddle.to_tensor(rng.integers(0, config.MODEL.NUM_CLASSES, shape[0])),
            )
            for _ in range(steps)
        ]
    )
    criterion = LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)

    def parts():
        paddle.seed(config.SEED)
        model = build_replknet(config)
        use_fast_depthwise_conv(model, config.MODEL.CONV_IMPL)
        use_fast_pointwise_conv(model, config.MODEL.CONV_IMPL)
        model.train()
        return model, build_optimizer(config, model, lr=1e-4)

    loop_model, loop_optimizer = parts()
    bare_model, bare_optimizer = parts()

    def loop():
        for _ in train_epoch(
            model=loop_model,
            loader=loader,
            mixup=None,
            criterion=criterion,
            precision=Precision(),
            optimizer=loop_optimizer,
            learning_rate=lambda step: 1e-4,
            ema=None,
            accum_iter=1,
            seed=0,
            epoch=0,
            first_batch=0,
            first_step=0,
        ):
            pass

    def bare():
        for images, labels in loader:
            loss = criterion(bare_model(images), labels)
            loss.backward()
            bare_optimizer.step()
            bare_optimizer.clear_grad()
        float(loss)

    seconds = time_in_turn({"loop": loop, "bare": bare}, rounds=rounds)
    return {name: [s / steps for s in values] for name, values in seconds.items()}
