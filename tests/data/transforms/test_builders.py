"""Transforms as the configuration asks for them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replknet_paddle.config import get_config
from replknet_paddle.data.transforms import build_eval_transform, build_mixup, build_train_transform
from replknet_paddle.data.transforms.augment import (
    RAND_AUGMENT,
    RAND_AUGMENT_INCREASING,
    AutoAugment,
    RandAugment,
)
from replknet_paddle.data.transforms.pipelines import ColorJitter
from replknet_paddle.runtime.errors import InputError

IMAGES = Path(__file__).parents[2] / "fixtures" / "images"


def train_config(data=(), **values):
    """The default configuration with keys of TRAIN changed, and those of `data`."""
    return get_config(**dict(data), **{f"TRAIN__{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    "pipeline, values",
    [
        ("short256_crop224", {}),
        ("warp384", {"DATA__IMAGE_SIZE": 384, "DATA__RESIZE_MODE": "warp"}),
        ("short365_crop320", {"DATA__IMAGE_SIZE": 320}),
    ],
)
def test_eval_transform_of_a_config(pipeline, values):
    image = Image.open(IMAGES / "portrait_301x400.jpg")
    transform = build_eval_transform(get_config(**values))
    expected = np.array(Image.open(IMAGES / f"expected__portrait_301x400__{pipeline}.png"))
    np.testing.assert_array_equal(transform.pixels(image), expected)
    scaled = expected.transpose(2, 0, 1) / 255
    mean, std = np.reshape([0.485, 0.456, 0.406, 0.229, 0.224, 0.225], (2, 3, 1, 1))
    np.testing.assert_allclose(transform(image), (scaled - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    "rand, auto, jitter, policy",
    [
        (True, True, 0.4, RandAugment),
        (True, False, 0.4, RandAugment),
        (False, True, 0.4, AutoAugment),
        (False, False, 0.4, ColorJitter),
        (False, False, 0.0, type(None)),
    ],
)
def test_one_photometric_policy_at_most(rand, auto, jitter, policy):
    config = train_config(RAND_AUGMENT=rand, AUTO_AUGMENT=auto, COLOR_JITTER=jitter)
    assert type(build_train_transform(config).photometric) is policy


@pytest.mark.parametrize(
    "increasing, names", [(True, RAND_AUGMENT_INCREASING), (False, RAND_AUGMENT)]
)
def test_train_transform_takes_its_settings_from_the_config(increasing, names):
    policy = {"RAND_AUGMENT": True, "RAND_AUGMENT_LAYERS": 3, "RAND_AUGMENT_MAGNITUDE": 7}
    policy |= {"RAND_AUGMENT_MAGNITUDE_STD": 0.25, "RAND_AUGMENT_INCREASING": increasing}
    crop = {"CROP_SCALE": [0.5, 0.6], "CROP_RATIO": [0.9, 1.1], "HFLIP_PROB": 0.125}
    crop |= {"VFLIP_PROB": 0.375, "QUARTER_TURNS": True}
    erasing = {"RANDOM_ERASE_PROB": 0.75, "RANDOM_ERASE_MODE": "rand", "RANDOM_ERASE_COUNT": 2}
    data = {"DATA__IMAGE_SIZE": 40, "DATA__IMAGENET_MEAN": [0.5, 0.25, 0.0]}
    transform = build_train_transform(train_config(**policy, **crop, **erasing, data=data))
    assert (transform.image_size, transform.hflip_prob) == (40, 0.125)
    assert (transform.vflip_prob, transform.quarter_turns) == (0.375, True)
    assert (transform.crop_scale, transform.crop_ratio) == ([0.5, 0.6], [0.9, 1.1])
    assert list(transform.mean) == [0.5, 0.25, 0.0]
    policy, erasing = transform.photometric, transform.erasing
    assert (policy.layers, policy.magnitude, policy.magnitude_std) == (3, 7, 0.25)
    assert policy.fill == (128, 64, 0) and policy.names == names
    assert (erasing.prob, erasing.mode, erasing.max_count) == (0.75, "rand", 2)


def test_erasing_can_be_off_and_a_split_is_refused():
    assert build_train_transform(train_config(RANDOM_ERASE_PROB=0.0)).erasing is None
    with pytest.raises(InputError, match=r"TRAIN\.RANDOM_ERASE_SPLIT True: must be False"):
        build_train_transform(train_config(RANDOM_ERASE_SPLIT=True))


def test_mixup_takes_its_settings_from_the_config():
    chances = {"MIXUP_PROB": 0.6, "MIXUP_SWITCH_PROB": 0.3, "SMOOTHING": 0.2}
    alphas = {"MIXUP_ALPHA": 0.7, "CUTMIX_ALPHA": 0.9}
    mixup = build_mixup(train_config(**chances, **alphas, data={"MODEL__NUM_CLASSES": 17}))
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.cutmix_minmax) == (0.7, 0.9, None)
    assert (mixup.prob, mixup.switch_prob) == (0.6, 0.3)
    assert (mixup.label_smoothing, mixup.num_classes) == (0.2, 17)


@pytest.mark.parametrize("off", [{"MIXUP_PROB": 0.0}, {"MIXUP_ALPHA": 0.0, "CUTMIX_ALPHA": 0.0}])
def test_mixup_can_be_off(off):
    assert build_mixup(train_config(**off)) is None


def test_minmax_alone_switches_cutmix_on():
    config = train_config(MIXUP_ALPHA=0.0, CUTMIX_ALPHA=0.0, CUTMIX_MINMAX=[0.2, 0.8])
    assert build_mixup(config).draw(10, 10, np.random.default_rng(0)).box is not None
