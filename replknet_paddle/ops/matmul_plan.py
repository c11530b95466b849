"""Tiles of a depthwise convolution by matrix products: which, how much memory, how many operations.

Cut the output into tiles of s x t pixels. A tile needs a window of r x q inputs, and all tiles of a
channel share one matrix T of (s t) x (r q) values: row (i, j) holds the kernel where output (i, j)
of a tile meets the window, and zeros elsewhere. N images of n tiles make one batched product over
the channels:

    windows (C, N n, r q) x T (C, s t, r q)^T -> outputs (C, N n, s t)

The gradient by the weight adds up the diagonals of outputs^T x windows, which has the shape of T.
Larger tiles use their windows better and have a larger T; `make_plan` takes the tiles that are
predicted to be fastest of those that fit into memory. docs/kernels.md has what the model predicts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from replknet_paddle.runtime.errors import InputError

PASSES = ("convolution", "weight gradient")

# What an A100 reaches: bytes to and from memory, instructions of single threads, and operations of
# products of values of 2 bytes, and of 4 (TF32).
BYTES_PER_SECOND = 1.3e12
INSTRUCTIONS_PER_SECOND = 1.5e13
FLOPS_PER_SECOND = {2: 200e12, 4: 100e12}

# Paddle's kernels that move values about spend so many instructions on each, whatever its type: of
# `index_select`, `pad` and a transposed copy, in the machine code of Paddle 3.
GATHER, PAD, REORDER = 118, 122, 145
# So values are moved in words of this many bytes where they lie side by side, and the columns of
# tiles and windows are multiples of so many values.
WORD_BYTES = 8
MULTIPLE = 4

# Products are computed in blocks of this side; an incomplete block costs as much as a whole one.
BLOCK = 64
# Rows of windows and of T start at multiples of this, as fast loads need.
ALIGNED_BYTES = 16


def word_values(itemsize: int, *lengths: int) -> int:
    """Return how many values a word may have of which `lengths`, in values, are made of whole ones:
    1, 2 or 4, of `itemsize` bytes each."""
    return math.gcd(WORD_BYTES // itemsize, *lengths)


@dataclass(frozen=True)
class Axis:
    """The tiles along one axis of a map; lengths are pixels."""

    size: int
    kernel: int
    tile: int  # outputs of a tile
    count: int  # tiles; the last may reach beyond the map
    # A tile's window begins at this one of the tile + kernel - 1 inputs around it, or before them;
    # of those, the ones before the window lie outside the map for every tile.
    first: int
    window: int  # inputs of a window
    # A position of the window that is zero for every tile; -1 without `spare`, and where windows
    # hold all inputs around their tile.
    zero: int

    @classmethod
    def of(cls, size: int, kernel: int, tile: int, *, spare: bool, multiple: int = 1) -> "Axis":
        """Return tiles of `tile` outputs, with a `zero` if `spare`; `multiple` divides the length
        of the windows and the zeros before the map."""
        half, count = kernel // 2, -(-size // tile)
        around = tile + kernel - 1
        first, end, zero = max(0, half - (count - 1) * tile), min(around, half + size), None
        if spare and end < around:
            end, zero = end + 1, end
        elif spare and first > 0:
            first, zero = first - 1, first - 1
        first -= (first - half) % multiple
        window = -(-(end - first) // multiple) * multiple
        return cls(size, kernel, tile, count, first, window, -1 if zero is None else zero - first)

    @property
    def outputs(self) -> int:
        """Outputs of all tiles; at least `size`."""
        return self.count * self.tile

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros before and after the map that windows reach into."""
        before = self.kernel // 2 - self.first
        after = (self.count - 1) * self.tile + self.window - before - self.size
        return before, max(0, after)

    @property
    def padded(self) -> int:
        """`size` with its padding."""
        return self.size + sum(self.padding)

    def taps(self) -> np.ndarray:
        """Return (tile, window): the tap between an output and a position; `kernel` for none."""
        taps = np.arange(self.window) + self.first - np.arange(self.tile)[:, None]
        return np.where((taps >= 0) & (taps < self.kernel), taps, self.kernel)

    def positions(self) -> np.ndarray:
        """Return (tile, kernel): where in its window an output meets a tap; `zero` if outside."""
        positions = np.arange(self.kernel) - self.first + np.arange(self.tile)[:, None]
        return np.where((positions >= 0) & (positions < self.window), positions, self.zero)


