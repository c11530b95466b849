import json
from pathlib import Path

import numpy as np
import pytest

from replknet_paddle.data.transforms.finish import RandomErasing
from replknet_paddle.runtime.errors import InputError

GOLDENS = Path(__file__).parent / "goldens"  # what made them: see make_goldens.py there
ROWS = json.loads((GOLDENS / "timm_draws.json").read_text())["erased_boxes"]


def erased(mode: str, seed: int, **changed) -> np.ndarray:
    """A (3, 60, 80) image of sevens after erasing."""
    eraser = RandomErasing(**({"prob": 1.0, "mode": mode} | changed))
    return eraser(np.full((3, 60, 80), 7, np.float32), np.random.default_rng(seed))


def test_boxes_equal_timm():
    for row in ROWS:
        eraser = RandomErasing(prob=0.5, mode="const", max_count=row["count"])
        boxes = eraser.boxes(row["height"], row["width"], np.random.default_rng(row["seed"]))
        assert [list(box) for box in boxes] == row["boxes"], row["seed"]


@pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
def test_share_of_images_erased(prob):
    eraser = RandomErasing(prob=prob, mode="const")
    hits = [bool(eraser.boxes(60, 80, np.random.default_rng(seed))) for seed in range(4000)]
    assert np.mean(hits) == pytest.approx(prob, abs=0.03 if 0 < prob < 1 else 1e-12)


def test_area_and_aspect_of_a_box():
    eraser = RandomErasing(prob=1.0, mode="const")
    boxes = np.array(
        [eraser.boxes(224, 224, np.random.default_rng(seed))[0] for seed in range(4000)]
    )
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = height * width / 224**2
    assert 0.018 < area.min() and area.max() < 0.34
    assert 0.27 < (height / width).min() and (height / width).max() < 3.7
    # Boxes too long to fit are drawn again, so large areas are a little rarer than uniform.
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert np.log(height / width).mean() == pytest.approx(0, abs=0.05)
    assert boxes.min() >= 0 and boxes.max() <= 224


def test_no_box_spans_the_image():
    for seed in range(300):
        ((top, left, bottom, right),) = RandomErasing(prob=1.0, mode="const").boxes(
            6, 6, np.random.default_rng(seed)
        )
        assert bottom - top < 6 and right - left < 6


def test_several_boxes_share_the_area():
    eraser = RandomErasing(prob=1.0, mode="const", max_count=4)
    drawn = [eraser.boxes(224, 224, np.random.default_rng(seed)) for seed in range(2000)]
    counts = np.bincount([len(boxes) for boxes in drawn], minlength=5) / 2000
    np.testing.assert_allclose(counts, [0, 0.25, 0.25, 0.25, 0.25], atol=0.04)
    for boxes in drawn:
        for top, left, bottom, right in boxes:
            assert (bottom - top) * (right - left) / 224**2 < 0.34 / len(boxes)


@pytest.mark.parametrize("mode, values", [("const", 1), ("rand", 3), ("pixel", None)])
def test_filling(mode, values):
    image = erased(mode, seed=1)
    touched = image != 7
    assert touched.any() and not touched.all()
    assert (touched == touched[0]).all()  # the same box in all channels
    filling = image[touched]
    assert len(np.unique(filling)) == (values or len(filling))
    if mode == "const":
        assert not filling.any()


def test_pixel_filling_is_standard_normal():
    image = np.concatenate([erased("pixel", seed).ravel() for seed in range(40)])
    filling = image[image != 7]
    assert filling.mean() == pytest.approx(0, abs=0.02)
    assert filling.std() == pytest.approx(1, abs=0.02)


def test_erases_in_place():
    image = np.ones((3, 30, 30), np.float32)
    result = RandomErasing(prob=1.0, mode="const")(image, np.random.default_rng(0))
    assert result is image and not image.all()


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_image_too_small_for_any_box_is_left_alone(mode):
    image = np.ones((3, 1, 1), np.float32)
    for seed in range(20):
        RandomErasing(prob=1.0, mode=mode)(image, np.random.default_rng(seed))
    assert image.all()


@pytest.mark.parametrize(
    "wrong", [{"prob": 1.5}, {"prob": -0.1}, {"mode": "noise"}, {"max_count": 0}]
)
def test_illegal_arguments_are_refused(wrong):
    with pytest.raises(InputError):
        RandomErasing(**({"prob": 0.25, "mode": "pixel"} | wrong))
