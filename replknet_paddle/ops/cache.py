"""What layers derive from their weights and keep, while their owner says that these do not change.

Whether a weight has changed cannot be seen cheaply: Paddle's version counter of a tensor misses
optimizer steps, `set_value` and `copy_`; comparing bytes takes longer on CPU than a kept spectrum
saves, and makes the host wait for a GPU. So layers keep something only within `cache_weights`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import paddle
from paddle import nn

from replknet_paddle.ops.library import get_library
from replknet_paddle.ops.matmul_conv import make_matrices, plan_for


class WeightCache:
    """What one layer keeps, within `budget`: the bytes left to all layers of its network, a list
    of one number.
    """

    def __init__(self, budget: list[int]):
        self.budget = budget
        self.items: dict[tuple, tuple[int, object]] = {}  # size in bytes, value

    def spectrum(self, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor | None:
        """Return the operator's spectrum of a weight; None where none is of use, or fits."""
        key = ("spectrum", *x.shape[2:])
        if key in self.items:
            return self.items[key][1]
        library, shape = get_library(), (*x.shape, weight.shape[-1])
        floats = library.spectrum_floats(shape)

        def make():
            spectrum = paddle.empty([floats], dtype="float32")
            library.make_spectrum(shape, weight.data_ptr(), spectrum.data_ptr())
            return spectrum

        return self._keep(key, 4 * floats, make) if floats else None

    def matrices(self, x: paddle.Tensor, weight: paddle.Tensor, memory_bytes: int):
        """Return T of a weight for maps like x, for `convolve`; None where it does not fit."""
        key = ("matrices", *x.shape[2:], x.dtype)
        if key in self.items:
            size, matrices = self.items[key]
            if matrices.plan.batch >= x.shape[0]:
                return matrices
            del self.items[key]
            self.budget[0] += size
        plan = plan_for("convolution", x, weight.shape[-1], memory_bytes)
        size = plan.itemsize * plan.channels * plan.matrix_values
        return self._keep(key, size, lambda: make_matrices(plan, weight, x.dtype))

    def _keep(self, key: tuple, size: int, make: Callable):
        if size > self.budget[0]:
            return None
        self.budget[0] -= size
        self.items[key] = size, make()
        return self.items[key][1]


_caches: "weakref.WeakKeyDictionary[nn.Layer, WeightCache]" = weakref.WeakKeyDictionary()


def cache_of(layer: nn.Layer) -> WeightCache | None:
    """Return a layer's cache; None outside `cache_weights`, in training, and with gradients."""
    cache = _caches.get(layer)
    return None if layer.training or paddle.is_grad_enabled() else cache


@contextlib.contextmanager
def cache_weights(model: nn.Layer) -> Iterator[None]:
    """While this is open, layers of `model` keep what they make of their weights.

    Nobody may change the weights until it ends. Spectra and matrices of all layers together take
    at most the layers' `memory_bytes`; those that do not fit are made each time, as before.
    """
    layers = [x for x in model.sublayers(include_self=True) if hasattr(x, "memory_bytes")]
    layers = [layer for layer in layers if layer not in _caches]  # others belong to one around this
    budget = [max((layer.memory_bytes for layer in layers), default=0)]
    _caches.update({layer: WeightCache(budget) for layer in layers})
    try:
        yield
    finally:
        for layer in layers:
            _caches.pop(layer, None)
