"""The rule that chooses tiles: what it takes for the published networks, and its arithmetic."""

import math
import re

import numpy as np
import pytest
from tiny import ROOT

from replknet_paddle.ops.matmul_plan import (
    ALIGNED_BYTES,
    PASSES,
    Axis,
    Plan,
    make_plan,
    word_values,
)
from replknet_paddle.runtime.errors import InputError

NETWORKS = {  # channels of the large kernels, and kernels, by stage
    "31B": ((128, 256, 512, 1024), (31, 29, 27, 13)),
    "31L": ((192, 384, 768, 1536), (31, 29, 27, 13)),
    "XL": ((384, 768, 1536, 3072), (27, 27, 27, 13)),
}
IMAGES = ((224, 224), (320, 320), (384, 384), (512, 2048), (1024, 1024))
STRIDES = (4, 8, 16, 32)


def stages(network, image):
    for channels, kernel, stride in zip(*NETWORKS[network], STRIDES):
        yield channels, image[0] // stride, image[1] // stride, kernel


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_stage_has_tiles_of_whole_words_within_the_memory_allowed(
    network, image, batch, itemsize
):
    memory = 2**29
    for kind in PASSES:
        for shape in stages(network, image):
            plan = make_plan(kind, (batch, *shape), itemsize, memory)
            matrix_bytes = plan.itemsize * plan.chunk * plan.matrix_values
            assert matrix_bytes <= plan.scratch_bytes <= memory, plan
            assert plan.chunk == plan.channels or 2 * plan.scratch_bytes > memory / 2
            rows, columns = plan.rows, plan.columns
            along = [columns.window, columns.padded]
            along += [columns.tile, columns.padding[0]] if columns.count > 1 else []
            assert word_values(itemsize, *along) == 8 // itemsize
            assert itemsize * rows.window * columns.window % ALIGNED_BYTES == 0
            # A tile needs at least its own inputs, and at most those of a tile of one pixel.
            useful = useful_flops(batch, *shape)
            assert useful <= plan.flops < 40 * useful, plan


