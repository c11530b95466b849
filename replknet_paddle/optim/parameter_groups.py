"""Which parameters decay, and which layer group each belongs to.

Weight decay: none on biases and other 1-D parameters (batch norm's scale and shift).
Layer decay (BEiT's, as the official RepLKNet fine-tuning uses it): the network is cut into groups
from the stem to the head, and group `i` of `n` learns at `layer_decay ** (n - 1 - i)` times the
rate. Groups follow the official code, which knows only layers (2, 2, 18, 2); here stage 2 has a
group for every 4 of its blocks, RepLK blocks and ConvFFNs counted alike, whatever its depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import paddle
from paddle import nn

STAGE2_BLOCKS_PER_GROUP = 4


@dataclass
class ParameterGroup:
    """Parameters that share a layer group and a weight decay.

    Attributes:
        layer_id: group of `layer_id()`, whether or not layer decay is on.
        lr_scale: factor on the learning rate, in (0, 1]; 1 without layer decay.
        weight_decay: decoupled decay per step and unit of learning rate; 0 for none.
        names: structured names.
        params: the parameters, in the order of `names`.
    """

    layer_id: int
    lr_scale: float
    weight_decay: float
    names: list[str] = field(default_factory=list)
    params: list[paddle.Tensor] = field(default_factory=list)


def num_layer_groups(layers: Sequence[int]) -> int:
    """Number of layer groups: 14 for the published depths (2, 2, 18, 2).

    One each for the stem, stages 0, 1 and 3, and the final norm with the head; and one for every
    4 blocks of stage 2 (`layers` counts pairs of blocks), the last of them possibly smaller.
    """
    return 5 + -(-2 * layers[2] // STAGE2_BLOCKS_PER_GROUP)


def layer_id(name: str, layers: Sequence[int]) -> int:
    """Layer group of the parameter with this structured name, from 0 to num_layer_groups - 1.

    0: stem. 1 and 2: stages 0 and 1, each with the transition after it. From 3: stage 2, four
    blocks at a time, its last group with the transition (and stage norm) after it. Then stage 3;
    then the final norm and the head. Source: official `optim_factory.py`.

    Args:
        name: e.g. `stages.2.blocks.7.pw_conv_1.conv.weight`.
        layers: pairs of blocks in each of the four stages.

    Raises:
        ValueError: a name that belongs to no part of a RepLKNet with these layers.
    """
    last = num_layer_groups(layers) - 1
    match name.split("."):
        case ["stem", *_]:
            return 0
        case ["stages", "0" | "1" as stage, *_] | ["transitions", "0" | "1" as stage, *_]:
            return 1 + int(stage)
        case ["stages", "2", "blocks", block, *_] if int(block) < 2 * layers[2]:
            return 3 + int(block) // STAGE2_BLOCKS_PER_GROUP
        case ["stages", "2", "norm", *_] | ["transitions", "2", *_]:
            return last - 2
        case ["stages", "3", *_]:
            return last - 1
        case ["norm" | "head", *_]:
            return last
    raise ValueError(
        f"parameter {name!r} has no layer group in a RepLKNet with layers "
        f"{list(layers)}; give it one in layer_id()"
    )


def decays(name: str, param: paddle.Tensor) -> bool:
    """Whether weight decay applies: to all but biases and 1-D parameters."""
    return param.ndim > 1 and not name.endswith(".bias")


def parameter_groups(
    model: nn.Layer, *, weight_decay: float, layer_decay: float | None = None, layers: Sequence[int]
) -> list[ParameterGroup]:
    """The trainable parameters of `model`, each in exactly one group.

    Frozen parameters are left out; so are batch norm's running statistics, which Paddle lists
    among the parameters.

    Args:
        model: a RepLKNet; not wrapped, for the wrapper's prefix would hide the names.
        weight_decay: for the parameters that decay; the others get 0.
        layer_decay: ratio between neighbouring groups' learning rates, in (0, 1]; None for one
            rate everywhere.
        layers: pairs of blocks in each stage of `model`.

    Returns:
        Groups by rising layer id, decaying parameters before the others.

    Raises:
        ValueError: a trainable parameter that no layer group covers.
    """
    count = num_layer_groups(layers)
    groups = {}
    for name, param in model.named_parameters():
        if param.stop_gradient:
            continue
        key = (layer_id(name, layers), not decays(name, param))
        if key not in groups:
            index, exempt = key
            groups[key] = ParameterGroup(
                layer_id=index,
                lr_scale=1.0 if layer_decay is None else layer_decay ** (count - 1 - index),
                weight_decay=0.0 if exempt else weight_decay,
            )
        groups[key].names.append(name)
        groups[key].params.append(param)
    return [groups[key] for key in sorted(groups)]