@dataclass(frozen=True)
class Plan:
    """How one pass of a layer is computed."""

    kind: str  # one of `PASSES`; the gradient by the input is a convolution, too
    batch: int
    channels: int
    itemsize: int  # bytes of a value
    rows: Axis
    columns: Axis
    chunk: int  # channels that are computed at a time

    @property
    def tiles(self) -> int:
        """Of an image."""
        return self.rows.count * self.columns.count

    @property
    def matrix_values(self) -> int:
        """Size of one channel's T."""
        return self.rows.tile * self.columns.tile * self.rows.window * self.columns.window

    # Of one channel, in values: windows; maps cut into windows along rows only; the kernel laid out
    # along rows, which is T for tiles of one row; the diagonals of T's gradient; maps; outputs,
    # those beyond the map included.

    @property
    def window_values(self) -> int:
        return self.batch * self.tiles * self.rows.window * self.columns.window

    @property
    def strip_values(self) -> int:
        return self.batch * self.rows.padded * self.columns.count * self.columns.window

    @property
    def kernel_strip_values(self) -> int:
        return self.columns.tile * (self.rows.kernel + 1) * self.columns.window

    @property
    def diagonal_values(self) -> int:
        return self.rows.tile * self.columns.tile * self.rows.kernel * self.columns.window

    @property
    def map_values(self) -> int:
        return self.batch * self.rows.size * self.columns.size

    @property
    def output_values(self) -> int:
        return self.batch * self.rows.outputs * self.columns.outputs

    @property
    def flops(self) -> int:
        """Floating-point operations of the products, two for each multiply-add."""
        return 2 * self.channels * self.matrix_values * self.batch * self.tiles

    @property
    def bytes_moved(self) -> int:
        """Bytes that all operations of this pass read from and write to memory."""
        return self.channels * sum(step.read + step.written for step in self.steps)

    @property
    def instructions(self) -> float:
        """Instructions of single threads of all operations of this pass but the products."""
        return self.channels * sum(step.instructions for step in self.steps)

    @property
    def seconds(self) -> float:
        """Predicted time on an A100, which the choice of tiles minimizes."""
        operations = 2.0
        for side in (
            self.rows.tile * self.columns.tile,
            self.batch * self.tiles,
            self.rows.window * self.columns.window,
        ):
            operations *= -(-side // BLOCK) * BLOCK
        products = operations / FLOPS_PER_SECOND[self.itemsize]
        return self.channels * (products + sum(step.seconds for step in self.steps))

    @property
    def steps(self) -> list["Step"]:
        """What the operations of this pass do for one channel, in their order."""
        rows, columns = self.rows, self.columns
        cut, out = list(self._cutting()), self.output_values
        product = {"read": self.itemsize * (self.matrix_values + self.window_values)}
        # Where one tile is as wide as the map, its rows lie one after the other in both.
        inner = columns.tile if columns.count > 1 else rows.outputs * columns.tile
        if self.kind == "convolution":
            steps = [
                self._moved((rows.kernel + 1) ** 2, PAD, 1),
                self._moved(self.kernel_strip_values, GATHER, 1),
                self._moved(self.kernel_strip_values, REORDER, columns.window),
                self._moved(self.matrix_values, GATHER, columns.window),
                *cut,
                Step(**product, written=self.itemsize * out),
                self._moved(out, REORDER, inner),
            ]
            return steps + [self._moved(self.map_values, REORDER, 1)] * (out > self.map_values)
        steps = [self._moved(self.map_values, REORDER, rows.size * columns.size)]
        if out > self.map_values:
            steps.append(self._moved(out, PAD, columns.size, columns.outputs))
        if columns.count > 1:
            steps.append(self._moved(out, REORDER, columns.tile))
        strips = columns.tile * rows.kernel * columns.window
        taps = columns.tile * rows.kernel**2
        return [
            *steps,
            *cut,
            Step(**product, written=self.itemsize * self.matrix_values),
            self._moved(self.diagonal_values, GATHER, columns.window),
            # Made float32, and added up.
            Step(read=(self.itemsize + 4) * self.diagonal_values, written=4 * self.diagonal_values),
            self._moved(strips, REORDER, columns.window, itemsize=4),
            self._moved(taps, GATHER, 1, itemsize=4),
        ]

    def _cutting(self) -> Iterator["Step"]:
        """From maps to windows."""
        rows, columns = self.rows, self.columns
        yield self._moved(self.map_values, REORDER, rows.size * columns.size)
        if any(columns.padding):
            wider = self.batch * rows.size * columns.padded
            yield self._moved(wider, PAD, columns.size, *columns.padding)
        if any(rows.padding):
            yield self._moved(self.batch * rows.padded * columns.padded, PAD, columns.padded)
        if columns.count > 1:
            along = (columns.tile, columns.window, columns.padded)
            yield self._moved(self.strip_values, GATHER, *along)
            yield self._moved(self.strip_values, REORDER, columns.window)
        if rows.count > 1:
            yield self._moved(self.window_values, GATHER, columns.window)

    def _moved(self, values: int, instructions: int, *lengths: int, itemsize: int = 0) -> "Step":
        """Values of `itemsize` bytes that are moved in words."""
        itemsize = itemsize or self.itemsize
        words = values / word_values(itemsize, *lengths)
        return Step(itemsize * values, itemsize * values, instructions * words)

    @property
    def scratch_bytes(self) -> int:
        """The most memory in use at a time beside inputs and outputs."""
        cut = [step.written for step in self._cutting()]
        cutting, windows = max(map(sum, zip([0, *cut], cut))), cut[-1]
        matrix, out = self.itemsize * self.matrix_values, self.itemsize * self.output_values
        strips = self.itemsize * self.kernel_strip_values
        if self.kind == "convolution":
            making = max(2 * strips, cutting, windows + out, 2 * out)
            return self.chunk * max(matrix + making, 3 * out)
        products = 2 * out + max(cutting, windows + matrix)
        diagonals, strips = self.diagonal_values, 4 * self.kernel_strip_values
        adding = max(self.itemsize * (self.matrix_values + diagonals), 8 * diagonals)
        return self.chunk * max(products, adding + strips, 3 * strips)


class Step(NamedTuple):
    """What one operation does."""

    read: int  # bytes
    written: int  # bytes
    instructions: float = 0.0

    @property
    def seconds(self) -> float:
        """Predicted time on an A100."""
        bandwidth_bound = (self.read + self.written) / BYTES_PER_SECOND
        return max(bandwidth_bound, self.instructions / INSTRUCTIONS_PER_SECOND)


@lru_cache(maxsize=4096)
def make_plan(
    kind: str,
    shape: tuple[int, int, int, int, int],
    itemsize: int,
    memory_bytes: int,
) -> Plan:
    """Return the fastest plan whose `scratch_bytes` are at most `memory_bytes`.

    It depends on the arguments alone, so that all processes of a run use the same. `shape` is
    (N, C, H, W, K). InputError where no tiles fit, not even for one channel at a time.
    """
    batch, channels, height, width, kernel = shape
    spare = kind == "weight gradient"
    best, least = None, math.inf
    for tile_height in _tile_sizes(height):
        rows = Axis.of(height, kernel, tile_height, spare=spare)
        multiple = ALIGNED_BYTES // itemsize
        multiple = max(MULTIPLE, multiple // math.gcd(rows.window, multiple))
        for tile_width in _tile_sizes(width, MULTIPLE):
            columns = Axis.of(width, kernel, tile_width, spare=spare, multiple=multiple)
            plan = Plan(kind, batch, channels, itemsize, rows, columns, 1)
            least = min(least, plan.scratch_bytes)
            is_possible = plan.scratch_bytes <= memory_bytes
            if is_possible and (best is None or plan.seconds < best.seconds):
                best = plan
    if best is None:
        raise InputError(
            f"depthwise convolution of {batch}x{channels}x{height}x{width}, kernel {kernel}, by "
            f"matrix products: {memory_bytes} bytes of memory allowed; allowed for this shape: at "
            f"least {least} (MODEL.CONV_MEMORY_MB), or a smaller batch"
        )
    chunks = -(-channels // (memory_bytes // best.scratch_bytes))
    return replace(best, chunk=-(-channels // chunks))


def _tile_sizes(size: int, multiple: int = 1) -> list[int]:
    """Return the sizes that cut `size` into 1, 2, 3, ... tiles of about one size, which are
    multiples where there are several."""
    sizes = (-(-size // count) for count in range(1, size + 1))
    return sorted({min(size, -(-tile // multiple) * multiple) for tile in sizes})
