import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replknet_paddle.data.transforms.augment import RandAugment
from replknet_paddle.data.transforms.finish import RandomErasing
from replknet_paddle.data.transforms.pipelines import ColorJitter, TrainTransform, sample_crop
from replknet_paddle.data.transforms.pixels import get_pixels
from replknet_paddle.runtime.errors import InputError

IMAGES = Path(__file__).parents[2] / "fixtures" / "images"
GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
SAMPLES = np.load(GOLDENS / "timm_samples.npz")
SCALE, RATIO = (0.08, 1.0), (0.75, 1.3333333)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_transform(**changed) -> TrainTransform:
    """Random crop and flip alone, unless stated otherwise."""
    return TrainTransform(
        **(
            {
                "image_size": 24,
                "crop_scale": SCALE,
                "crop_ratio": RATIO,
                "hflip_prob": 0.5,
                "photometric": None,
                "erasing": None,
                "mean": MEAN,
                "std": STD,
                "pixels": get_pixels(True),
            }
            | changed
        )
    )


def official(**changed) -> TrainTransform:
    """All steps of the official recipe, erasing more often than it."""
    policy = RandAugment(
        layers=2, magnitude=9, magnitude_std=0.5, increasing=True, fill=(124, 116, 104)
    )
    erasing = RandomErasing(prob=0.5, mode="pixel")
    return train_transform(**({"photometric": policy, "erasing": erasing} | changed))


def photograph(name: str = "landscape_499x375.jpg") -> Image.Image:
    return Image.open(IMAGES / name)


@pytest.mark.parametrize("native", [True, False], ids=["native", "Pillow"])
@pytest.mark.parametrize("key", [key for key in SAMPLES.files if key != "made_by"])
def test_sample_equals_timm(key, native):
    name, seed = key.split()
    sample = official(pixels=get_pixels(native))(photograph(name), np.random.default_rng(int(seed)))
    np.testing.assert_array_equal(sample, SAMPLES[key])


def test_crops_equal_timm():
    for row in json.loads((GOLDENS / "timm_draws.json").read_text())["crops"]:
        box = sample_crop(
            row["width"], row["height"], SCALE, RATIO, np.random.default_rng(row["seed"])
        )
        assert list(box) == row["box"], row["seed"]


