"""Exponential moving average of the weights.

After each optimizer step, average = decay * average + (1 - decay) * weights, in float32, over the
parameters and batch norm's running statistics alike, as timm's ModelEma does, which the official
recipe uses with decay 0.9999. One departure: of half-precision parameters the optimizer's float32
masters are averaged, because a step's change is often below the half format's resolution.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import paddle
from paddle import nn

from replknet_paddle.optim.optimizer import check_fits
from replknet_paddle.runtime.processes import flatten


class ModelEma:
    """The average, starting from the model's present weights.

    It is a pure function of the weights seen, so ranks that hold equal weights hold equal averages.

    Args:
        model: whose `state_dict()` is averaged; not wrapped, for wrappers rename.
        decay: in [0, 1); 0 follows the weights, 0.9999 averages over about 10,000 steps.
    """

    @paddle.no_grad()
    def __init__(self, model: nn.Layer, *, decay: float):
        tensors = model.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        # One buffer: an update is two operations instead of one for each of 968 tensors (31B).
        self.flat = flatten([tensor.astype("float32") for tensor in tensors.values()])
        self.new_weight = paddle.full([], 1.0 - decay, dtype="float32")

    @paddle.no_grad()
    def update(self, model: nn.Layer, masters: dict[str, paddle.Tensor] | None = None) -> None:
        """Take in the weights of `model` after an optimizer step; those of `masters` (of
        `master_weights`, under AMP O2) in place of the model's own."""
        masters = masters or {}
        tensors = [masters.get(name, tensor) for name, tensor in self._tensors(model).items()]
        self.flat.lerp_(
            flatten([t if t.dtype == paddle.float32 else t.astype("float32") for t in tensors]),
            self.new_weight,
        )

    @contextlib.contextmanager
    def applied_to(self, model: nn.Layer) -> Iterator[None]:
        """Let `model` carry the averaged weights, cast to its own types, within the context.

        Afterwards, whatever happened inside, it has its own weights and statistics again, bit for
        bit. Costs two more copies of the model for as long as it lasts.
        """
        tensors = self._tensors(model)
        with paddle.no_grad():
            own = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            overwrite(tensors, self._average())
            yield
        finally:
            overwrite(tensors, own)

    def state(self) -> dict[str, np.ndarray]:
        """Return the averages, float32, by structured name: weights that a bare model can load."""
        pieces = np.split(self.flat.numpy(), np.cumsum(self._sizes())[:-1])  # one copy, on the host
        return {
            name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Continue from what `state()` returned, bit for bit; InputError: it does not fit."""
        check_fits(state, self.shapes, "the average of the weights")
        values = [np.asarray(state[name], np.float32).reshape(-1) for name in self.shapes]
        self.flat = paddle.to_tensor(np.concatenate(values))

    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    def _average(self) -> dict[str, paddle.Tensor]:
        """Return copies of the averages by name, on the device."""
        pieces = paddle.split(self.flat, self._sizes())
        return {
            name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)
        }

    def _tensors(self, model: nn.Layer) -> dict[str, paddle.Tensor]:
        """Return the live tensors of `model`, once it is known to have the averaged names."""
        tensors = model.state_dict()
        if tensors.keys() != self.shapes.keys():
            odd = sorted(tensors.keys() ^ self.shapes.keys())
            raise ValueError(
                f"the model is not the one averaged so far; names in only one of them: {odd}"
            )
        return {name: tensors[name] for name in self.shapes}


@paddle.no_grad()
def overwrite(tensors: dict[str, paddle.Tensor], values: dict[str, paddle.Tensor]) -> None:
    """Copy `values` into `tensors` in place, cast to their types."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name].astype(tensor.dtype), True)
