"""On GPU: matrix products or Paddle's own convolution, whichever is faster where it runs.

Measured once for each shape and type, when a layer first meets it, on the tensors at hand. Nothing
is chosen that does not agree with Paddle's own convolution in float32.
"""

import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import paddle

from replknet_paddle.ops.dispatch import large_kernel_depthwise_conv2d_reference as paddle_conv
from replknet_paddle.ops.dispatch import type_name
from replknet_paddle.ops.matmul_conv import convolve, weight_gradient
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.processes import rank, sum_over_ranks

logger = logging.getLogger(__name__)

# Largest deviation from Paddle's own over its largest value: 8 units of the type's last place.
TOLERANCE = {"float32": 2e-5, "tf32": 2**-8, "float16": 2**-8, "bfloat16": 2**-5}
REPEATS = 3


class Choice(NamedTuple):
    """What computes each pass, `matmul` or `paddle`. Paddle's gradients need its own forward."""

    forward: str
    gradients: str

    def __str__(self) -> str:
        names = {"matmul": "matrix products", "paddle": "Paddle's own"}
        return f"forward by {names[self.forward]}, gradients by {names[self.gradients]}"


CHOICES = (Choice("paddle", "paddle"), Choice("paddle", "matmul"), Choice("matmul", "matmul"))
PADDLE = CHOICES[0]

_trained: dict[tuple, Choice] = {}  # by shape and type
_evaluated: dict[tuple, Choice] = {}  # by channels, kernel and type


def choose(x: paddle.Tensor, weight: paddle.Tensor, memory_bytes: int, *, training: bool) -> Choice:
    """Return the fastest choice for tensors like these; measure where none is known.

    In training every shape and type is measured, and rank 0's choice is that of all ranks, which
    must call this in the same order. In evaluation, where shapes may change from image to image and
    from rank to rank, a shape that training has not met takes the choice that was measured first
    for its channels, kernel and type.
    """
    dtype, kernel = type_name(x), weight.shape[-1]
    key, coarse = (*x.shape, kernel, dtype), (x.shape[1], kernel, dtype)
    if training and key not in _trained:
        choice, agrees = _measure(x, weight, memory_bytes, gradients=True)
        wanted = CHOICES.index(choice) if rank() == 0 else 0
        wanted, vetoes = sum_over_ranks([wanted, not agrees])
        _trained[key] = PADDLE if vetoes else CHOICES[round(wanted)]
        logger.info("%s: %s", _describe(key), _trained[key])
    elif key not in _trained and coarse not in _evaluated:
        _evaluated[coarse], _ = _measure(x, weight, memory_bytes, gradients=False)
        logger.info("%s in evaluation: %s", _describe(key), _evaluated[coarse])
    return _trained[key] if key in _trained else _evaluated[coarse]


def _measure(x, weight, memory_bytes: int, *, gradients: bool) -> tuple[Choice, bool]:
    """Return the fastest choice on this device, and whether both compute the same."""
    with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
        x, weight = x.detach(), weight.detach()
        passes = _passes(x, weight, memory_bytes, gradients)
        what = _describe((*x.shape, weight.shape[-1], type_name(x)))
        tolerance, seconds = _tolerance(x), {}
        for name, by in passes.items():
            try:
                deviation = _deviation(by["matmul"](), by["paddle"]())
            except InputError as error:  # no tiles fit into the memory allowed
                logger.warning("%s; using Paddle's own convolution", error)
                return PADDLE, True
            if not deviation <= tolerance:  # nor where it is NaN
                logger.warning(
                    "%s: matrix products deviate from Paddle's own convolution by %.2g of the "
                    "largest value (%s; allowed: %.2g); using Paddle's own",
                    what,
                    deviation,
                    name,
                    tolerance,
                )
                return PADDLE, False
            seconds[name] = {impl: _seconds(call, x) for impl, call in by.items()}
    # paddle.grad has run and removed the hook that makes O2's master gradients; entering any
    # autocast context registers it again.
    with paddle.amp.auto_cast(enable=False):
        pass
    for name, by in seconds.items():
        ours, theirs = 1e3 * by["matmul"], 1e3 * by["paddle"]
        logger.info(
            "%s, %s: matrix products %.3f ms, Paddle's own %.3f ms", what, name, ours, theirs
        )

    def total(choice: Choice) -> float:
        return sum(by[getattr(choice, name)] for name, by in seconds.items())

    return min(CHOICES, key=total), True


def _passes(x, weight, memory_bytes, gradients) -> dict[str, dict[str, Callable]]:
    """Return what to compare and to time: calls that give tensors, by pass and implementation."""
    passes = {
        "forward": {
            "paddle": lambda: [paddle_conv(x, weight)],
            "matmul": lambda: [convolve(x, weight, memory_bytes)],
        }
    }
    if gradients:
        leaves = [x.detach(), weight.detach()]
        for leaf in leaves:
            leaf.stop_gradient = False
        with paddle.enable_grad():
            y = paddle_conv(*leaves)
        dy = y.detach()  # as good as any other
        passes["gradients"] = {
            "paddle": lambda: paddle.grad(y, leaves, dy, retain_graph=True),
            "matmul": lambda: [
                convolve(dy, weight, memory_bytes, flipped=True),
                weight_gradient(x, dy, weight.shape[-1], memory_bytes),
            ],
        }
    return passes


def _deviation(ours: list, wanted: list) -> float:
    """Return the largest difference over the largest value wanted, of any tensor; NaN counts."""
    worst = 0.0
    for a, b in zip(ours, wanted):
        b = b.astype("float32")
        difference = (a.astype("float32") - b).abs()
        if not bool(paddle.isfinite(difference).all()):  # of which max() may know nothing
            return float("nan")
        largest, scale = float(difference.max()), float(b.abs().max())
        if largest > 0:
            worst = max(worst, largest / scale if scale else float("inf"))
    return worst


def _seconds(call: Callable, x) -> float:
    """Return the median seconds of a call that has been made before."""
    seconds = []
    for _ in range(REPEATS):
        _wait_for(x)
        start = time.perf_counter()
        call()
        _wait_for(x)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _wait_for(x) -> None:
    if not x.place.is_cpu_place():
        paddle.device.synchronize()


def _tolerance(x) -> float:
    """Return the largest deviation allowed; float32 products use TF32 where the GPU has it."""
    dtype = type_name(x)
    if (
        dtype == "float32"
        and x.place.is_gpu_place()
        and paddle.device.cuda.get_device_capability()[0] >= 8
        and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    ):
        dtype = "tf32"
    return TOLERANCE[dtype]


def _describe(key: tuple) -> str:
    *shape, kernel, dtype = key
    return f"depthwise convolution {'x'.join(map(str, shape))}, kernel {kernel}, {dtype}"
