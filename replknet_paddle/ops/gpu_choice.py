"""On GPU: matrix products or Paddle's own convolution, whichever is faster where it runs.

Measured once for each shape and type, when a layer first meets it, on the tensors at hand. Nothing
is chosen that does not agree with Paddle's own convolution in float32. A deterministic run times
nothing: it takes products wherever they agree.
"""

import logging
import os
import statistics
from collections.abc import Callable
from typing import NamedTuple

import paddle

from replknet_paddle.ops.dispatch import keeps_by_hooks, type_name, without_autocast
from replknet_paddle.ops.dispatch import large_kernel_depthwise_conv2d_reference as paddle_conv
from replknet_paddle.ops.matmul_conv import convolve, weight_gradient
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.processes import is_deterministic, rank, sum_over_ranks

logger = logging.getLogger(__name__)

# Largest deviation from Paddle's own over its largest value: 8 units of the type's last place.
TOLERANCE = {"float32": 2e-5, "tf32": 2**-8, "float16": 2**-8, "bfloat16": 2**-5}
REPEATS = 3
CALLS = 5  # of a repeat: the device's time for one is theirs over their number
MOST_PRODUCTS = 128  # that calls are queued behind, 0.3 to 3 ms each
# What the next choice must take of the time of the one before it: noise alone changes nothing.
MARGIN = 0.95


class Choice(NamedTuple):
    """What computes each pass, `matmul` or `paddle`. Paddle's gradients need its own forward."""

    forward: str
    gradients: str

    def __str__(self) -> str:
        names = {"matmul": "matrix products", "paddle": "Paddle's own"}
        return f"forward by {names[self.forward]}, gradients by {names[self.gradients]}"


CHOICES = (Choice("paddle", "paddle"), Choice("paddle", "matmul"), Choice("matmul", "matmul"))
PADDLE, _, PRODUCTS = CHOICES

# By what a convolution is: of training with its shape and type, of evaluation with its channels,
# kernel and type, or with its shape where it was trained before the run was resumed.
_trained: dict[str, Choice] = {}
_evaluated: dict[str, Choice] = {}
_recorded: dict[str, Choice] = {}  # of the run that is resumed, both kinds


def choose(
    x: paddle.Tensor, weight: paddle.Tensor, memory_bytes: int | None, *, training: bool
) -> Choice:
    """Return the fastest choice for tensors like these; measure where none is known.

    In training every shape and type is measured, and rank 0's choice is that of all ranks, which
    must call this in the same order. In evaluation, where shapes may change from image to image and
    from rank to rank, a shape that training has not met takes the choice that was measured first
    for its channels, kernel and type.
    """
    what = f"kernel {weight.shape[-1]}, {type_name(x)}"
    exact = f"{'x'.join(map(str, x.shape))}, {what}"
    measured = (exact, x, weight, memory_bytes)
    if exact in _trained:
        return _trained[exact]
    if training:
        choice, is_possible = _measure(*measured, gradients=True, recorded=_recorded.get(exact))
        wanted = CHOICES.index(choice) if rank() == 0 else 0
        wanted, vetoes = sum_over_ranks([wanted, not is_possible])
        _trained[exact] = PADDLE if vetoes else CHOICES[round(wanted)]
        logger.info("depthwise convolution %s: %s", exact, _trained[exact])
        return _trained[exact]
    key = exact if exact in _recorded else f"{x.shape[1]} channels, {what}"
    if key not in _evaluated:
        _evaluated[key], _ = _measure(*measured, gradients=False, recorded=_recorded.get(key))
        logger.info("depthwise convolution %s in evaluation: %s", exact, _evaluated[key])
    return _evaluated[key]


def choices() -> dict[str, str]:
    """Return all choices of this run so far, for it to be resumed with."""
    return {what: " ".join(by) for what, by in (_recorded | _evaluated | _trained).items()}


