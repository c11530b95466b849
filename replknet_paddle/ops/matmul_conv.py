"""Large-kernel depthwise convolution by matrix products, made of Paddle's own operations.

For GPUs, whose tensor cores do the products (docs/kernels.md); it computes on every device.
`matmul_plan` has the idea and the choice of tiles, this module the tensors. Values are of the
compute type, and products and sums are accumulated in float32. The gradients make the matrix T
again where no cache keeps it, and add the weight's up in a fixed order without atomic operations,
so that the same inputs give the same bits.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import paddle
from paddle.autograd import PyLayer
from paddle.nn import functional as F

from replknet_paddle.ops.dispatch import (
    apply_layer,
    as_one_operation,
    cast,
    is_on_cpu,
    large_kernel_depthwise_conv2d_reference,
    without_autocast,
)
from replknet_paddle.ops.matmul_plan import WORD_BYTES, Axis, Plan, make_plan, word_values

# F.pad is called with four numbers, left, right, top, bottom: programs with its other form, which
# is another operation, destroy memory in Paddle Inference 3.3.1.

# What a program that is captured for any batch size is planned for. Small, because programs make T
# each time they run, or keep it for all layers.
ASSUMED_BATCH = 1


@as_one_operation
def matmul_conv(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    memory_bytes: int | None,
    *,
    forward: str = "matmul",
    training: bool = True,
    cache=None,
) -> paddle.Tensor:
    """Return the depthwise convolution of x, in its type, with gradients.

    The weight is rounded to the type of x. `forward` is `matmul`, or `paddle` for Paddle's own
    convolution with gradients by products. `training` says whether a program that is being captured
    is to have these gradients: a program to export has no use for them. `cache` is the layer's
    `WeightCache`, if any.
    """
    needs = (not x.stop_gradient, not weight.stop_gradient)
    wanted = paddle.is_grad_enabled() and any(needs)
    if not paddle.in_dynamic_mode():
        needs, wanted = (True, True), training
    if not wanted:
        return _forward(x, weight, memory_bytes, forward, cache)
    return apply_layer(_MatmulConv, x, weight, memory_bytes, forward, needs, cache)


class _MatmulConv(PyLayer):
    """`matmul_conv` for the tape."""

    @staticmethod
    def forward(ctx, x, weight, memory_bytes, forward, needs, cache):
        ctx.save_for_backward(x, weight)
        ctx.memory_bytes = memory_bytes
        ctx.needs = needs
        ctx.cache = cache
        return _forward(x, weight, memory_bytes, forward, cache)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensor()
        return _gradients(x, weight, dy, ctx.memory_bytes, ctx.needs, ctx.cache)


@as_one_operation
def _forward(x, weight, memory_bytes, forward, cache):
    if forward == "paddle":
        return large_kernel_depthwise_conv2d_reference(x, weight)
    return convolve(x, weight, memory_bytes, cache=cache)


@as_one_operation
def _gradients(x, weight, dy, memory_bytes, needs, cache):
    with without_autocast(x):  # which would compute float32 ones in half precision
        dy, dx, dweight = cast(dy, x.dtype), None, None
        if needs[0]:
            dx = convolve(dy, weight, memory_bytes, flipped=True, cache=cache)
        if needs[1]:
            dweight = weight_gradient(x, dy, weight.shape[-1], memory_bytes)
            dweight = cast(dweight, weight.dtype)
        return dx, dweight


def convolve(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    memory_bytes: int | None,
    *,
    flipped: bool = False,
    cache=None,
) -> paddle.Tensor:
    """Return the convolution of x; with `flipped` the gradient by the input, x being that of y."""
    kept = None if cache is None else cache.matrices(x, weight, memory_bytes, flipped=flipped)
    plan = kept.plan if kept else plan_for("convolution", x, weight.shape[-1], memory_bytes)
    dtype, x = x.dtype, _compute_form(x)
    weight = _compute_form(cast(weight, dtype))
    parts = []
    for i, chunk in enumerate(_chunks(plan)):
        matrix = kept.of_chunks[i] if kept else _make_matrix(weight[chunk], plan, flipped)
        parts.append(_convolve_chunk(x, chunk, matrix, plan, dtype))
        del matrix
    y = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=1)
    return cast(y, dtype)


class Matrices(NamedTuple):
    """T of each chunk of channels, and the plan that it is for."""

    plan: Plan
    of_chunks: list[paddle.Tensor]


def make_matrices(plan: Plan, weight: paddle.Tensor, dtype, flipped: bool) -> Matrices:
    """Return T of a weight rounded to the type `dtype`."""
    weight = _compute_form(cast(weight, dtype))
    return Matrices(plan, [_make_matrix(weight[chunk], plan, flipped) for chunk in _chunks(plan)])


def weight_gradient(
    x: paddle.Tensor, dy: paddle.Tensor, kernel: int, memory_bytes: int | None
) -> paddle.Tensor:
    """Return the gradient by the weight, float32 (C, 1, K, K), of the convolution of x."""
    plan = plan_for("weight gradient", x, kernel, memory_bytes)
    dtype, x, dy = x.dtype, _compute_form(x), _compute_form(dy)
    parts = [_weight_gradient_chunk(x, dy, chunk, plan, dtype) for chunk in _chunks(plan)]
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)


def add_bias(y: paddle.Tensor, bias: paddle.Tensor) -> paddle.Tensor:
    """(N, C, H, W) and (C,) -> their sum in the type of y."""
    biased = _compute_form(y) + _compute_form(cast(bias, y.dtype)).reshape([1, -1, 1, 1])
    return cast(biased, y.dtype)


def memory_of(memory_bytes: int | None) -> int:
    """Return what products may use here; by default a 32nd of a GPU's memory, 512 MiB on CPU."""
    return memory_bytes or _default_memory_bytes(paddle.device.get_device())


