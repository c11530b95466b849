"""Evaluation and training samples, against torchvision's and timm's."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import same_examples

from replknet_paddle.data.transforms.augment import RAND_AUGMENT_INCREASING, RandAugment
from replknet_paddle.data.transforms.finish import RandomErasing
from replknet_paddle.data.transforms.image import to_rgb
from replknet_paddle.data.transforms.pipelines import (
    ColorJitter,
    EvalTransform,
    TrainTransform,
    center_offset,
    sample_crop,
)
from replknet_paddle.data.transforms.pixels import PillowPixels, get_pixels
from replknet_paddle.runtime.errors import InputError

IMAGES = Path(__file__).parents[2] / "fixtures" / "images"
GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
SAMPLES = np.load(GOLDENS / "timm_samples.npz")
SCALE, RATIO = (0.08, 1.0), (0.75, 1.3333333)
FILL = (124, 116, 104)
COLOURS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EITHER_PIXELS = pytest.mark.parametrize("px", [None, PillowPixels()], ids=["native", "Pillow"])


def photograph(name: str = "landscape_499x375.jpg") -> Image.Image:
    return Image.open(IMAGES / name)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- evaluation


def eval_transform(pipeline: str, px=None) -> EvalTransform:
    """The pipeline that a name in the fixtures' README stands for."""
    sizes = [int(number) for number in re.findall(r"\d+", pipeline)]
    mode = "warp" if pipeline.startswith("warp") else "short_crop"
    settings = COLOURS | ({"px": px} if px else {})
    return EvalTransform(image_size=sizes[-1], crop_pct=sizes[-1] / sizes[0], mode=mode, **settings)


@EITHER_PIXELS
@pytest.mark.parametrize("expected", sorted(IMAGES.glob("expected__*.png")), ids=lambda p: p.stem)
def test_pixels_equal_torchvision(expected, px):
    _, image, pipeline = expected.stem.split("__")
    (source,) = IMAGES.glob(f"{image}.*")
    with Image.open(source) as image:
        pixels = eval_transform(pipeline, px).pixels(image)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.array(Image.open(expected)))


def test_fixtures_are_all_there():
    assert len(list(IMAGES.glob("expected__*.png"))) == 22


# Margins of 0.5, 1.5 and 22.5 pixels on either side go to the even neighbour.
@pytest.mark.parametrize("length, size, offset", [(4, 3, 0), (6, 3, 2), (365, 320, 22), (5, 3, 1)])
def test_crop_offset_rounds_halves_to_even(length, size, offset):
    assert center_offset(length, size) == offset


def test_image_smaller_than_the_crop_is_padded_with_black():
    white = Image.fromarray(np.full((2, 2, 3), 255, np.uint8))
    transform = EvalTransform(image_size=5, crop_pct=2.5, mode="short_crop", **COLOURS)
    pixels = transform.pixels(white)  # 2 x 2, on 5 x 5
    assert pixels.shape == (5, 5, 3)
    assert (pixels[1:3, 1:3] == 255).all() and pixels.sum() == 4 * 3 * 255


def test_float_result_equals_the_plain_steps_bit_for_bit():
    transform = eval_transform("short256_crop224")
    result = transform(photograph())
    scaled = transform.pixels(photograph()).astype(np.float32) / np.float32(255)
    expected = (scaled - np.float32(COLOURS["mean"])) / np.float32(COLOURS["std"])
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected.transpose(2, 0, 1))


def test_rgb_image_is_not_copied():
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is image


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "La"])
def test_modes_that_would_be_clipped_or_have_no_conversion_are_refused(mode):
    with pytest.raises(InputError, match=f"'{mode}' (has more than 8 bits|cannot be converted)"):
        to_rgb(Image.new(mode, (4, 4)))


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_damaged_file_is_not_reported_as_a_wrong_mode(monkeypatch, error):
    image = Image.new("L", (4, 4))
    monkeypatch.setattr(image, "load", Mock(side_effect=error("broken data")))
    with pytest.raises(InputError, match="damaged: broken data"):
        to_rgb(image)


def test_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(InputError, match="1 x 60000 pixels is too elongated"):
        eval_transform("short256_crop224").pixels(Image.new("RGB", (1, 60000)))
    assert eval_transform("warp384").pixels(Image.new("RGB", (1, 60000))).shape == (384, 384, 3)


# ---- training


def train_transform(**changed) -> TrainTransform:
    """Random crop and flip alone, unless stated otherwise."""
    defaults = {"image_size": 24, "crop_scale": SCALE, "crop_ratio": RATIO, "hflip_prob": 0.5}
    return TrainTransform(**(defaults | {"photometric": None, "erasing": None} | COLOURS | changed))


def official(**changed) -> TrainTransform:
    """All steps of the official recipe, erasing more often than it."""
    policy = RandAugment(
        layers=2, magnitude=9, magnitude_std=0.5, names=RAND_AUGMENT_INCREASING, fill=FILL
    )
    erasing = RandomErasing(prob=0.5, mode="pixel")
    return train_transform(**({"photometric": policy, "erasing": erasing} | changed))


@EITHER_PIXELS
@pytest.mark.parametrize("key", [key for key in SAMPLES.files if key != "made_by"])
def test_sample_equals_timm(key, px):
    name, seed = key.split()
    sample = official(**({"px": px} if px else {}))(photograph(name), rng(int(seed)))
    np.testing.assert_array_equal(sample, SAMPLES[key])


def test_crops_equal_timm():
    for row in json.loads((GOLDENS / "timm_draws.json").read_text())["crops"]:
        box = sample_crop(row["width"], row["height"], SCALE, RATIO, rng(row["seed"]))
        assert list(box) == row["box"], row["seed"]