def test_crop_statistics():
    # Of a square image all shapes up to half its area fit, so nothing is drawn twice.
    boxes = np.array(
        [
            sample_crop(2000, 2000, (0.08, 0.5), RATIO, np.random.default_rng(seed))
            for seed in range(5000)
        ]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    quantiles = np.linspace(0.1, 0.9, 9)
    area = np.quantile(width * height / 2000**2, quantiles)
    np.testing.assert_allclose(area, 0.08 + 0.42 * quantiles, atol=0.012)
    aspect = np.quantile(np.log(width / height), quantiles)
    np.testing.assert_allclose(aspect, np.log(0.75) * (1 - 2 * quantiles), atol=0.02)
    for start, length in ((boxes[:, 0], width), (boxes[:, 1], height)):
        np.testing.assert_allclose(
            np.quantile(start / (2000 - length), quantiles), quantiles, atol=0.04
        )


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
    assert sample_crop(*size, (0.9, 1.0), RATIO, np.random.default_rng(0)) == box


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_crops_of_tiny_images_are_not_empty(size):
    for seed in range(50):
        left, top, right, bottom = sample_crop(*size, SCALE, RATIO, np.random.default_rng(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@pytest.mark.parametrize(
    "name",
    [
        "gray_333x251.jpg",
        "cmyk_300x300.jpg",
        "palette_220x200.png",
        "rgba_200x250.png",
        "exif_rotated_400x300.jpg",
    ],
)
def test_cropping_before_conversion_changes_nothing(name):
    box = sample_crop(*photograph(name).size, SCALE, RATIO, np.random.default_rng(3))
    expected = photograph(name).convert("RGB").crop(box).resize((24, 24), Image.BICUBIC)
    pixels = train_transform(hflip_prob=0.0).pixels(photograph(name), np.random.default_rng(3))
    np.testing.assert_array_equal(pixels, np.array(expected))


@pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
def test_flip_rate(prob):
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    transform = train_transform(image_size=4, hflip_prob=prob)
    pixels = [
        transform.pixels(ramp, np.random.default_rng(seed))[0, :, 0].astype(int)
        for seed in range(1000)
    ]
    flipped = np.mean([row[0] > row[-1] for row in pixels])
    assert flipped == pytest.approx(prob, abs=0.05 if prob == 0.5 else 1e-12)


def test_same_generator_seed_same_bits_and_another_seed_other_bits():
    image, transform = photograph(), official()
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_global_random_state_is_neither_used_nor_touched():
    image, samples = photograph(), []
    for global_seed in (1, 2):
        random.seed(global_seed)
        np.random.seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].tobytes()
        jitter = official(photometric=ColorJitter(strength=0.4))
        samples.append(
            [
                transform(image, np.random.default_rng((0, 3, index))).tobytes()
                for transform in (official(), jitter)
                for index in range(20)
            ]
        )
        assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    assert samples[0] == samples[1]


def test_result_is_what_a_loader_needs():
    transform = official(image_size=32)
    sample = transform(photograph(), np.random.default_rng(0))
    assert sample.shape == (3, 32, 32) and sample.dtype == np.float32 and sample.flags.c_contiguous
    pixels = transform.pixels(photograph(), np.random.default_rng(0))
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


def test_input_image_stays_as_it_was():
    image = photograph()
    image.load()
    before = image.tobytes()
    for seed in range(10):
        official()(image, np.random.default_rng(seed))
    assert image.tobytes() == before


def test_color_jitter_without_strength_changes_nothing():
    image = np.array(photograph())
    result = ColorJitter(strength=0.0)(get_pixels(True), image, np.random.default_rng(0))
    np.testing.assert_array_equal(result, image)


def test_color_jitter_factors_and_order(monkeypatch):
    calls = []

    def recorder(name):
        def enhance(px, image, factor, fill):
            calls.append((name, factor))
            return image

        return enhance

    monkeypatch.setattr(ColorJitter, "enhancers", tuple(map(recorder, "bcs")))
    jitter = ColorJitter(strength=0.4)
    for seed in range(1200):
        jitter(get_pixels(True), np.zeros((1, 1, 3), np.uint8), np.random.default_rng(seed))
    factors = np.array([factor for _, factor in calls])
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert factors.mean() == pytest.approx(1, abs=0.02)
    orders = ["".join(name for name, _ in calls[i : i + 3]) for i in range(0, 3600, 3)]
    assert {
        order: pytest.approx(200, abs=60) for order in ("bcs", "bsc", "cbs", "csb", "sbc", "scb")
    } == {o: orders.count(o) for o in set(orders)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"crop_scale": (0.5, 0.1)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"crop_ratio": (0.0, 1.0)},
        {"hflip_prob": 1.1},
    ],
)
def test_illegal_arguments_are_refused(wrong):
    with pytest.raises(InputError):
        train_transform(**wrong)


def test_negative_color_jitter_is_refused():
    with pytest.raises(InputError, match=r"-0\.1"):
        ColorJitter(strength=-0.1)


def sharp_photograph(tmp_path) -> str:
    """A photograph of 998 x 750 pixels with detail in every pixel."""
    pixels = np.array(photograph()).astype(int)
    large = pixels.repeat(2, 0).repeat(2, 1) + np.random.default_rng(0).integers(
        -6, 7, (750, 998, 1)
    )
    path = tmp_path / "large.jpg"
    Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return str(path)


def test_reduced_decoding_stays_within_two_grey_levels(tmp_path):
    path = sharp_photograph(tmp_path)
    differences, reduced = [], 0
    for seed in range(40):
        exact = train_transform(image_size=96).pixels(Image.open(path), np.random.default_rng(seed))
        image = Image.open(path)
        fast = train_transform(image_size=96, reduced_decode=True).pixels(
            image, np.random.default_rng(seed)
        )
        assert fast.shape == exact.shape
        difference = np.abs(fast.astype(int) - exact).mean()
        if image.size == (998, 750):
            assert difference == 0  # the crop is too small for it
        else:
            reduced += 1
            differences.append(difference)
    assert 20 < reduced < 40
    assert max(differences) < 2


@pytest.mark.parametrize("name", ["gray_333x251.jpg", "cmyk_300x300.jpg", "palette_220x200.png"])
def test_reduced_decoding_of_other_modes_and_formats(name):
    for seed in range(10):
        exact, fast = (
            train_transform(reduced_decode=reduced)
            .pixels(photograph(name), np.random.default_rng(seed))
            .astype(int)
            for reduced in (False, True)
        )
        assert np.abs(fast - exact).mean() < 2
