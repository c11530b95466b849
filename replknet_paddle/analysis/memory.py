"""Memory and computation that a training step of RepLKNet takes, counted from the network's shapes.

Kept in memory from the forward to the backward pass is what a layer's gradient needs: the input of
a convolution or batch norm, the output of a ReLU, the input of a GELU, and the branch that
stochastic depth scales. A tensor that two layers need is there once. Not counted: gradients of maps
in flight, workspaces of kernels, per-channel statistics, and the framework itself.
"""

from dataclasses import dataclass

from paddle import nn

from replknet_paddle.analysis.complexity import count_macs, count_parameters
from replknet_paddle.model import ConvFFN, RepLKBlock

FLOAT32_BYTES, HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Part:
    """A block, or a convolution with its norm and ReLU outside of blocks.

    Attributes:
        inner: elements that its backward pass needs, besides input and output, for one image.
        output: elements of its output, which the next part needs.
        macs: multiply-adds outside of blocks; 0 for a block.
        is_block: whether recomputation covers it.
    """

    inner: int
    output: int
    macs: int = 0
    is_block: bool = False


def count_kept_elements(model: nn.Layer, image_size: int, *, recompute: bool = False) -> int:
    """Numbers that a training step keeps for the backward pass, for one image.

    Args:
        model: a classifier in the form in which it is trained, with small kernels not merged.
        image_size: side of the square input, pixels.
        recompute: as MODEL.RECOMPUTE: of blocks only the outputs are kept, and while one block's
            backward pass runs, what it needs.

    Raises:
        ValueError: a merged network.
    """
    parts = _parts(model, image_size)
    image = model.stem[0].conv.weight.shape[1] * image_size**2
    pooled = model.head.weight.shape[0]
    kept = image + pooled + sum(part.output for part in parts)
    if not recompute:
        return kept + sum(part.inner for part in parts)
    outside = sum(part.inner for part in parts if not part.is_block)
    return kept + outside + max(part.inner for part in parts if part.is_block)


def count_weight_bytes(model: nn.Layer, *, half: bool = False, ema: bool = False) -> int:
    """Bytes of weights, gradients and AdamW's two averages, whatever the batch.

    Args:
        half: as AMP_LEVEL O2: half-precision weights beside float32 ones; gradients in float32.
        ema: as TRAIN.MODEL_EMA: a third average.
    """
    float32_copies = 4 + ema
    each = float32_copies * FLOAT32_BYTES + (HALF_BYTES if half else 0)
    return count_parameters(model) * each


def count_training_flop(model: nn.Layer, image_size: int, *, recompute: bool = False) -> int:
    """Floating point operations of convolutions and linear layers for one image in a training step.

    A multiply-add is two of them. The backward pass takes twice the forward pass: gradients by the
    input and by the weight. Recomputation runs the blocks forward a second time.
    """
    macs = count_macs(model, image_size)
    outside = sum(part.macs for part in _parts(model, image_size)) + model.head.weight.size
    return 2 * (3 * macs + (macs - outside if recompute else 0))


def _parts(model: nn.Layer, image_size: int) -> list[Part]:
    """The network's parts in the order of the forward pass."""
    parts, size = [], image_size
    for layer in model.stem:
        part, size = _conv_norm(layer, size)
        parts.append(part)
    for index, stage in enumerate(model.stages):
        if index > 0:
            for layer in model.transitions[index - 1]:
                part, size = _conv_norm(layer, size)
                parts.append(part)
        parts += [_block(block, size) for block in stage.blocks]
    return parts


def _conv_norm(layer: nn.Layer, size: int) -> tuple[Part, int]:
    """A convolution with norm and ReLU, and the side of its output."""
    channels, _, kernel, _ = layer.conv.weight.shape
    size = (size + 2 * (kernel // 2) - kernel) // layer.conv._stride[0] + 1
    elements = channels * size**2
    return Part(elements, elements, layer.conv.weight.size * size**2), size


def _block(block: nn.Layer, size: int) -> Part:
    inside, channels = block.pw_conv_1.conv.weight.shape[:2]
    # Between input and output: the norm's output, the last convolution's, the scaled branch.
    maps = [channels, channels] + [channels] * (block.drop_path.rate > 0)
    if isinstance(block, RepLKBlock):
        if not hasattr(block.large_kernel, "large_kernel_origin"):
            raise ValueError("the network is merged; allowed: the form in which it is trained")
        # First convolution, its ReLU, large convolution, ReLU of the sum.
        maps += [inside] * (4 + hasattr(block.large_kernel, "small_kernel_conv"))
    else:
        assert isinstance(block, ConvFFN)
        maps += [inside] * 3  # first convolution, its norm, GELU
    return Part(sum(maps) * size**2, channels * size**2, is_block=True)
