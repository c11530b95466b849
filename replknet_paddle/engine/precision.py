"""Mixed precision: what is computed in half, how gradients survive it, and when to give up."""

import paddle
from paddle import nn

from replknet_paddle.ops import large_kernel_layers
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError

# Halved this often, the gradients of a loss that is not scaled at all overflow float16: no scale
# will help any more.
LOSS_SCALE_FLOOR = 1.0


class LossScaleError(RuntimeError):
    """Gradients overflow however little the loss is scaled."""


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
        if self.enabled and dtype == "bfloat16" and not processes.gpu_computes_in_bfloat16():
            raise InputError(
                "AMP_DTYPE is bfloat16, which this GPU does not compute in (compute capability "
                "below 8.0); allowed here: float16"
            )
        self.level = level
        self.dtype = dtype
        self.scaler = None
        if self.enabled and dtype == "float16":
            self.scaler = paddle.amp.GradScaler()

    @property
    def half_weights(self) -> bool:
        """Whether the optimizer keeps float32 masters of half-precision weights."""
        return self.enabled and self.level == "O2"

    def prepare(self, model: nn.Layer, optimizer: paddle.optimizer.Optimizer | None = None) -> None:
        """Turn the weights of `model` into half precision, in place, where the level says so.

        Args:
            optimizer: of a model that is to be trained: keeps float32 masters and gradients.
        """
        # Paddle's own convolution needs large kernels in float32, and matrix products round them.
        excluded = large_kernel_layers(model)
        if self.half_weights and optimizer is None:
            paddle.amp.decorate(
                models=model, level="O2", dtype=self.dtype, excluded_layers=excluded
            )
        elif self.half_weights:
            paddle.amp.decorate(
                models=model,
                optimizers=optimizer,
                level="O2",
                dtype=self.dtype,
                master_weight=True,
                master_grad=True,
                excluded_layers=excluded,
            )

    def autocast(self):
        """The context of a forward pass."""
        return paddle.amp.auto_cast(enable=self.enabled, level=self.level, dtype=self.dtype)

    def backward(self, loss: paddle.Tensor) -> None:
        """Add the gradients of `loss`, scaled where that is needed."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self, optimizer: paddle.optimizer.Optimizer) -> None:
        """One optimizer step, left out where scaled gradients overflowed.

        Raises:
            LossScaleError: the scale has shrunk to its floor; on all processes alike, for they
                share their gradients.
        """
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()
        scale = self.loss_scale()
        if scale < LOSS_SCALE_FLOOR:
            raise LossScaleError(f"the loss scale fell to {scale:g}, below {LOSS_SCALE_FLOOR:g}")

    def loss_scale(self) -> float:
        """What the loss is multiplied by."""
        return float(self.scaler.state_dict()["scale"][0])

    def state(self) -> dict[str, float]:
        """What a resumed run needs; empty without a scaler."""
        if self.scaler is None:
            return {}
        state = self.scaler.state_dict()
        return {**state, "scale": self.loss_scale()}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from `state()`; one without a scale leaves a fresh one."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict({**state, "scale": [state["scale"]]})
