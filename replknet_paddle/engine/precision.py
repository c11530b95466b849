"""Mixed precision: what is computed in half, how gradients survive it, and when to give up."""

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.ops import large_kernel_layers
from replknet_paddle.optim.optimizer import master_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

# Halved this often, the gradients of a loss that is not scaled at all overflow float16: no scale
# will help any more.
LOSS_SCALE_FLOOR = 1.0


class LossScaleError(RuntimeError):
    """Gradients overflow however little the loss is scaled."""


class LossScaler:
    """The factor of the loss that keeps small float16 gradients from becoming 0.

    As Paddle's `GradScaler` with its defaults: halved when gradients overflow, doubled after 2000
    steps without. It lives on the host, so that a step asks the device once for all that it needs.
    """

    STEPS_UNTIL_DOUBLED = 2000

    def __init__(self, scale: float = 2.0**16):
        self.scale = scale
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Adjust the scale to a step's gradients; raise LossScaleError below its floor."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.STEPS_UNTIL_DOUBLED:
            self.scale *= 2
            self.good_steps = 0
        if self.scale < LOSS_SCALE_FLOOR:
            raise LossScaleError(
                f"the loss scale fell to {self.scale:g}, below {LOSS_SCALE_FLOOR:g}"
            )


class Precision:
    """How the network computes, forward and backward.

    Args:
        enabled: mixed precision; without, or on CPU, all is float32.
        level: 'O1', or 'O2' for half-precision weights with float32 masters and gradients.
        dtype: 'float16', whose loss is scaled, or 'bfloat16'.

    Raises:
        InputError: bfloat16 on a GPU that does not compute in it, of which Paddle only warns.
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
        self.scaler = LossScaler() if self.enabled and dtype == "float16" else None

    @property
    def half_weights(self) -> bool:
        """Whether the optimizer keeps float32 masters of half-precision weights."""
        return self.enabled and self.level == "O2"

    @property
    def loss_scale(self) -> float | None:
        """The factor by which `backward` multiplies the loss; None where it does not."""
        return None if self.scaler is None else self.scaler.scale

    def prepare(self, model: nn.Layer, optimizer: paddle.optimizer.Optimizer | None = None) -> None:
        """Turn the weights of `model` into half precision, in place, where the level says so.

        The `optimizer` of a model to be trained then keeps float32 masters.
        """
        if not self.half_weights:
            return
        # Paddle's own convolution needs large kernels in float32, and matrix products round them.
        options = dict(level="O2", dtype=self.dtype, excluded_layers=large_kernel_layers(model))
        if optimizer is None:
            paddle.amp.decorate(models=model, **options)
        else:
            paddle.amp.decorate(models=model, optimizers=optimizer, master_weight=True, **options)

    def autocast(self):
        """Return the context of a forward pass."""
        return paddle.amp.auto_cast(enable=self.enabled, level=self.level, dtype=self.dtype)

    def backward(self, loss: paddle.Tensor) -> None:
        """Add the gradients of `loss`, scaled where that is needed."""
        (loss if self.scaler is None else loss * self.scaler.scale).backward()

    def step(self, optimizer: paddle.optimizer.Optimizer, *, finite: bool) -> None:
        """Make an optimizer step, but not where scaled gradients overflowed.

        LossScaleError comes on all processes alike, for they share their gradients.
        """
        if finite or self.scaler is None:
            optimizer.step()
        if self.scaler is not None:
            self.scaler.update(finite=finite)

    def state(self) -> dict[str, float]:
        """Return what a resumed run needs; empty without a scaler."""
        if self.scaler is None:
            return {}
        return {"scale": self.scaler.scale, "incr_count": self.scaler.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from `state()`; a state without a scale leaves a fresh one."""
        if self.scaler is not None and state:
            self.scaler.scale = float(state["scale"])
            self.scaler.good_steps = int(state["incr_count"])


def float32_weights(model: nn.Layer, optimizer) -> dict[str, np.ndarray]:
    """Return all of a model's tensors; for half-precision weights, their float32 masters."""
    tensors = {**model.state_dict(), **master_weights(optimizer, model)}
    return {name: tensor.astype("float32").numpy() for name, tensor in tensors.items()}
