"""Parameters and multiply-adds, counted to the unit."""

import functools

import paddle
from paddle import nn


def count_parameters(model: nn.Layer) -> int:
    """Return the trainable numbers of `model`: Paddle lists running statistics of BN as well."""
    return sum(p.size for p in model.parameters() if not p.stop_gradient)


@paddle.no_grad()
def count_macs(model: nn.Layer, image_size: int | tuple[int, int]) -> int:
    """Return the multiply-adds of convolutions and linear layers for one image: the paper's FLOPs.

    Nothing is multiplied: for one forward pass these layers give zeros of the right shape, so that
    counting XL takes no longer than a nano.

    Args:
        image_size: (height, width) of the input, or the side of a square one, pixels.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    macs = []
    training = {layer: layer.training for layer in model.sublayers(include_self=True)}
    counted = [layer for layer in training if isinstance(layer, (nn.Conv2D, nn.Linear))]
    for layer in counted:
        layer.forward = functools.partial(_count_layer, layer, macs)
    try:
        model.eval()
        model(paddle.zeros([1, 3, *size]))
    finally:
        for layer in counted:
            del layer.forward  # the class's own method again
        for layer, was_training in training.items():
            layer.training = was_training
    return sum(macs)


def _count_layer(layer: nn.Conv2D | nn.Linear, macs: list[int], x: paddle.Tensor) -> paddle.Tensor:
    """Add the multiply-adds of a layer to `macs`; return zeros of the shape of its output."""
    if isinstance(layer, nn.Linear):
        macs.append(x.shape[0] * layer.weight.size)
        return paddle.zeros([x.shape[0], layer.weight.shape[1]])
    if not isinstance(layer._padding, int) or set(layer._dilation) != {1}:
        raise ValueError(f"{layer}: only convolutions with one padding and no dilation are counted")
    out_channels, _, *kernel = layer.weight.shape
    rows, columns = (
        (size + 2 * layer._padding - extent) // stride + 1
        for size, extent, stride in zip(x.shape[2:], kernel, layer._stride)
    )
    macs.append(x.shape[0] * layer.weight.size * rows * columns)
    return paddle.zeros([x.shape[0], out_channels, rows, columns])