@lru_cache
def _default_memory_bytes(device: str) -> int:
    if device == "cpu":
        return 512 * 2**20
    return paddle.device.cuda.get_device_properties(device).total_memory // 32


def plan_for(kind: str, x: paddle.Tensor, kernel: int, memory_bytes: int | None) -> Plan:
    """Return the plan of a pass over a tensor of the shape and type of x."""
    batch, *rest = x.shape
    itemsize = 4 if x.dtype == paddle.float32 else 2
    batch = ASSUMED_BATCH if batch == -1 else batch
    return make_plan(kind, (batch, *rest, kernel), itemsize, memory_of(memory_bytes))


def _chunks(plan: Plan) -> list[slice]:
    starts = range(0, plan.channels, plan.chunk)
    return [slice(start, min(start + plan.chunk, plan.channels)) for start in starts]


def _compute_form(x):
    """Return x in a type that the device computes in; Paddle's CPU kernels lack half precision."""
    return cast(x, paddle.float32) if is_on_cpu(x) else x


def _rounded(x, dtype):
    """Return x rounded to the compute type, where the device does not do so itself."""
    return x if x.dtype == dtype or not is_on_cpu(x) else x.astype(dtype).astype(x.dtype)


def _make_matrix(weight, plan: Plan, flipped: bool):
    """Kernels (C, 1, K, K) -> T (C, s t, r q)."""
    rows, columns = plan.rows, plan.columns
    channels, _, kernel, _ = weight.shape
    taps = F.pad(weight, [0, 1, 0, 1]).reshape([channels, kernel + 1, kernel + 1])
    strips = _select(taps, 2, _matrix_columns, columns, flipped)  # (C, K + 1, t q)
    strips = strips.reshape([channels, kernel + 1, columns.tile, columns.window])
    strips = _reordered(strips, [0, 2, 1, 3]).reshape([channels, -1, columns.window])
    matrix = _select_rows(strips, 1, _matrix_rows, rows, columns.tile, flipped)  # (C, s t r, q)
    outputs, inputs = rows.tile * columns.tile, rows.window * columns.window
    return matrix.reshape([channels, outputs, inputs])


