"""What the training loop costs beside the network, and what the network's convolutions cost."""

import time
from functools import partial

import numpy as np
import paddle

from replknet_paddle.bench.conv import measured_library, seconds_by_layer
from replknet_paddle.bench.timing import (
    check_counts,
    describe_machine,
    median_ratio,
    summarize,
    time_in_turn,
)
from replknet_paddle.data.samplers import TrainBatches
from replknet_paddle.engine.precision import Precision
from replknet_paddle.engine.train import TrainState, train_epoch
from replknet_paddle.model import build_replknet
from replknet_paddle.ops import use_fast_depthwise_conv, use_fast_pointwise_conv
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
from replknet_paddle.optim.optimizer import build_optimizer


class Batches(list):
    """Ready batches in the shape of a loader."""

    def __init__(self, batches: list):
        super().__init__(batches)
        size = batches[0][0].shape[0]
        self.batch_sampler = TrainBatches(len(batches) * size, size, rank=0, world_size=1, seed=0)


def report_train_loop(config, *, steps: int, rounds: int) -> None:
    """Print what the training loop adds to forward, backward and optimizer step.

    Args:
        config, steps, rounds: as of `time_train_loop`.

    Raises:
        InputError: a number below 1.
    """
    check_counts(steps=steps, rounds=rounds)
    seconds = time_train_loop(config, steps=steps, rounds=rounds)
    print(describe_machine())
    print(f"{config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE}, {steps} steps a run")
    for name, values in seconds.items():
        print(f"{name}: {summarize(values)} per step")
    ratio = median_ratio(seconds["loop"], seconds["bare"])
    print(f"the loop takes {ratio:.4f} of the bare step's time")


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
        use_fast_depthwise_conv(
            model, config.MODEL.CONV_IMPL, memory_bytes=config.MODEL.CONV_MEMORY_MB * 2**20
        )
        use_fast_pointwise_conv(model, config.MODEL.CONV_IMPL)
        model.train()
        return model, build_optimizer(config, model, lr=1e-4)

    loop_model, loop_optimizer = parts()
    bare_model, bare_optimizer = parts()

    loop_state = TrainState(
        model=loop_model,
        criterion=criterion,
        optimizer=loop_optimizer,
        learning_rate=lambda step: 1e-4,
        precision=Precision(),
    )

    def loop():
        for _ in train_epoch(loop_state, loader, accum_iter=1, seed=0, epoch=0):
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


def report_network(config, *, forward_batch: int, step_batch: int, rounds: int) -> None:
    """Print how fast a network is with and without the compiled operators, and where time goes.

    Args:
        config, forward_batch, step_batch, rounds: as of `time_network`.

    Raises:
        InputError: a number below 1, or the operators are not there.
    """
    check_counts(forward_batch=forward_batch, step_batch=step_batch, rounds=rounds)
    library = measured_library()
    print(describe_machine())
    print(f"{library.isa}, {library.threads} thread(s) (LARGE_KERNEL_THREADS)")
    for what, seconds, parts in time_network(
        config, forward_batch=forward_batch, step_batch=step_batch, rounds=rounds
    ):
        for impl, values in seconds.items():
            ratio = median_ratio(seconds["Paddle's own"], values)
            print(f"{what}, {impl}: {summarize(values)}, Paddle's own/it {ratio:.2f}")
        print(f"{what}, by parts, with the operators:")
        for part, value in sorted(parts.items(), key=lambda item: -item[1]):
            print(f"    {part:36}{1e3 * value:9.1f} ms", flush=True)


def time_network(config, *, forward_batch: int, step_batch: int, rounds: int):
    """Time a network with the compiled operators and with Paddle's own convolutions, in turn.

    Args:
        config: the network and optimizer.
        forward_batch: images of a forward pass in evaluation mode.
        step_batch: images of a training step: forward, backward, optimizer.
        rounds: how often each is timed.

    Yields:
        What was timed; seconds of each round by implementation; and seconds of one more round with
        the operators by parts: of a forward pass by kinds of layer, of a step by its three parts.
    """
    models = {}
    for name, impl in (("operators", "auto"), ("Paddle's own", "paddle")):
        paddle.seed(config.SEED)
        models[name] = model = build_replknet(config)
        use_fast_depthwise_conv(model, impl)
        use_fast_pointwise_conv(model, impl)
    rng = np.random.default_rng(config.SEED)
    side = config.DATA.IMAGE_SIZE
    images = paddle.to_tensor(rng.normal(size=(forward_batch, 3, side, side)).astype("float32"))

    def forward(model):
        with paddle.no_grad():
            return model(images)

    for model in models.values():
        model.eval()
    seconds = time_in_turn(
        {name: partial(forward, model) for name, model in models.items()}, rounds=rounds
    )
    ours = models["operators"]
    parts = seconds_by_layer(ours, partial(forward, ours))
    yield f"forward, batch {forward_batch}", seconds, parts

    images_of_step = paddle.to_tensor(
        rng.normal(size=(step_batch, 3, side, side)).astype("float32")
    )
    labels = paddle.to_tensor(rng.integers(0, config.MODEL.NUM_CLASSES, step_batch))
    criterion = LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)
    optimizers = {name: build_optimizer(config, m, lr=1e-4) for name, m in models.items()}

    def step(name):
        times = [time.perf_counter()]
        loss = criterion(models[name](images_of_step), labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizers[name].step()
        optimizers[name].clear_grad()
        times.append(time.perf_counter())
        return dict(zip(("forward", "backward", "optimizer"), np.diff(times)))

    for model in models.values():
        model.train()
    seconds = time_in_turn({name: partial(step, name) for name in models}, rounds=rounds)
    yield f"training step, batch {step_batch}", seconds, step("operators")
    parts = seconds_by_layer(ours, lambda: ours(images_of_step))
    yield f"its forward pass, batch {step_batch}", {}, parts
