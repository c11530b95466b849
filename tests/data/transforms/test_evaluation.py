import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replknet_paddle.data.transforms.image import normalize, to_rgb
from replknet_paddle.data.transforms.pipelines import EvalTransform, center_offset, short_side_size
from replknet_paddle.data.transforms.pixels import get_pixels
from replknet_paddle.runtime.errors import InputError

IMAGES = Path(__file__).parents[2] / "fixtures" / "images"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def eval_transform(pipeline: str, *, native: bool = True) -> EvalTransform:
    """The pipeline that a name in the fixtures' README stands for."""
    sizes = [int(number) for number in re.findall(r"\d+", pipeline)]
    mode = "warp" if pipeline.startswith("warp") else "short_crop"
    return EvalTransform(
        image_size=sizes[-1],
        crop_pct=sizes[-1] / sizes[0],
        mode=mode,
        mean=MEAN,
        std=STD,
        pixels=get_pixels(native),
    )


@pytest.mark.parametrize("native", [True, False], ids=["native", "Pillow"])
@pytest.mark.parametrize("expected", sorted(IMAGES.glob("expected__*.png")), ids=lambda p: p.stem)
def test_pixels_equal_torchvision(expected, native):
    _, image, pipeline = expected.stem.split("__")
    (source,) = IMAGES.glob(f"{image}.*")
    with Image.open(source) as photograph:
        pixels = eval_transform(pipeline, native=native).pixels(photograph)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.array(Image.open(expected)))


def test_fixtures_are_all_there():
    assert len(list(IMAGES.glob("expected__*.png"))) == 22


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((499, 375), 256, (340, 256)),  # 340.65: truncated
        ((301, 400), 384, (384, 510)),  # 510.30
        ((333, 251), 251, (333, 251)),
        ((90, 90), 256, (256, 256)),
        ((1, 3), 2, (2, 6)),
    ],
)
def test_long_side_is_truncated(size, short_side, expected):
    assert short_side_size(*size, short_side) == expected


@pytest.mark.parametrize(
    "image_size, crop_pct, short_side",
    [
        (224, 0.875, 256),
        (320, 0.875, 365),
        (384, 1.0, 384),
        (224, 0.9, 248),
    ],
)
def test_short_side_is_floored(image_size, crop_pct, short_side):
    transform = EvalTransform(
        image_size=image_size,
        crop_pct=crop_pct,
        mode="short_crop",
        mean=MEAN,
        std=STD,
        pixels=get_pixels(True),
    )
    assert transform.short_side == short_side


@pytest.mark.parametrize(
    "length, size, offset",
    [
        (5, 3, 1),
        (4, 3, 0),  # margin 0.5 each: the even neighbour is 0
        (6, 3, 2),  # margin 1.5 each: the even neighbour is 2
        (3, 3, 0),
    ],
)
def test_crop_offset_rounds_halves_to_even(length, size, offset):
    assert center_offset(length, size) == offset


def test_image_smaller_than_the_crop_is_padded_with_black():
    white = Image.fromarray(np.full((2, 2, 3), 255, np.uint8))
    transform = EvalTransform(
        image_size=5, crop_pct=2.5, mode="short_crop", mean=MEAN, std=STD, pixels=get_pixels(True)
    )
    pixels = transform.pixels(white)  # 2 x 2, on 5 x 5
    assert pixels.shape == (5, 5, 3)
    assert (pixels[1:3, 1:3] == 255).all() and pixels.sum() == 4 * 3 * 255


def test_float_result_equals_the_plain_steps_bit_for_bit():
    transform = eval_transform("short256_crop224")
    image = Image.open(IMAGES / "landscape_499x375.jpg")
    result = transform(image)
    scaled = transform.pixels(image).astype(np.float32) / np.float32(255)
    expected = (scaled - np.float32(MEAN)) / np.float32(STD)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected.transpose(2, 0, 1))


def test_normalize_keeps_channels_apart():
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[..., 1] = 255
    channels = normalize(pixels, np.float32([0, 0.5, 0.25]), np.float32([1, 0.5, 0.125]))
    assert channels.shape == (3, 2, 4)
    assert [set(channel.ravel()) for channel in channels] == [{0.0}, {1.0}, {-2.0}]


def test_rgb_image_is_not_copied():
    image = Image.new("RGB", (4, 4))
    assert to_rgb(image) is image


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B"])
def test_deep_images_are_refused_rather_than_clipped(mode):
    with pytest.raises(InputError, match=f"'{mode}' has more than 8 bits"):
        to_rgb(Image.new(mode, (4, 4)))


def test_mode_without_conversion_is_refused():
    with pytest.raises(InputError, match="'La'"):
        to_rgb(Image.new("La", (4, 4)))


@pytest.mark.parametrize("error", [OSError, ValueError])
def test_damaged_file_is_not_reported_as_a_wrong_mode(monkeypatch, error):
    def load():
        raise error("broken data")

    image = Image.new("L", (4, 4))
    monkeypatch.setattr(image, "load", load)
    with pytest.raises(InputError, match="damaged: broken data"):
        to_rgb(image)


def test_strip_that_would_fill_the_memory_is_refused():
    with pytest.raises(InputError, match="1 x 60000 pixels is too elongated"):
        eval_transform("short256_crop224").pixels(Image.new("RGB", (1, 60000)))
    assert eval_transform("warp384").pixels(Image.new("RGB", (1, 60000))).shape == (384, 384, 3)


@pytest.mark.parametrize("wrong", [{"mode": "stretch"}, {"image_size": 0}, {"crop_pct": 0.0}])
def test_illegal_arguments_are_refused(wrong):
    arguments = {
        "image_size": 8,
        "crop_pct": 1.0,
        "mode": "short_crop",
        "mean": MEAN,
        "std": STD,
        "pixels": get_pixels(True),
    }
    with pytest.raises(InputError):
        EvalTransform(**(arguments | wrong))
