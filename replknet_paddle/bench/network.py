"""What the training loop costs beside the network, and what the network's convolutions cost."""

import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.bench.timing import (
    check_counts,
    describe_machine,
    median_ratio,
    summarize,
    time_in_turn,
)
from replknet_paddle.config import update_config
from replknet_paddle.data.dataset import TrainBatches
from replknet_paddle.engine.precision import Precision
from replknet_paddle.engine.train import TrainState, train_epoch
from replknet_paddle.model import build_replknet
from replknet_paddle.ops import LibraryError, build_convolutions, get_library
from replknet_paddle.optim.losses import LabelSmoothingCrossEntropy
from replknet_paddle.optim.optimizer import build_optimizer
from replknet_paddle.runtime.errors import InputError


class Batches(list):
    """Ready batches in the shape of a loader."""

    def __init__(self, batches: list):
        super().__init__(batches)
        size = batches[0][0].shape[0]
        self.batch_sampler = TrainBatches(len(batches) * size, size, rank=0, world_size=1, seed=0)


def report_train_loop(config, *, steps: int, rounds: int) -> None:
    """Print what `train_epoch` adds to a bare forward, backward and optimizer step, timed in turn.

    Mixing and the average of weights stay out of both sides. A timed run has so many `steps`.
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
    """Return seconds per step of `train_epoch` ("loop") and of the bare step ("bare")."""
    batch = config.DATA.BATCH_SIZE
    loader = Batches([random_batch(config, batch, seed=step) for step in range(steps)])
    criterion = LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)
    models = [network_with(config, config.MODEL.CONV_IMPL) for _ in range(2)]
    optimizers = [build_optimizer(config, model, lr=1e-4) for model in models]
    state = TrainState(
        model=models[0],
        criterion=criterion,
        optimizer=optimizers[0],
        learning_rate=lambda step: 1e-4,
        precision=Precision(),
    )

    def loop():
        for _ in train_epoch(state, loader, accum_iter=1, seed=0, epoch=0):
            pass

    def bare():
        for images, labels in loader:
            loss = criterion(models[1](images), labels)
            loss.backward()
            optimizers[1].step()
            optimizers[1].clear_grad()
        float(loss)

    seconds = time_in_turn({"loop": loop, "bare": bare}, rounds=rounds)
    return {name: [s / steps for s in values] for name, values in seconds.items()}


def network_with(config, impl: str) -> nn.Layer:
    """Return the network of a config, always the same, whose convolutions `impl` computes."""
    config = update_config(config, Namespace(opts=["MODEL.CONV_IMPL", impl]))
    paddle.seed(config.SEED)
    model = build_replknet(config)
    build_convolutions(model, config)
    return model


def random_batch(config, count: int, *, seed: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return images and labels of noise."""
    rng = np.random.default_rng(config.SEED + seed)
    shape = (count, 3, config.DATA.IMAGE_SIZE, config.DATA.IMAGE_SIZE)
    images = paddle.to_tensor(rng.normal(size=shape).astype("float32"))
    return images, paddle.to_tensor(rng.integers(0, config.MODEL.NUM_CLASSES, count))


def report_network(config, *, forward_batch: int, step_batch: int, rounds: int) -> None:
    """Print how fast a network is with and without the compiled operators, and where time goes.

    `forward_batch` images have a forward pass in evaluation mode, `step_batch` a training step.
    """
    check_counts(forward_batch=forward_batch, step_batch=step_batch, rounds=rounds)
    try:
        library = get_library()
    except LibraryError as error:
        raise InputError(f"nothing to measure: {error}") from None
    print(describe_machine())
    print(f"{library.isa}, {library.threads} thread(s) (LARGE_KERNEL_THREADS)")
    impls = {"operators": "auto", "Paddle's own": "paddle"}
    models = {name: network_with(config, impl) for name, impl in impls.items()}
    ours = models["operators"]
    images, _ = random_batch(config, forward_batch, seed=0)

    def forward(model):
        with paddle.no_grad():
            return model(images)

    for model in models.values():
        model.eval()
    calls = {name: partial(forward, model) for name, model in models.items()}
    seconds, what = time_in_turn(calls, rounds=rounds), f"forward, batch {forward_batch}"
    _print_sides(what, seconds)
    _print_parts(what, seconds_by_layer(ours, calls["operators"]))

    trained, labels = random_batch(config, step_batch, seed=1)
    criterion = LabelSmoothingCrossEntropy(config.TRAIN.SMOOTHING)
    optimizers = {name: build_optimizer(config, m, lr=1e-4) for name, m in models.items()}

    def step(name):
        times = [time.perf_counter()]
        loss = criterion(models[name](trained), labels)
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
    what = f"training step, batch {step_batch}"
    _print_sides(what, seconds)
    _print_parts(what, step("operators"))
    parts = seconds_by_layer(ours, lambda: ours(trained))
    _print_parts(f"its forward pass, batch {step_batch}", parts)


def _print_sides(what: str, seconds: dict[str, list[float]]) -> None:
    for impl, values in seconds.items():
        ratio = median_ratio(seconds["Paddle's own"], values)
        print(f"{what}, {impl}: {summarize(values)}, Paddle's own/it {ratio:.2f}")


def _print_parts(what: str, parts: dict[str, float]) -> None:
    """Print seconds of one more round with the operators, the largest part first."""
    print(f"{what}, by parts, with the operators:")
    for part, value in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part:36}{1e3 * value:9.1f} ms", flush=True)


def seconds_by_layer(model: nn.Layer, run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of one `run` in the forward pass of each kind of layer of the model.

    Only layers without sublayers count; what `forward` methods of others compute, such as ReLU,
    GELU and additions, goes under "between layers".
    """
    seconds: dict[str, float] = defaultdict(float)
    hooks, started = [], {}

    def before(layer, _):
        started[id(layer)] = time.perf_counter()

    def after(layer, _, output):
        seconds[_kind(layer)] += time.perf_counter() - started[id(layer)]

    for layer in model.sublayers():
        if not list(layer.children()):
            hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.register_forward_post_hook(after))
    start = time.perf_counter()
    run()
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    seconds["between layers"] = total - sum(seconds.values())
    return dict(seconds)


def _kind(layer: nn.Layer) -> str:
    if not isinstance(layer, nn.Conv2D):
        return type(layer).__name__
    kernel, stride = layer._kernel_size[0], layer._stride[0]
    depthwise = " depthwise" if layer._groups > 1 else ""
    return f"{kernel}x{kernel}{depthwise} convolution" + f", stride {stride}" * (stride > 1)
