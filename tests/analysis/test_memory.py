"""Counted memory against what Paddle holds between the forward and the backward pass."""

import gc

import paddle
import pytest
from paddle.base import core
from shapes_only import without_values
from tiny import ROOT

from replknet_paddle.analysis.complexity import count_macs
from replknet_paddle.analysis.memory import (
    FLOAT32_BYTES,
    HALF_BYTES,
    count_kept_elements,
    count_training_flop,
    count_weight_bytes,
)
from replknet_paddle.config import get_config
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.optim.ema import ModelEma

SIZES = {"large_kernel_sizes": [7, 7, 5, 5], "layers": [1, 1, 2, 1], "channels": [8, 16, 16, 32]}
IMAGE_SIZE = 96
IMAGE_ELEMENTS = 3 * IMAGE_SIZE**2


@pytest.fixture(autouse=True, scope="module")
def collect_what_is_new():
    """What other modules have made stays as it is: going through it again and again takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def allocated_bytes() -> int:
    """What Paddle's allocator has given out on the CPU."""
    gc.collect()
    return core.host_memory_stat_current_value("Allocated", 0)


def held_elements(model, images: int) -> float:
    """Float32 numbers that a forward pass leaves behind for its backward pass."""
    batch = paddle.zeros([images, 3, IMAGE_SIZE, IMAGE_SIZE])
    before = allocated_bytes()
    logits = model(batch)
    held = allocated_bytes() - before
    del logits
    return held / FLOAT32_BYTES


def held_for_an_image(model) -> float:
    """By the difference of two batches, in which statistics of whole batches cancel out."""
    model.train()
    return (held_elements(model, 4) - held_elements(model, 2)) / 2


# Beside what is counted, Paddle holds the logits and the masks of stochastic depth.
UNCOUNTED = 1e-3


@pytest.mark.parametrize("small_kernel", [5, None])
@pytest.mark.parametrize("drop_path_rate", [0.3, 0.0])
@pytest.mark.parametrize("dw_ratio", [1.0, 1.5])
def test_what_is_counted_is_what_paddle_holds(small_kernel, drop_path_rate, dw_ratio):
    model = RepLKNet(
        **SIZES,
        num_classes=10,
        small_kernel=small_kernel,
        drop_path_rate=drop_path_rate,
        dw_ratio=dw_ratio,
    )
    counted = count_kept_elements(model, IMAGE_SIZE) - IMAGE_ELEMENTS
    assert held_for_an_image(model) == pytest.approx(counted, rel=UNCOUNTED)


def test_recomputation_keeps_the_outputs_of_blocks_and_needs_one_block_at_a_time():
    model = RepLKNet(**SIZES, num_classes=10, drop_path_rate=0.3, recompute=True)
    counted = count_kept_elements(model, IMAGE_SIZE, recompute=True) - IMAGE_ELEMENTS
    # The first ConvFFN needs most: two maps of 8 channels (its rate of stochastic depth is 0), and
    # three of 32, at a quarter of the image's side.
    largest = (2 * 8 + 3 * 32) * (IMAGE_SIZE // 4) ** 2
    assert held_for_an_image(model) == pytest.approx(counted - largest, rel=UNCOUNTED)
    assert counted < count_kept_elements(model, IMAGE_SIZE) - IMAGE_ELEMENTS


def test_weights_and_optimizer_state_are_what_paddle_holds():
    before = allocated_bytes()
    model = RepLKNet(**SIZES, num_classes=1000)
    ema = ModelEma(model, decay=0.9)
    optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
    model(paddle.zeros([1, 3, 32, 32])).sum().backward()
    optimizer.step()
    held = allocated_bytes() - before
    counted = count_weight_bytes(model, ema=True)
    # Beside: running statistics and their average, AdamW's powers of beta, and rounding up of each
    # tensor to 64 bytes: all of them per tensor or per channel, and this network is a small one.
    # One copy of the weights more or less, of five, is outside of this range.
    assert counted < held < 1.25 * counted
    assert counted - count_weight_bytes(model) == 4 * sum(
        p.size for p in model.parameters() if not p.stop_gradient
    )
    del ema, optimizer


def test_computation_is_three_forward_passes_or_four():
    model = RepLKNet(**SIZES, num_classes=10)
    macs = count_macs(model, IMAGE_SIZE)
    assert count_training_flop(model, IMAGE_SIZE) == 6 * macs
    backbone = RepLKNet(**{**SIZES, "layers": [1, 1, 1, 1]}, num_classes=10)
    twice = RepLKNet(**{**SIZES, "layers": [2, 2, 2, 2]}, num_classes=10)
    blocks = count_macs(twice, IMAGE_SIZE) - count_macs(backbone, IMAGE_SIZE)
    again = count_training_flop(backbone, IMAGE_SIZE, recompute=True)
    assert again - count_training_flop(backbone, IMAGE_SIZE) == 2 * blocks


def test_a_merged_network_is_refused():
    model = RepLKNet(**SIZES, num_classes=10)
    model.structural_reparam()
    with pytest.raises(ValueError, match="merged"):
        count_kept_elements(model, IMAGE_SIZE)


# ---- docs/memory.md

ROWS = {
    "RepLKNet-31B": ("replknet_31b", (224, 384)),
    "RepLKNet-31L": ("replknet_31l_22k1k_384", (384,)),
    "RepLKNet-XL": ("replknet_xl", (320,)),
}


def rows_of(name: str, model, size: int) -> list[str]:
    """The rows of a network in the page's two tables."""
    kept = [
        count_kept_elements(model, size, recompute=recompute) * each / 2**20
        for recompute in (False, True)
        for each in (FLOAT32_BYTES, HALF_BYTES)
    ]
    weights = [count_weight_bytes(model, half=half, ema=True) / 2**30 for half in (False, True)]
    flop = [count_training_flop(model, size, recompute=r) / 1e9 for r in (False, True)]
    cells = [f"{value:,.0f}" for value in kept] + [f"{value:.1f}" for value in weights]
    cost = [f"{value:,.0f}" for value in flop]
    return [f"| {name}, {size} | {' | '.join(part)} |" for part in (cells, cost)]


@pytest.mark.parametrize("name", ROWS)
def test_the_tables_of_the_docs_are_what_is_counted(name):
    file, sizes = ROWS[name]
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()
    model = without_values(build_replknet, get_config(ROOT / "configs" / f"{file}.yaml"))
    for size in sizes:
        for row in rows_of(name, model, size):
            assert row in page, row
