"""A RepLKNet small enough for a step in milliseconds, and how it is trained here."""

from types import SimpleNamespace

import paddle
from paddle.nn import functional as F

from replknet_paddle.model import RepLKNet

LAYERS = [1, 1, 3, 1]


def make_model(seed: int = 0, **sizes) -> RepLKNet:
    paddle.seed(seed)
    tiny = dict(
        large_kernel_sizes=[3, 3, 3, 3],
        layers=LAYERS,
        channels=[4, 4, 8, 8],
        small_kernel=1,
        num_classes=5,
    )
    return RepLKNet(**{**tiny, **sizes})


def make_config(**train) -> SimpleNamespace:
    """The keys that `build_optimizer` reads; keyword arguments override those of TRAIN."""
    defaults = dict(
        WEIGHT_DECAY=0.05,
        LAYER_DECAY=None,
        GRAD_CLIP=None,
        OPTIMIZER=SimpleNamespace(NAME="AdamW", EPS=1e-8, BETAS=[0.9, 0.999]),
    )
    return SimpleNamespace(
        TRAIN=SimpleNamespace(**{**defaults, **train}), MODEL=SimpleNamespace(LAYERS=LAYERS)
    )


def train(model, optimizer, steps, after_step=lambda: None) -> None:
    """Take these optimizer steps, on images that depend on the step's number alone."""
    model.train()
    for step in steps:
        paddle.seed(1000 + step)
        images = paddle.randn([4, 3, 32, 32])
        F.cross_entropy(model(images), paddle.to_tensor([0, 1, 2, 3])).backward()
        optimizer.set_lr(1e-2 / (step + 1))
        optimizer.step()
        optimizer.clear_grad()
        after_step()
