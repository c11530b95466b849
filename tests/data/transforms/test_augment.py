import json
from pathlib import Path

import numpy as np
import pytest

from replknet_paddle.data.transforms.augment import (
    AUTO_AUGMENT,
    RAND_AUGMENT,
    RAND_AUGMENT_INCREASING,
    AutoAugment,
    RandAugment,
    apply_operations,
    operation_argument,
)
from replknet_paddle.data.transforms.pixels import PillowPixels, get_pixels

GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
PIXELS = np.load(GOLDENS / "timm_operations.npz")
DRAWS = json.loads((GOLDENS / "timm_draws.json").read_text())
FILL = (124, 116, 104)
PX = get_pixels()


def official(**changed) -> RandAugment:
    """`rand-m9-mstd0.5-inc1`."""
    settings = {"layers": 2, "magnitude": 9, "magnitude_std": 0.5, "fill": FILL}
    return RandAugment(**(settings | {"names": RAND_AUGMENT_INCREASING} | changed))


@pytest.mark.parametrize("px", [PX, PillowPixels()], ids=["native", "Pillow"])
@pytest.mark.parametrize("key", [key for key in PIXELS.files if key not in ("image", "made_by")])
def test_operation_equals_timm(key, px):
    name, magnitude, sign = key.split()
    drawn = [(name, float(magnitude), int(sign))]
    result = apply_operations(px, PIXELS["image"], drawn, FILL)
    np.testing.assert_array_equal(result, PIXELS[key])


def test_every_operation_has_a_golden():
    covered = {key.split()[0] for key in PIXELS.files}
    used = {name for pair in AUTO_AUGMENT for name, _, _ in pair}
    assert {*RAND_AUGMENT, *RAND_AUGMENT_INCREASING, *used} <= covered


@pytest.mark.parametrize(
    "policy, key", [(official(), "rand_augment"), (AutoAugment(fill=FILL), "auto_augment")]
)
def test_policy_draws_what_timm_draws(policy, key):
    for row in DRAWS[key]:
        drawn = policy.draw(np.random.default_rng(row["seed"]))
        assert [
            [name, operation_argument(name, magnitude, sign)] for name, magnitude, sign in drawn
        ] == row["applied"], row["seed"]


def test_sub_policies_equal_timm():
    table = [[list(operation) for operation in pair] for pair in AUTO_AUGMENT]
    assert table == DRAWS["auto_augment_policy"]


def test_increasing_scales_replace_the_plain_ones_where_there_are_both():
    assert len(RAND_AUGMENT) == len(RAND_AUGMENT_INCREASING) == 15
    changed = ("Brightness", "Color", "Contrast", "Posterize", "Sharpness", "Solarize")
    new = {name for name in RAND_AUGMENT_INCREASING if name not in RAND_AUGMENT}
    assert new == {f"{name}Increasing" for name in changed}


@pytest.mark.parametrize("name, magnitude", [("PosterizeIncreasing", 10), ("Posterize", 0)])
def test_posterize_without_bits_is_black(name, magnitude):
    result = apply_operations(PX, PIXELS["image"], [(name, magnitude, 1)], FILL)
    assert not result.any()


@pytest.mark.parametrize(
    "name, most",
    [("Rotate", 30.0), ("ShearX", 0.3), ("TranslateYRel", 0.45), ("SolarizeAdd", 110)]
    + [("SolarizeIncreasing", 0), ("ColorIncreasing", 1.9), ("PosterizeOriginal", 8)],
)
def test_magnitudes_are_clipped_to_the_scale(name, most):
    assert operation_argument(name, 10.0, 1) == operation_argument(name, 12.5, 1) == most
    assert operation_argument(name, -3.0, 1) == operation_argument(name, 0.0, 1)
