"""AdamW for RepLKNet: its groups of parameters, and its state under names of every process.

Weight decay: none on biases and other 1-D parameters (batch norm's scale and shift). Layer decay
(BEiT's, as the official RepLKNet fine-tuning uses it): the network is cut into groups from the stem
to the head, and group `i` of `n` learns at `layer_decay ** (n - 1 - i)` times the rate. Groups
follow the official code, which knows only layers (2, 2, 18, 2); here stage 2 has a group for every
4 of its blocks, RepLK blocks and ConvFFNs counted alike, whatever its depth.

Two properties of Paddle's AdamW shape this file:

- Given parameter groups, it clips each group by that group's own norm. One flat list keeps the
  norm global. Layer decay then goes through each parameter's `optimize_attr['learning_rate']`, a
  factor on what `set_lr` sets, and weight decay through `apply_decay_param_fun`, which is asked
  with the parameter's internal name.
- Its state dict is keyed by internal names (`conv2d_12.w_0_moment1_0`). They count the layers made
  so far in the process, so they differ as soon as anything else is built first. Its tensors do
  not exist before the first step.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.runtime.errors import InputError, did_you_mean

STAGE2_BLOCKS_PER_GROUP = 4
LISTED = 20  # problems in one message; another network's state has thousands

# Paddle's names for AdamW's tensors; a master of a half-precision parameter has its own name.
TENSOR_NAME = re.compile(
    r"(?P<param>.+?)(_fp32_master_\d+)?"
    r"_(?P<kind>moment1|moment2|beta1_pow|beta2_pow)(_acc)?_\d+"
)


@dataclass
class ParameterGroup:
    """Parameters that share a layer group and a weight decay."""

    layer_id: int  # of `layer_id()`, whether or not layer decay is on
    lr_scale: float  # factor on the learning rate, in (0, 1]; 1 without layer decay
    weight_decay: float  # decoupled, per step and unit of learning rate; 0 for none
    names: list[str] = field(default_factory=list)  # structured
    params: list[paddle.Tensor] = field(default_factory=list)  # in the order of `names`


def num_layer_groups(layers: Sequence[int]) -> int:
    """Return the number of layer groups: 14 for the published depths (2, 2, 18, 2)."""
    return 5 + -(-2 * layers[2] // STAGE2_BLOCKS_PER_GROUP)


def layer_id(name: str, layers: Sequence[int]) -> int:
    """Return the layer group of a parameter, from 0 to num_layer_groups - 1.

    0: stem. 1 and 2: stages 0 and 1, each with the transition after it. From 3: stage 2, four
    blocks at a time, its last group with the transition (and stage norm) after it. Then stage 3;
    then the final norm and the head. Source: official `optim_factory.py`. ValueError: a name that
    belongs to no part of a RepLKNet with `layers` pairs of blocks.
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


def parameter_groups(
    model: nn.Layer, *, weight_decay: float, layer_decay: float | None = None, layers: Sequence[int]
) -> list[ParameterGroup]:
    """Return the trainable parameters of `model`, a RepLKNet, each in exactly one group.

    Groups come by rising layer id, decaying parameters before the others. `layer_decay` is the
    ratio between neighbouring groups' learning rates, None for one rate. ValueError: a parameter
    that no layer group covers.
    """
    count = num_layer_groups(layers)
    groups = {}
    for name, param in trainable_parameters(model).items():
        index = layer_id(name, layers)
        is_exempt = param.ndim <= 1 or name.endswith(".bias")
        if (index, is_exempt) not in groups:
            groups[index, is_exempt] = ParameterGroup(
                layer_id=index,
                lr_scale=1.0 if layer_decay is None else layer_decay ** (count - 1 - index),
                weight_decay=0.0 if is_exempt else weight_decay,
            )
        groups[index, is_exempt].names.append(name)
        groups[index, is_exempt].params.append(param)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    config, model: nn.Layer, *, lr: float, multi_precision: bool = False
) -> paddle.optimizer.AdamW:
    """Return AdamW over the trainable parameters of a RepLKNet, as TRAIN and MODEL.LAYERS say."""
    groups = parameter_groups(
        model,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
        layer_decay=config.TRAIN.LAYER_DECAY,
        layers=config.MODEL.LAYERS,
    )
    return adamw(config, groups, lr=lr, multi_precision=multi_precision)


