"""The five published models: parameters and multiply-adds, against the published figures."""

import argparse

import paddle
import pytest
from shapes_only import without_values
from tiny import ROOT

from replknet_paddle.analysis.costs import count_macs, count_parameters
from replknet_paddle.config import get_config, update_config
from replknet_paddle.segmentation.upernet import build_upernet

# YAML file: million parameters, thousand million multiply-adds, input (official repository).
ROWS = {
    "upernet_31b_cityscapes_769": (110, 2315, (1024, 2048)),
    "upernet_31b_ade20k_512": (112, 1170, (512, 2048)),
    "upernet_31b_22k_ade20k_640": (112, 1829, (640, 2560)),
    "upernet_31l_22k_ade20k_640": (207, 2404, (640, 2560)),
    "upernet_xl_ade20k_640": (374, 3431, (640, 2560)),
}


def test_the_table_here_covers_the_folder():
    names = {path.stem for path in (ROOT / "configs").glob("upernet_*.yaml")}
    assert names == ROWS.keys() | {"upernet_nano_shapes"}


def config_of(name, *opts):
    config = get_config(ROOT / "configs" / f"{name}.yaml")
    return update_config(config, argparse.Namespace(cfg=None, opts=opts))


def network_without_values(name, *opts):
    with paddle.LazyGuard():
        return build_upernet(config_of(name, *opts))


@pytest.mark.parametrize("name", ROWS)
def test_merged_parameters_without_the_auxiliary_head(name):
    """Within 0.6 million of what is published; Cityscapes' figure is for fewer than it has."""
    network = network_without_values(name, "MODEL.SMALL_KERNEL_MERGED", "True")
    millions = (count_parameters(network) - count_parameters(network.auxiliary_head)) / 1e6
    published = ROWS[name][0]
    assert abs(millions - published) <= (0.02 * published if "cityscapes" in name else 0.6)


def test_parameters_with_the_auxiliary_head():
    assert count_parameters(network_without_values("upernet_31b_ade20k_512")) == 113_371_820


def macs_at(network, size) -> int:
    """Multiply-adds at a size whose sides are multiples of 32, from those at small ones.

    All layers but the pooling pyramid's, whose maps have sides of their own, cost the same for each
    of the squares of 32 x 32 pixels. A third size confirms it, to the unit.
    """
    assert not size[0] % 32 and not size[1] % 32
    small, large, third = (count_macs(network, sides) for sides in ((64, 64), (64, 96), (96, 160)))
    square, rest = divmod(large - small, 2)
    constant = small - 4 * square
    assert rest == 0 and third == constant + 15 * square
    return constant + size[0] * size[1] // 32**2 * square


@pytest.mark.parametrize("name", ROWS)
def test_multiply_adds(name):
    _, published, size = ROWS[name]
    counted = macs_at(without_values(build_upernet, config_of(name)), size) / 1e9
    assert abs(counted - published) <= 0.01 * published


def test_recipes_say_what_the_official_configurations_say():
    """Crop, stride, steps, warm-up, images per GPU, stochastic depth (FACTS of each row)."""
    wanted = {
        "upernet_31b_cityscapes_769": (769, None, 20_000, 400, 2, 0.5),
        "upernet_31b_ade20k_512": (512, None, 40_000, 400, 2, 0.5),
        "upernet_31b_22k_ade20k_640": (640, 426, 40_000, 400, 2, 0.3),
        "upernet_31l_22k_ade20k_640": (640, 426, 80_000, 800, 1, 0.3),
        "upernet_xl_ade20k_640": (640, 426, 160_000, 1500, 2, 0.5),
    }
    for name, row in wanted.items():
        config = config_of(name)
        settings = config.SEGMENTATION
        steps = config.TRAIN.NUM_EPOCHS * settings.EPOCH_STEPS
        got = (config.DATA.IMAGE_SIZE, settings.SLIDE_STRIDE, steps, settings.WARMUP_STEPS)
        assert (*got, config.DATA.BATCH_SIZE, config.MODEL.DROPPATH) == row, name
        assert config.TRAIN.BASE_LR == 2e-4 and config.TRAIN.WEIGHT_DECAY == 0.05
        assert config.MODEL.SYNC_BN and config.MODEL.RECOMPUTE and config.TRAIN.END_LR == 0
        assert config.MODEL.NORM_INTER_FEATURES == (name == "upernet_xl_ade20k_640")
        assert settings.ALIGN_CORNERS == ("cityscapes" in name)
        assert settings.ZERO_IS_IGNORED == ("ade20k" in name)
        assert len(settings.PALETTE.split()) == config.MODEL.NUM_CLASSES
