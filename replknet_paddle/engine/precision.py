"""Mixed precision: what is computed in half, how gradients survive it, and when to give up."""

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.ops import fast_depthwise_layers
from replknet_paddle.optim.optimizer import master_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

LOSS_SCALE = 2.0**16  # at first

# Halved this often, the gradients of a loss that is not scaled at all overflow float16: no scale
# will help any more.
LOSS_SCALE_FLOOR = 1.0

STEPS_UNTIL_DOUBLED = 2000


class LossScaleError(RuntimeError):
    """Gradients overflow however little the loss is scaled."""


class Precision:
    """How the network computes, forward and backward.

    Without `enabled`, or on CPU, all is float32. Level 'O2' has half-precision weights with float32
    masters and gradients. With 'float16', not with 'bfloat16', the loss is scaled, so that small
    gradients do not become 0: `loss_scale` is halved when gradients overflow, and doubled after
    2000 steps without, as by Paddle's `GradScaler` with its defaults. It lives on the host, so that
    a step asks the device once for all that it needs.
    """

    def __init__(self, *, enabled: bool = False, level: str = "O1", dtype: str = "float16"):
        self.enabled = enabled and processes.on_gpu()
        if self.enabled and dtype == "bfloat16" and not processes.supports_bfloat16("gpu"):
            raise InputError(
                "AMP_DTYPE is bfloat16, which this GPU does not compute in (compute capability "
                "below 8.0); allowed here: float16"
            )
        self.level = level
        self.dtype = dtype
        self.loss_scale = LOSS_SCALE if self.enabled and dtype == "float16" else None
        self.good_steps = 0  # since the scale was changed

    @property
    def half_weights(self) -> bool:
        """Whether the optimizer keeps float32 masters of half-precision weights."""
        return self.enabled and self.level == "O2"

    def prepare(self, model: nn.Layer, optimizer: paddle.optimizer.Optimizer | None = None) -> None:
        """Turn the weights of `model` into half precision, in place, where the level says so.

        The `optimizer` of a model to be trained then keeps float32 masters.
        """
        if not self.half_weights:
            return
        # Paddle's depthwise kernels may sum in the type of the weights; matrix products round them.
        excluded = fast_depthwise_layers(model)
        # Frozen weights have no masters, so rounding would change them for good.
        for layer in model.sublayers():
            if any(p.stop_gradient for p in layer.parameters(include_sublayers=False)):
                excluded.append(layer)
        options = dict(level="O2", dtype=self.dtype, excluded_layers=excluded)
        if optimizer is None:
            paddle.amp.decorate(models=model, **options)
        else:
            paddle.amp.decorate(models=model, optimizers=optimizer, master_weight=True, **options)

    def autocast(self):
        """Return the context of a forward pass."""
        return paddle.amp.auto_cast(enable=self.enabled, level=self.level, dtype=self.dtype)

    def backward(self, loss: paddle.Tensor) -> None:
        """Add the gradients of `loss`, scaled where that is needed."""
        (loss if self.loss_scale is None else loss * self.loss_scale).backward()

    def step(self, optimizer: paddle.optimizer.Optimizer, *, finite: bool) -> None:
        """Make an optimizer step, but not where scaled gradients overflowed; adjust the scale.

        LossScaleError comes on all processes alike, for they share their gradients.
        """
        if finite or self.loss_scale is None:
            optimizer.step()
        if self.loss_scale is None:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale /= 2
        elif self.good_steps == STEPS_UNTIL_DOUBLED:
            self.loss_scale *= 2
            self.good_steps = 0
        if self.loss_scale < LOSS_SCALE_FLOOR:
            raise LossScaleError(
                f"the loss scale fell to {self.loss_scale:g}, below {LOSS_SCALE_FLOOR:g}"
            )

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs; empty where the loss is not scaled."""
        if self.loss_scale is None:
            return {}
        return {"scale": self.loss_scale, "incr_count": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from `state()`; a state without a scale leaves a fresh one."""
        if self.loss_scale is not None and state:
            self.loss_scale = float(state["scale"])
            self.good_steps = int(state["incr_count"])


def float32_weights(model: nn.Layer, optimizer) -> dict[str, np.ndarray]:
    """Return all of a model's tensors; for half-precision weights, their float32 masters."""
    tensors = {**model.state_dict(), **master_weights(optimizer, model)}
    return {name: tensor.astype("float32").numpy() for name, tensor in tensors.items()}
