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
from replknet_paddle.ops.matmul_conv import make_matrices, memory_of, plan_for


class WeightCache:
    """What one layer keeps, within `budget`: the bytes left to all layers of its network, a list
    of one number.
    """

    def __init__(self, budget: list[int]):
        self.budget = budget
        self.items: dict[tuple, tuple[int, object]] = {}  # size in bytes, value

    def spectrum(self, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor | None:
        """Return the operator's spectrum of a weight; None where none is of use, or fits."""
        key = ("spectrum", *x.shape[2:], x.dtype)
        if key in self.items:
            return self.items[key][1]
        library, shape = get_library(), (*x.shape, weight.shape[-1])
        floats = library.spectrum_floats(shape)

        def make():
            spectrum = paddle.empty([floats], dtype="float32")
            library.make_spectrum(shape, weight.data_ptr(), spectrum.data_ptr())
            return spectrum

        return self._keep(key, 4 * floats, make) if floats else None

    def matrices(
        self,
        x: paddle.Tensor,
        weight: paddle.Tensor,
        memory_bytes: int | None,
        *,
        flipped: bool = False,
    ):
        """Return T of a weight for maps like x, for `convolve`; None where it does not fit, or the
        tape records how it is made."""
        if paddle.is_grad_enabled() and not weight.stop_gradient:
            return None
        key = ("matrices", flipped, *x.shape[2:], x.dtype)
        if key in self.items and self.items[key][1].plan.batch < x.shape[0]:
            self._forget(key)
        if key in self.items:
            return self.items[key][1]
        plan = plan_for("convolution", x, weight.shape[-1], memory_bytes)
        size = plan.itemsize * plan.channels * plan.matrix_values
        return self._keep(key, size, lambda: make_matrices(plan, weight, x.dtype, flipped))

    def _keep(self, key: tuple, size: int, make: Callable):
        """What does not fit takes the place of what this layer has kept for maps of other sizes.

        Between layers the first ones win: the time that a byte saves is about the same in all.
        """
        for other in [other for other in self.items if other[-3:] != key[-3:]]:
            if size > self.budget[0]:
                self._forget(other)
        if size > self.budget[0]:
            return None
        self.budget[0] -= size
        self.items[key] = size, make()
        return self.items[key][1]

    def _forget(self, key: tuple) -> None:
        size, _ = self.items.pop(key)
        self.budget[0] += size

    def close(self) -> None:
        """Keep nothing from here on."""
        self.items.clear()
        self.budget = [0]


_caches: "weakref.WeakKeyDictionary[nn.Layer, WeightCache]" = weakref.WeakKeyDictionary()


def cache_of(layer: nn.Layer) -> WeightCache | None:
    """Return a layer's cache; None outside `cache_weights`."""
    return _caches.get(layer)


@contextlib.contextmanager
def cache_weights(model: nn.Layer) -> Iterator[None]:
    """While this is open, layers of `model` keep what they make of their weights.

    Nobody may change the weights until it ends. Matrices are kept in training, too, those for the
    gradients as well; spectra in evaluation without gradients. Those of all layers together take at
    most the layers' `memory_bytes`; what does not fit is made each time, with the same bits where
    batches have one size.
    """
    layers = [x for x in model.sublayers(include_self=True) if hasattr(x, "memory_bytes")]
    layers = [layer for layer in layers if layer not in _caches]  # others belong to one around this
    budget = [max((memory_of(layer.memory_bytes) for layer in layers), default=0)]
    _caches.update({layer: WeightCache(budget) for layer in layers})
    try:
        yield
    finally:
        for layer in layers:
            cache = _caches.pop(layer, None)
            if cache is not None:  # else the whole network is being collected
                cache.close()