def _channels_first(x, channels: slice):
    """Maps (N, C, H, W) -> those of some channels (C', N, H, W)."""
    *_, height, width = x.shape
    planes = _in_words(
        lambda planes, _: planes[:, channels].transpose([1, 0, 2]),
        x.reshape([0, 0, height * width]),
    )
    return planes.reshape([0, 0, height, width])


def _padded(x, left: int, right: int, top: int, bottom: int):
    """Return maps with zeros around them."""
    if not any((left, right, top, bottom)):
        return x
    return _in_words(lambda x, n: F.pad(x, [left // n, right // n, top, bottom]), x, left, right)


def _cut(x, chunk: slice, plan: Plan):
    """Maps (N, C, H, W) -> windows (C', N n, r q) of a chunk of channels."""
    rows, columns = plan.rows, plan.columns
    x = _channels_first(x, chunk)
    channels = x.shape[0]
    x = _padded(x, *columns.padding, 0, 0)  # at first, which makes rows of whole words
    x = _padded(x, 0, 0, *rows.padding)
    if columns.count > 1:
        x = _in_words(
            lambda x, n: _select(x, 3, _window_positions, columns, n),
            x,
            columns.tile,
            columns.window,
        )
        x = x.reshape([channels, -1, rows.padded, columns.count, columns.window])
        x = _reordered(x, [0, 1, 3, 2, 4])
    x = x.reshape([channels, -1, rows.padded, columns.window])
    if rows.count > 1:
        x = _select_rows(x, 2, _window_positions, rows, 1)
    return x.reshape([channels, -1, rows.window * columns.window])


def _convolve_chunk(x, chunk, matrix, plan: Plan, dtype):
    rows, columns, channels = plan.rows, plan.columns, matrix.shape[0]
    y = _rounded(paddle.matmul(_cut(x, chunk, plan), matrix, transpose_y=True), dtype)
    if columns.count == 1:
        y = _reordered(y.reshape([channels, -1, rows.outputs * columns.tile]), [1, 0, 2])
    else:
        y = y.reshape([channels, -1, columns.count, rows.count, rows.tile, columns.tile])
        y = _reordered(y, [1, 0, 3, 4, 2, 5])  # (N, C, tiles, s, tiles, t)
    y = y.reshape([-1, channels, rows.outputs, columns.outputs])
    if (rows.outputs, columns.outputs) != (rows.size, columns.size):
        y = y[:, :, : rows.size, : columns.size]
    return y.contiguous() if paddle.in_dynamic_mode() else y


def _tiles(dy, chunk: slice, plan: Plan):
    """Maps (N, C, H, W) -> tiles (C', N n, s t) of a chunk of channels."""
    rows, columns = plan.rows, plan.columns
    dy = _channels_first(dy, chunk)
    channels = dy.shape[0]
    dy = _padded(dy, 0, columns.outputs - columns.size, 0, rows.outputs - rows.size)
    if columns.count > 1:
        dy = dy.reshape([channels, -1, rows.count, rows.tile, columns.count, columns.tile])
        dy = _reordered(dy, [0, 1, 4, 2, 3, 5])  # (C', N, tiles, tiles, s, t)
    return dy.reshape([channels, -1, rows.tile * columns.tile])


def _weight_gradient_chunk(x, dy, chunk, plan: Plan, dtype):
    rows, columns, kernel = plan.rows, plan.columns, plan.rows.kernel
    dmatrix = paddle.matmul(_tiles(dy, chunk, plan), _cut(x, chunk, plan), transpose_x=True)
    dmatrix = _rounded(dmatrix, dtype)
    channels = dmatrix.shape[0]
    dmatrix = dmatrix.reshape([channels, -1, columns.window])  # (C, s t r, q)
    dmatrix = _select_rows(dmatrix, 1, _row_diagonals, rows, columns.tile)
    dstrips = dmatrix.reshape([channels, rows.tile, -1]).sum(1, dtype=paddle.float32)
    del dmatrix
    dstrips = dstrips.reshape([channels, columns.tile, kernel, columns.window])
    dstrips = _reordered(dstrips, [0, 2, 1, 3]).reshape([channels, kernel, -1])
    dtaps = _select(dstrips, 2, _column_diagonals, columns)
    return dtaps.reshape([channels, 1, kernel, kernel, columns.tile]).sum(4)


# Words of several values, in which values are moved about; see matmul_plan.py.

WORDS = {4: "int32", 8: "int64"}  # by their bytes; autocasting leaves integers alone


def _in_words(move: Callable, x, *lengths: int):
    """Return move(x, 1), computed as move(x in words, values of a word), as contiguous values.

    `move` only moves what it gets along the last axis, and makes zeros: words hold values of
    another type side by side. They consist of as many as the last axis and `lengths` allow.
    """
    values = _word_values(x, *lengths)
    if values > 1:
        words = x.view(WORDS[values * x.element_size()])
        return move(words, values).contiguous().view(x.dtype)
    moved = move(x, 1)
    return moved.contiguous() if paddle.in_dynamic_mode() else moved


def _word_values(x, *lengths: int) -> int:
    """Return how many values of x a word may have; 1 in programs, and where gradients of the
    movement itself may be asked for."""
    if not paddle.in_dynamic_mode() or paddle.is_grad_enabled() and not x.stop_gradient:
        return 1
    # Paddle 3.1 to 3.3 misplaces a view of another type where x does not begin its memory. Memory
    # that others have given may begin anywhere.
    if x.offset != 0 or x.data_ptr() % WORD_BYTES or not x.is_contiguous():
        return 1
    return word_values(x.element_size(), x.shape[-1], *lengths)


def _reordered(x, axes: list[int]):
    """Return x with its axes, but for the last, in another order."""
    return _in_words(lambda x, _: x.transpose(axes), x)


# The index arrays. The kernel's taps have a zero after them: tap K.


def _matrix_columns(axis: Axis, flipped: bool):
    taps = axis.taps()
    return np.where(taps < axis.kernel, axis.kernel - 1 - taps, taps) if flipped else taps


def _matrix_rows(axis: Axis, strips: int, flipped: bool):
    starts = np.arange(strips)[:, None] * (axis.kernel + 1)
    return starts + _matrix_columns(axis, flipped)[:, None]


def _window_positions(axis: Axis, values: int):
    """Of words, where they have several values."""
    tile, window = axis.tile // values, axis.window // values
    return np.arange(axis.count)[:, None] * tile + np.arange(window)


def _row_diagonals(axis: Axis, strips: int):
    starts = np.arange(axis.tile * strips).reshape([axis.tile, strips, 1]) * axis.window
    return starts + axis.positions()[:, None]


def _column_diagonals(axis: Axis):
    return (np.arange(axis.tile)[:, None] * axis.window + axis.positions()).T


def _select(x, axis: int, positions, *arguments):
    """Return x at the positions that a function above gives for its arguments, along an axis."""
    if paddle.in_dynamic_mode():
        index = _index_on_device(str(x.place), positions, *arguments)
    else:
        index = paddle.to_tensor(_index(positions, *arguments))
    return paddle.index_select(x, index, axis)


def _select_rows(x, axis: int, positions, *arguments):
    """Return what `_select` does along another axis than the last."""
    return _in_words(lambda x, _: _select(x, axis, positions, *arguments), x)


@lru_cache(maxsize=1024)
def _index(positions, *arguments) -> np.ndarray:
    return positions(*arguments).ravel().astype("int32")


@lru_cache(maxsize=1024)
def _index_on_device(place: str, positions, *arguments) -> paddle.Tensor:
    """Return the indices, kept, since a copy from the host waits for what the device has queued."""
    return paddle.to_tensor(_index(positions, *arguments))