SIDES = st.integers(1, 1200)


@same_examples
@given(SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_a_crop_is_a_box_in_the_image(width, height, seed):
    """However thin the image, there is a pixel in it; its area and shape are as they should be
    where rounding to whole pixels leaves them so."""
    left, top, right, bottom = sample_crop(width, height, SCALE, RATIO, rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    crop_width, crop_height = right - left, bottom - top
    if min(crop_width, crop_height) >= 20:
        assert 0.7 < crop_width / crop_height < 1.4
        if 0.76 < width / height < 1.3:
            assert 0.07 < crop_width * crop_height / (width * height) <= 1


@pytest.mark.parametrize(
    "size, box",
    [
        ((1000, 10), (493, 0, 506, 10)),  # too wide: full height, the widest shape allowed
        ((10, 1000), (0, 493, 10, 506)),  # too tall
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_crop_that_never_fits_falls_back_to_the_centre(size, box):
    # Areas this large do not fit a strip at any legal shape.
    assert sample_crop(*size, (0.9, 1.0), RATIO, rng(0)) == box


OTHER_MODES = ["gray_333x251.jpg", "cmyk_300x300.jpg", "palette_220x200.png"]


@pytest.mark.parametrize("name", [*OTHER_MODES, "rgba_200x250.png", "exif_rotated_400x300.jpg"])
def test_cropping_before_conversion_changes_nothing(name):
    box = sample_crop(*photograph(name).size, SCALE, RATIO, rng(3))
    expected = photograph(name).convert("RGB").crop(box).resize((24, 24), Image.BICUBIC)
    pixels = train_transform(hflip_prob=0.0).pixels(photograph(name), rng(3))
    np.testing.assert_array_equal(pixels, np.array(expected))


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_flip_rate(prob):
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    transform = train_transform(image_size=4, hflip_prob=prob)
    rows = [transform.pixels(ramp, rng(seed))[0, :, 0].astype(int) for seed in range(1000)]
    flipped = np.mean([row[0] > row[-1] for row in rows])
    assert flipped == pytest.approx(prob, abs=0.05 if prob == 0.5 else 1e-12)


def test_vertical_flips_and_turns_are_exact_and_as_likely_as_stated():
    """Off, they draw no number, or the samples above would not be timm's."""
    found = Counter()
    for seed in range(400):
        plain, flipped, turned = (
            train_transform(**changed).pixels(photograph(), rng(seed))
            for changed in ({}, {"vflip_prob": 0.25}, {"quarter_turns": True})
        )
        found["flip", [np.array_equal(flipped, p) for p in (plain, plain[::-1])].index(True)] += 1
        found[[np.array_equal(turned, np.rot90(plain, n)) for n in range(4)].index(True)] += 1
    wanted = {0: 100, 1: 100, 2: 100, 3: 100, ("flip", 0): 300, ("flip", 1): 100}
    assert found == {kind: pytest.approx(count, abs=30) for kind, count in wanted.items()}


def test_global_random_state_is_neither_used_nor_touched():
    image, samples = photograph(), []
    transforms = official(), official(photometric=ColorJitter(strength=0.4))
    for global_seed in (1, 2):
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tobytes()
        samples.append([t(image, rng(i)).tobytes() for t in transforms for i in range(20)])
        assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    assert samples[0] == samples[1]


def test_color_jitter_factors_and_order(monkeypatch):
    calls = []

    def recorder(name):
        return lambda px, image, factor, fill: calls.append((name, factor)) or image

    monkeypatch.setattr(ColorJitter, "enhancers", tuple(map(recorder, "bcs")))
    jitter = ColorJitter(strength=0.4)
    for seed in range(1200):
        jitter(get_pixels(), np.zeros((1, 1, 3), np.uint8), rng(seed))
    factors = np.array([factor for _, factor in calls])
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert factors.mean() == pytest.approx(1, abs=0.02)
    orders = ["".join(name for name, _ in calls[i : i + 3]) for i in range(0, 3600, 3)]
    assert {
        order: pytest.approx(200, abs=60) for order in ("bcs", "bsc", "cbs", "csb", "sbc", "scb")
    } == {o: orders.count(o) for o in set(orders)}


def test_reduced_decoding_stays_within_two_grey_levels(tmp_path):
    """On a photograph of 998 x 750 pixels with detail in every pixel."""
    pixels = np.array(photograph()).astype(int)
    large = pixels.repeat(2, 0).repeat(2, 1) + rng(0).integers(-6, 7, (750, 998, 1))
    path = tmp_path / "large.jpg"
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    differences, reduced = [], 0
    for seed in range(40):
        exact = train_transform(image_size=96).pixels(Image.open(path), rng(seed))
        image = Image.open(path)
        fast = train_transform(image_size=96, reduced_decode=True).pixels(image, rng(seed))
        assert fast.shape == exact.shape
        difference = np.abs(fast.astype(int) - exact).mean()
        if image.size == (998, 750):
            assert difference == 0  # the crop is too small for it
        else:
            reduced += 1
            differences.append(difference)
    assert 20 < reduced < 40
    assert max(differences) < 2


@pytest.mark.parametrize("name", OTHER_MODES)
def test_reduced_decoding_of_other_modes_and_formats(name):
    for seed in range(10):
        exact, fast = (
            train_transform(reduced_decode=reduced).pixels(photograph(name), rng(seed)).astype(int)
            for reduced in (False, True)
        )
        assert np.abs(fast - exact).mean() < 2