def adamw(
    config, groups: list[ParameterGroup], *, lr: float, multi_precision: bool = False
) -> paddle.optimizer.AdamW:
    """Return AdamW over groups of parameters, as TRAIN says.

    Each parameter learns at the rate last set, by `set_lr`, times its group's factor; the decay is
    decoupled and scales with that same rate (arXiv 1711.05101, as in PyTorch). The factors stay on
    the parameters, so a later optimizer over the same model replaces them. `multi_precision` keeps
    a float32 master of every half-precision parameter (AMP O2).
    """
    train = config.TRAIN
    decaying = set()
    for group in groups:
        for param in group.params:
            param.optimize_attr["learning_rate"] = group.lr_scale
            if group.weight_decay:
                decaying.add(param.name)
    return paddle.optimizer.AdamW(
        learning_rate=float(lr),
        parameters=[param for group in groups for param in group.params],
        beta1=train.OPTIMIZER.BETAS[0],
        beta2=train.OPTIMIZER.BETAS[1],
        epsilon=train.OPTIMIZER.EPS,
        weight_decay=float(train.WEIGHT_DECAY),
        apply_decay_param_fun=decaying.__contains__,
        grad_clip=(
            None if train.GRAD_CLIP is None else nn.ClipGradByGlobalNorm(float(train.GRAD_CLIP))
        ),
        multi_precision=multi_precision,
    )


