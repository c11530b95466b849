"""AdamW for RepLKNet, and its state under names that mean the same in every process.

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

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.optim.parameter_groups import ParameterGroup, parameter_groups
from replknet_paddle.optim.state import check_fits

# Paddle's names for AdamW's tensors; a master of a half-precision parameter has its own name.
TENSOR_NAME = re.compile(
    r"(?P<param>.+?)(_fp32_master_\d+)?"
    r"_(?P<kind>moment1|moment2|beta1_pow|beta2_pow)(_acc)?_\d+"
)


def build_optimizer(
    config, model: nn.Layer, *, lr: float, multi_precision: bool = False
) -> paddle.optimizer.AdamW:
    """AdamW over the trainable parameters of `model`, driven by `optimizer.set_lr(lr)`.

    Each parameter learns at the rate last set times its layer-decay factor; the decay is
    decoupled and scales with that same rate (arXiv 1711.05101, as in PyTorch). The factors stay
    on the parameters, so a later optimizer over the same model replaces them.

    Args:
        config: TRAIN.OPTIMIZER.{NAME,BETAS,EPS}, TRAIN.WEIGHT_DECAY, TRAIN.LAYER_DECAY,
            TRAIN.GRAD_CLIP (limit of the global norm of all gradients; None for none) and
            MODEL.LAYERS.
        model: a RepLKNet, not wrapped.
        lr: rate of the first step.
        multi_precision: keep a float32 master of every half-precision parameter (AMP O2).

    Raises:
        InputError: an optimizer other than AdamW.
        ValueError: a trainable parameter that no layer group covers.
    """
    train = config.TRAIN
    groups = parameter_groups(
        model,
        weight_decay=train.WEIGHT_DECAY,
        layer_decay=train.LAYER_DECAY,
        layers=config.MODEL.LAYERS,
    )
    return adamw(config, groups, lr=lr, multi_precision=multi_precision)


def adamw(
    config, groups: list[ParameterGroup], *, lr: float, multi_precision: bool = False
) -> paddle.optimizer.AdamW:
    """AdamW over groups of parameters, as TRAIN says; see `build_optimizer`."""
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
    """Parameters that an optimizer changes, by structured name."""
    return {name: param for name, param in model.named_parameters() if not param.stop_gradient}


def master_weights(
    optimizer: paddle.optimizer.Optimizer, model: nn.Layer
) -> dict[str, paddle.Tensor]:
    """The optimizer's live float32 masters, by structured parameter name.

    Empty unless `multi_precision` met half-precision parameters, and before the first step.
    """
    masters = optimizer.state_dict().get("master_weights", {})
    return {
        name: masters[param.name]
        for name, param in trainable_parameters(model).items()
        if param.name in masters
    }


def optimizer_state(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> dict[str, np.ndarray]:
    """All that AdamW remembers, float32, keyed `<structured parameter name>.<kind>`.

    Kinds: `moment1`, `moment2` and, of a half-precision parameter with a float32 master,
    `master`, all in the parameter's shape; `beta1_pow` and `beta2_pow`, shape (1,). Every
    trainable parameter has its entries: before its first step, those it will start from.
    The learning rate is not part of the state; it follows from the step.
    """
    state = initial_state(optimizer, model)
    for key, tensor in live_state(optimizer, model).items():
        state[key] = tensor.numpy()
    return state


def load_optimizer_state(
    optimizer: paddle.optimizer.AdamW, model: nn.Layer, state: dict[str, np.ndarray]
) -> None:
    """Continue from `optimizer_state` of this or another process, bit for bit.

    The model's own weights are not touched; gradients not yet applied are dropped.

    Raises:
        InputError: names that are missing, unknown or of another shape; nothing is loaded.
    """
    expected = initial_state(optimizer, model)
    check_fits(state, {key: value.shape for key, value in expected.items()}, "the optimizer state")
    if live_state(optimizer, model).keys() != expected.keys():
        create_tensors(optimizer, model)
    for key, tensor in live_state(optimizer, model).items():
        tensor.copy_(paddle.to_tensor(state[key], dtype="float32"), True)


def create_tensors(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> None:
    """Make Paddle create the optimizer's tensors now instead of at the first step.

    It has no call for that, so this takes a step that changes no weight: zero gradients at a
    rate of 0. The tensors' values afterwards are not those of a fresh optimizer.
    """
    lr = optimizer.get_lr()
    optimizer.set_lr(0.0)
    for param in trainable_parameters(model).values():
        param.grad = paddle.zeros_like(param)
    optimizer.step()
    optimizer.clear_grad(set_to_zero=False)
    optimizer.set_lr(lr)


def initial_state(optimizer: paddle.optimizer.AdamW, model: nn.Layer) -> dict[str, np.ndarray]:
    """`optimizer_state` of an optimizer that has not taken a step."""
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
    """The optimizer's own tensors that exist by now, keyed as in `optimizer_state`."""
    structured = {param.name: name for name, param in trainable_parameters(model).items()}
    state = {}
    for key, tensor in optimizer.state_dict().items():
        if key != "master_weights":
            match = TENSOR_NAME.fullmatch(key)
            state[f"{structured[match['param']]}.{match['kind']}"] = tensor
    for name, master in master_weights(optimizer, model).items():
        state[f"{name}.master"] = master
    return state