def useful_flops(batch, channels, height, width, kernel):
    """Two for each tap inside the map."""
    taps = (
        np.convolve(np.ones(side), np.ones(kernel))[kernel // 2 :][:side].sum()
        for side in (height, width)
    )
    return 2 * batch * channels * math.prod(taps)


def axes(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size, kernel = int(rng.integers(1, 40)), 2 * int(rng.integers(0, 20)) + 1
        spare, multiple = bool(rng.integers(2)), int(rng.choice([1, 2, 4, 8]))
        tile = int(rng.integers(1, size + 1))
        yield Axis.of(size, kernel, tile, spare=spare, multiple=multiple), multiple


def meetings(axis):
    """Tile, output of the tile, tap, and the pixel of the map there, by the definition."""
    for number in range(axis.count):
        for output in range(axis.tile):
            for tap in range(axis.kernel):
                yield number, output, tap, number * axis.tile + output + tap - axis.kernel // 2


@pytest.mark.parametrize("seed", range(3))
def test_windows_hold_all_that_a_tile_needs_and_no_more(seed):
    for axis, multiple in axes(40, seed):
        assert (axis.count - 1) * axis.tile < axis.size <= axis.outputs
        used, taps, positions = set(), axis.taps(), axis.positions()
        for number, output, tap, pixel in meetings(axis):
            if not 0 <= pixel < axis.size:
                continue
            position = positions[output, tap]
            assert taps[output, position] == tap
            assert number * axis.tile + position - axis.padding[0] == pixel
            assert number * axis.tile + axis.window <= axis.padded
            used.add(position)
        assert (axis.window % multiple, axis.padding[0] % multiple) == (0, 0)
        bare = Axis.of(axis.size, axis.kernel, axis.tile, spare=False)
        assert len(used) == bare.window, axis
        assert axis.window >= bare.window


@pytest.mark.parametrize("seed", range(3))
def test_taps_outside_a_window_are_sent_to_a_position_that_is_always_zero(seed):
    for axis, multiple in axes(60, seed):
        spare = Axis.of(axis.size, axis.kernel, axis.tile, spare=True, multiple=multiple)
        positions = spare.positions()
        for number, output, tap, pixel in meetings(spare):
            position = positions[output, tap]
            there = number * spare.tile + position - spare.padding[0]
            assert there == pixel or not (0 <= there < spare.size or 0 <= pixel < spare.size)


def test_small_batches_take_smaller_matrices():
    """T does not depend on the batch, so that it must be cheap where there are few images."""
    few = make_plan("convolution", (1, 512, 14, 14, 27), 2, 2**29)
    many = make_plan("convolution", (64, 512, 14, 14, 27), 2, 2**29)
    assert many.tiles == 1 and 3 * few.matrix_values < many.matrix_values


@pytest.mark.parametrize("side", [56, 28, 14, 7])
def test_the_tiles_are_predicted_to_be_the_fastest_of_all_that_fit(side):
    shape, memory = (8, 64, side, side, 27), 2**24
    for kind in PASSES:
        best = make_plan(kind, shape, 2, memory)
        for height in range(1, side + 1):
            for width in {1, 2, 4, 5, side // 2, side}:
                rows = Axis.of(side, 27, height, spare=kind == PASSES[1])
                columns = Axis.of(side, 27, width, spare=kind == PASSES[1], multiple=8)
                other = Plan(kind, 8, 64, 2, rows, columns, 1)
                assert other.scratch_bytes > memory or other.seconds >= 0.999 * best.seconds


def test_less_memory_makes_chunks_of_channels_and_in_the_end_a_message():
    shape = (4, 64, 28, 28, 29)
    chunks = [make_plan("convolution", shape, 4, 2**n).chunk for n in (28, 24, 21)]
    assert chunks[0] == 64 and chunks == sorted(chunks, reverse=True) and chunks[-1] < 16
    with pytest.raises(InputError, match=r"1000 bytes.*at least \d+ \(MODEL.CONV_MEMORY_MB\)"):
        make_plan("convolution", shape, 4, 1000)


# Bytes and instructions per second, operations per second in half precision.
GPUS = {"A100": (1.3e12, 1.5e13, 2e14), "H100": (2.7e12, 2.4e13, 5.5e14)}
GPUS |= {"H200": (4.0e12, 2.4e13, 5.5e14)}


def predicted(plan, bandwidth, instructions, flops) -> float:
    """Seconds of a pass on a GPU, by the rule of docs/kernels.md."""
    sides = (plan.rows.tile * plan.columns.tile, plan.batch * plan.tiles)
    sides += (plan.rows.window * plan.columns.window,)
    products = 2 * math.prod(64 * math.ceil(side / 64) for side in sides) / flops
    moves = sum(
        max((step.read + step.written) / bandwidth, step.instructions / instructions)
        for step in plan.steps
    )
    return plan.channels * (products + moves)


def table_of_docs():
    """Rows of docs/kernels.md: network, height, width, batch, figures."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    pattern = r"\| (31B|31L|XL), (\d+)(?: x (\d+))?, batch (\d+) \| ([\d. |]+) \|\n"
    for network, height, width, batch, figures in re.findall(pattern, text):
        yield network, int(height), int(width or height), int(batch), figures.split(" | ")


def test_the_table_of_the_docs_is_what_the_model_predicts():
    rows = list(table_of_docs())
    assert len(rows) == 9
    for network, *image, batch, figures in rows:
        largest, sums, milliseconds = 0, np.zeros(3), np.zeros(3)
        for shape, layers in zip(stages(network, image), (2, 2, 18, 2)):
            for kind, passes in zip(PASSES, (2, 1)):
                plan = make_plan(kind, (batch, *shape), 2, 2**32)
                moved = (plan.bytes_moved, plan.instructions, plan.flops)
                sums += layers * passes * np.array(moved) / (1e9, 1e12, 1e12)
                seconds = [predicted(plan, *rates) for rates in GPUS.values()]
                assert seconds[0] == pytest.approx(plan.seconds)
                milliseconds += 1e3 * layers * passes * np.array(seconds)
                if kind == PASSES[0]:
                    largest = max(largest, 2e-6 * plan.matrix_values * plan.channels)
        for shown, figure in zip(figures, [largest, *sums, *milliseconds], strict=True):
            digits = len(shown.partition(".")[2])
            assert shown == f"{figure:.{digits}f}", (network, image, batch)