def start_run(recorded: dict[str, str]) -> None:
    """Forget the choices of another run of this process; choose what `choices` returned, where it
    is still possible. What that says of other things is measured."""
    by_name = {" ".join(choice): choice for choice in CHOICES}
    for known in (_trained, _evaluated, _recorded):
        known.clear()
    _recorded.update({k: by_name[name] for k, name in recorded.items() if name in by_name})


def _measure(
    what, x, weight, memory_bytes: int | None, *, gradients: bool, recorded: Choice | None
) -> tuple[Choice, bool]:
    """Return the fastest choice on this device, or without timing the one that is recorded, and
    whether products are possible and right."""
    # Others' hooks for what the tape keeps are those of recomputation, which would measure again.
    gradients = gradients and not keeps_by_hooks()
    try:
        with paddle.no_grad(), without_autocast(x):
            x, weight = x.detach(), weight.detach()
            passes = _passes(x, weight, memory_bytes, gradients)
            _check_agreement(what, passes, _tolerance(x))
            if recorded is not None or is_deterministic():
                return recorded or PRODUCTS, True
            seconds = {
                name: {impl: _seconds(call) for impl, call in by.items()}
                for name, by in passes.items()
            }
    except InputError as error:  # no tiles fit into the memory allowed, or results deviate
        logger.warning("%s; using Paddle's own convolution", error)
        return PADDLE, False
    except MemoryError:
        logger.warning(
            "depthwise convolution %s: memory ran out while matrix products were tried; using "
            "Paddle's own convolution",
            what,
        )
        return PADDLE, False
    finally:
        # paddle.grad has run and removed the hook that makes O2's master gradients; entering any
        # autocast context registers it again.
        with without_autocast(x):
            pass
    for name, by in seconds.items():
        ours, theirs = 1e3 * by["matmul"], 1e3 * by["paddle"]
        logger.info(
            "depthwise convolution %s, %s: matrix products %.3f ms, Paddle's own %.3f ms",
            what,
            name,
            ours,
            theirs,
        )
    return _fastest(seconds), True


def _fastest(seconds: dict[str, dict[str, float]]) -> Choice:
    """Return the last of `CHOICES` that is faster by the margin than the one kept before it."""

    def total(choice: Choice) -> float:
        return sum(by[getattr(choice, name)] for name, by in seconds.items())

    kept = PADDLE
    for choice in CHOICES:
        if total(choice) < MARGIN * total(kept):
            kept = choice
    return kept


def _check_agreement(what, passes, tolerance: float) -> None:
    """Raise InputError where the implementations deviate."""
    for name, by in passes.items():
        deviation = _deviation(by["matmul"](), by["paddle"]())
        if not deviation <= tolerance:  # nor where it is NaN
            raise InputError(
                f"depthwise convolution {what}: matrix products deviate from Paddle's own by "
                f"{deviation:.2g} of the largest value ({name}; allowed: {tolerance:.2g})"
            )


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
        # As good as any other, and small enough for the sums of float16.
        dy = y.detach().astype("float32")
        dy = (dy / (dy.abs().max() + 1e-6)).astype(y.dtype)
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


def _seconds(call: Callable) -> float:
    """Return the median seconds that the GPU takes for a call that has been made before.

    The calls are queued behind other work, so that the time of the host, which in training is ahead
    of the GPU, does not count.
    """
    square = paddle.ones([4096, 4096], dtype="float32")
    start, end = (paddle.device.Event(enable_timing=True) for _ in range(2))
    seconds, products = [], 1
    while len(seconds) < REPEATS:
        for _ in range(products):
            paddle.matmul(square, square)
        start.record()
        for _ in range(CALLS):
            call()
        is_behind = not start.query()  # the GPU has not come to the calls yet
        end.record()
        end.synchronize()
        if is_behind or products == MOST_PRODUCTS:
            seconds.append(start.elapsed_time(end) / 1e3 / CALLS)
        else:
            products *= 2
    return statistics.median(seconds)


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
