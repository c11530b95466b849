"""Parameters and multiply-adds, counted to the unit."""

import contextlib
from collections.abc import Iterator

import paddle
from paddle import nn


def count_parameters(model: nn.Layer) -> int:
    """Trainable numbers in `model`: Paddle lists the running statistics of BN as well."""
    return sum(p.size for p in model.parameters() if not p.stop_gradient)


@paddle.no_grad()
def count_macs(model: nn.Layer, image_size: int | tuple[int, int], channels: int = 3) -> int:
    """Multiply-adds of the convolutions and linear layers for one image.

    This is the paper's "FLOPs". Nothing is multiplied: the convolutions are replaced, for one
    forward pass, by zeros of the right shape, so that counting XL takes no longer than a nano.

    Args:
        image_size: (height, width) of the input, or the side of a square one, pixels.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    macs = []
    training = {layer: layer.training for layer in model.sublayers(include_self=True)}
    model.eval()
    try:
        with _counting_convolutions(model, macs):
            model(paddle.zeros([1, channels, *size]))
    finally:
        for layer, was_training in training.items():
            layer.training = was_training
    return sum(macs)


@contextlib.contextmanager
def _counting_convolutions(model: nn.Layer, macs: list[int]) -> Iterator[None]:
    """Within, convolutions give zeros and note their cost, as linear layers do."""
    layers = [
        layer
        for layer in model.sublayers(include_self=True)
        if isinstance(layer, (nn.Conv2D, nn.Linear))
    ]
    for layer in layers:
        layer.forward = _costing(layer, macs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own method again


def _costing(layer: nn.Layer, macs: list[int]):
    def convolution(x):
        if not isinstance(layer._padding, int) or set(layer._dilation) != {1}:
            raise ValueError(
                f"{layer}: only convolutions with one padding and no dilation are counted"
            )
        out_channels, _, *kernel = layer.weight.shape
        rows, columns = (
            (size + 2 * layer._padding - extent) // stride + 1
            for size, extent, stride in zip(x.shape[2:], kernel, layer._stride)
        )
        macs.append(x.shape[0] * layer.weight.size * rows * columns)
        return paddle.zeros([x.shape[0], out_channels, rows, columns])

    def linear(x):
        macs.append(x.shape[0] * layer.weight.size)
        return paddle.zeros([x.shape[0], layer.weight.shape[1]])

    return convolution if isinstance(layer, nn.Conv2D) else linear
