"""Tiles of a depthwise convolution by matrix products: which, how much memory, how many operations.

Cut the output into tiles of s x t pixels. A tile needs a window of r x q inputs, and all tiles of a
channel share one matrix T of (s t) x (r q) values: row (i, j) holds the kernel where output (i, j)
of a tile meets the window, and zeros elsewhere. N images of n tiles make one batched product over
the channels:

    windows (C, N n, r q) x T (C, s t, r q)^T -> outputs (C, N n, s t)

The gradient by the weight adds up the diagonals of outputs^T x windows, which has the shape of T.
Larger tiles use their windows better and have a larger T; `make_plan` takes the tiles of the lowest
cost that fit into memory. docs/kernels.md has the cost model and what it predicts.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from replknet_paddle.runtime.errors import InputError

DEFAULT_MEMORY_BYTES = 512 * 2**20
PASSES = ("convolution", "weight gradient")

# Floating-point operations in the time that one value takes to or from memory. An A100 reaches
# about 200 TFLOP/s in half precision, 100 in TF32, and 1.3 TB/s: 300 for 2 bytes and for 4.
FLOPS_PER_VALUE = 300
# Products are computed in blocks of this side; an incomplete block costs as much as a whole one.
BLOCK = 64
# Rows of windows and of T start at multiples of this, as fast loads need.
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Axis:
    """The tiles along one axis of a map; lengths are pixels."""

    size: int
    kernel: int
    tile: int  # outputs of a tile
    count: int  # tiles; the last may reach beyond the map
    # A tile's window begins at this one of the tile + kernel - 1 inputs around it; those before lie
    # outside the map for every tile.
    first: int
    window: int  # inputs of a window
    # A position of the window that is zero for every tile; -1 without `spare`, and where windows
    # hold all inputs around their tile.
    zero: int

    @classmethod
    def of(cls, size: int, kernel: int, tile: int, *, spare: bool, multiple: int = 1) -> "Axis":
        """Return tiles of `tile` outputs, with a `zero` if `spare`; `window` is a `multiple`."""
        half, count = kernel // 2, -(-size // tile)
        around = tile + kernel - 1
        first, end, zero = max(0, half - (count - 1) * tile), min(around, half + size), -1
        if spare and first > 0:
            first, zero = first - 1, 0
        elif spare and end < around:
            end, zero = end + 1, end - first
        window = -(-(end - first) // multiple) * multiple
        return cls(size, kernel, tile, count, first, window, zero)

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

    # Of one channel, in values: windows; maps cut into windows along rows only, 0 where that is not
    # done; the kernel laid out along rows, T for tiles of one row; padded maps; outputs, those
    # beyond the map included.

    @property
    def window_values(self) -> int:
        return self.batch * self.tiles * self.rows.window * self.columns.window

    @property
    def strip_values(self) -> int:
        strips = self.columns.count * self.columns.window
        return self.batch * self.rows.padded * strips if self.columns.count > 1 else 0

    @property
    def kernel_strip_values(self) -> int:
        return self.columns.tile * (self.rows.kernel + 1) * self.columns.window

    @property
    def map_values(self) -> int:
        return self.batch * self.rows.padded * self.columns.padded

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
        return self.itemsize * self.channels * self._values_moved

    @property
    def _values_moved(self) -> int:
        """For one channel: each array, as often as an operation writes or reads it."""
        windows = 4 * self.map_values + 4 * self.strip_values + 3 * self.window_values
        if self.kind == "convolution":
            # T and outputs: made, used; the outputs put in order.
            matrix = 2 * self.matrix_values + 5 * self.kernel_strip_values
            return matrix + windows + 3 * self.output_values
        # T's gradient: made, its diagonals put in order, added up in float32.
        matrix = 4 * self.matrix_values + 12 * self.kernel_strip_values
        return matrix + windows + 4 * self.output_values

    @property
    def cost(self) -> float:
        """What the choice of tiles minimizes: the time of one channel, in values moved."""
        operations = 2.0
        for side in (
            self.rows.tile * self.columns.tile,
            self.batch * self.tiles,
            self.rows.window * self.columns.window,
        ):
            operations *= -(-side // BLOCK) * BLOCK
        return self._values_moved + operations / FLOPS_PER_VALUE

    @property
    def scratch_bytes(self) -> int:
        """The most memory in use at a time beside inputs and outputs."""
        cutting = self.window_values + max(
            2 * self.map_values, self.map_values + self.strip_values, 2 * self.strip_values
        )
        if self.kind == "convolution":
            multiplying = self.window_values + self.output_values
            making = max(2 * self.kernel_strip_values, cutting, multiplying)
            values = max(self.matrix_values + making, 3 * self.output_values)
            return self.chunk * self.itemsize * values
        multiplying = self.window_values + self.matrix_values
        products = self.itemsize * (2 * self.output_values + max(cutting, multiplying))
        adding = self.itemsize * (2 * self.matrix_values + self.kernel_strip_values)
        ordering = 3 * 4 * self.kernel_strip_values
        return self.chunk * max(products, adding, ordering)


@lru_cache(maxsize=4096)
def make_plan(
    kind: str,
    shape: tuple[int, int, int, int, int],
    itemsize: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Plan:
    """Return the plan of the lowest cost whose `scratch_bytes` are at most `memory_bytes`.

    It depends on the arguments alone, so that all processes of a run use the same. `shape` is
    (N, C, H, W, K). InputError where no tiles fit, not even for one channel at a time.
    """
    batch, channels, height, width, kernel = shape
    spare = kind == "weight gradient"
    best, least = None, math.inf
    for tile_height in _tile_sizes(height):
        rows = Axis.of(height, kernel, tile_height, spare=spare)
        multiple = ALIGNED_BYTES // itemsize
        multiple //= math.gcd(rows.window, multiple)
        for tile_width in _tile_sizes(width):
            columns = Axis.of(width, kernel, tile_width, spare=spare, multiple=multiple)
            plan = Plan(kind, batch, channels, itemsize, rows, columns, 1)
            least = min(least, plan.scratch_bytes)
            if plan.scratch_bytes <= memory_bytes and (best is None or plan.cost < best.cost):
                best = plan
    if best is None:
        raise InputError(
            f"depthwise convolution of {batch}x{channels}x{height}x{width}, kernel {kernel}, by "
            f"matrix products: {memory_bytes} bytes of memory allowed; allowed for this shape: at "
            f"least {least} (MODEL.CONV_MEMORY_MB), or a smaller batch"
        )
    chunks = -(-channels // (memory_bytes // best.scratch_bytes))
    return replace(best, chunk=-(-channels // chunks))


def _tile_sizes(size: int) -> list[int]:
    """Return the sizes that cut `size` into 1, 2, 3, ... tiles of about one size."""
    return sorted({-(-size // count) for count in range(1, size + 1)})