def trainable_parameters(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Return the parameters that an optimizer changes, by structured name: not frozen ones, nor
    batch norm's running statistics, which Paddle lists among the parameters."""
    return {name: param for name, param in model.named_parameters() if not param.stop_gradient}


def freeze(model: nn.Layer, prefixes: Sequence[str]) -> None:
    """Keep training from changing the parameters whose names begin with one of `prefixes`.

    Prefixes are whole parts of names: `stages.2.blocks.1` does not mean `stages.2.blocks.10`. In a
    classifier, `backbone` means all but the head. InputError: no name begins so, or nothing is left
    to train.
    """
    params = trainable_parameters(model)
    words = [name.split(".") for name in params]
    known = dict.fromkeys(".".join(parts[:n]) for parts in words for n in range(1, len(parts) + 1))
    frozen = set()
    for prefix in prefixes:
        if prefix == "backbone" and prefix not in known:
            found = [name for name in params if not name.startswith("head.")]
        else:
            found = [name for name in params if f"{name}.".startswith(f"{prefix}.")]
        if not found:
            allowed = dict.fromkeys(["backbone", *known])
            raise InputError(
                f"TRAIN.FREEZE has {prefix!r}, which no name of a parameter begins with; allowed: "
                f"{', '.join(name for name in allowed if '.' not in name)}, and names in them such "
                f"as {words[0][0]}.{words[0][1]}{did_you_mean(prefix, allowed)}"
            )
        frozen.update(found)
    if len(frozen) == len(params):
        raise InputError(f"TRAIN.FREEZE is {', '.join(prefixes)}, which leaves nothing to train")
    for name in frozen:
        params[name].stop_gradient = True
    for layer in frozen_layers(model):
        if isinstance(layer, nn.SyncBatchNorm):
            # Paddle's has no backward pass by running statistics.
            layer.__class__ = nn.BatchNorm2D


def frozen_layers(model: nn.Layer) -> list[nn.Layer]:
    """Return the layers of which nothing is trained, with all layers in them, which stay in
    evaluation mode: batch norms keep their running statistics, and no path is dropped."""
    frozen = []
    for layer in model.sublayers():
        parameters = layer.parameters()
        if parameters and all(param.stop_gradient for param in parameters):
            frozen += layer.sublayers(include_self=True)
    return frozen


def master_weights(
    optimizer: paddle.optimizer.Optimizer, model: nn.Layer
) -> dict[str, paddle.Tensor]:
    """Return the optimizer's live float32 masters, by structured parameter name.

    Empty unless `multi_precision` met half-precision parameters, and before the first step.
    """
    masters = optimizer.state_dict().get("master_weights", {})
    return {
        name: masters[param.name]
        for name, param in trainable_parameters(model).items()
        if param.name in masters
    }


def optimizer_state(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> dict[str, np.ndarray]:
    """Return all that AdamW remembers, float32, keyed `<structured parameter name>.<kind>`.

    The kinds are those of `initial_state`. Every trainable parameter has its entries: before its
    first step, those it will start from. The learning rate follows from the step.
    """
    state = initial_state(optimizer, model)
    for key, tensor in live_state(optimizer, model).items():
        state[key] = tensor.numpy()
    return state


def load_optimizer_state(
    optimizer: paddle.optimizer.AdamW, model: nn.Layer, state: dict[str, np.ndarray]
) -> None:
    """Continue from `optimizer_state` of this or another process, bit for bit; the weights are not
    touched, gradients are dropped. InputError: the state does not fit; nothing is loaded."""
    expected = initial_state(optimizer, model)
    check_fits(state, {key: value.shape for key, value in expected.items()}, "the optimizer state")
    if live_state(optimizer, model).keys() != expected.keys():
        create_tensors(optimizer, model)
    for key, tensor in live_state(optimizer, model).items():
        tensor.copy_(paddle.to_tensor(state[key], dtype="float32"), True)


def create_tensors(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> None:
    """Make Paddle create the optimizer's tensors now, by a step that changes no weight.

    Zero gradients at a rate of 0; the tensors' values afterwards are not those of a fresh one.
    """
    lr = optimizer.get_lr()
    optimizer.set_lr(0.0)
    for param in trainable_parameters(model).values():
        param.grad_ = paddle.zeros_like(param)
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)
    optimizer.set_lr(lr)


def initial_state(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> dict[str, np.ndarray]:
    """Return `optimizer_state` of an optimizer that has not taken a step."""
    state = {}
    for name, param in trainable_parameters(model).items():
        state[f"{name}.moment1"] = np.zeros(param.shape, "float32")
        state[f"{name}.moment2"] = np.zeros(param.shape, "float32")
        state[f"{name}.beta1_pow"] = np.full(1, optimizer._beta1, "float32")
        state[f"{name}.beta2_pow"] = np.full(1, optimizer._beta2, "float32")
        if optimizer._multi_precision and param.dtype in (paddle.float16, paddle.bfloat16):
            state[f"{name}.master"] = param.astype("float32").numpy()
    return state


def live_state(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> dict[str, paddle.Tensor]:
    """Return the optimizer's own tensors that exist by now, keyed as in `optimizer_state`."""
    structured = {param.name: name for name, param in trainable_parameters(model).items()}
    state = {}
    for key, tensor in optimizer.state_dict().items():
        if key != "master_weights":
            match = TENSOR_NAME.fullmatch(key)
            state[f"{structured[match['param']]}.{match['kind']}"] = tensor
    for name, master in master_weights(optimizer, model).items():
        state[f"{name}.master"] = master
    return state


def check_fits(
    state: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[int]], what: str
) -> None:
    """Raise InputError unless `state` has exactly the names of `shapes`, with these shapes."""
    problems = [f"missing: {name}" for name in shapes if name not in state]
    problems += [f"unknown: {name}" for name in state if name not in shapes]
    problems += [
        f"{name}: shape {np.shape(state[name])}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and np.shape(state[name]) != tuple(shape)
    ]
    if len(problems) > LISTED:
        problems[LISTED:] = [f"and {len(problems) - LISTED} more"]
    if problems:
        raise InputError(f"{what} does not fit the model:\n  " + "\n  ".join(problems))
