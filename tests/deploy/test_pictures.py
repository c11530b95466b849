"""Drawn pictures, by their pixels."""

import os

import numpy as np
import pytest
from PIL import Image

from replknet_paddle.deploy.pictures import (
    BAR,
    PICTURE_FORMATS,
    RIGHT,
    WRONG,
    annotate,
    grid,
    overlay,
    save,
)
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target, check_new_folder

RED = (255, 0, 0)


def bar_lengths(drawn):
    """The longest run of the bars' colour in each row of bars, from top to bottom."""
    is_bar = (np.asarray(drawn) == BAR).all(axis=-1).sum(axis=1)
    rows = np.flatnonzero(is_bar)
    groups = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [int(is_bar[group].max()) for group in groups]


@pytest.mark.parametrize("height", [160, 240, 480])
def test_bars_are_as_long_as_the_probabilities(height):
    scores = [0.5, 0.25, 0.125, 0.0625, 0.03125]
    drawn = annotate(
        Image.new("RGB", (60, 40), RED), list("abcde"), scores, caption="x", height=height
    )
    assert drawn.size == (3 * height, height)
    lengths = bar_lengths(drawn)
    assert len(lengths) == 5
    for length, score in zip(lengths, scores):
        assert length == pytest.approx(lengths[0] * score / scores[0], abs=2)


@pytest.mark.parametrize("size", [(8, 8), (300, 20), (20, 300), (1, 1), (4000, 3000), (5000, 1)])
def test_a_picture_keeps_its_shape_and_its_place(size):
    drawn = annotate(Image.new("RGB", size, RED), ["a"], [0.0], caption="")
    ys, xs = np.nonzero((np.asarray(drawn) == RED).all(axis=-1))
    width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
    assert width <= 1.4 * 240 + 1 and height <= 240 and (width > 180 or height > 180)
    long, short = max(width, height), min(width, height)
    assert short == pytest.approx(max(1, long * min(size) / max(size)), abs=0.51)
    assert (width > height) == (size[0] > size[1])
    assert xs.max() < 1.4 * 240 + 2 * 12  # left of the bars


def test_pixels_of_a_small_picture_stay_sharp():
    pixels = np.indices((8, 8)).sum(axis=0) % 2 * np.uint8(255)
    picture = Image.fromarray(pixels.astype("uint8")).convert("RGB")
    drawn = np.asarray(annotate(picture, [], [], caption=""))
    assert set(np.unique(drawn)) == {0, 255}


def test_long_and_foreign_names_stay_within_the_picture():
    plain = np.asarray(annotate(Image.new("RGB", (9, 9)), ["a"], [1.0], caption=""))
    for text in ("great white shark, " * 50, "二叉树" * 100, "a\nb\tc", "\N{GRINNING FACE}", ""):
        drawn = np.asarray(annotate(Image.new("RGB", (9, 9)), [text], [1.0], caption=text))
        np.testing.assert_array_equal(drawn[:, -12:], plain[:, -12:])  # the margin
        if text == "":
            assert (drawn != plain).any()


def pixels_of(drawn, colour):
    return int((np.asarray(drawn) == colour).all(axis=-1).sum())


def test_right_and_wrong_are_reported_apart_where_the_class_is_known():
    def draw(truth):
        picture = Image.new("RGB", (60, 40), RED)
        return annotate(picture, ["cat", "dog"], [0.9, 0.1], caption="x", truth=truth)

    right, wrong, unknown = draw("cat"), draw("dog"), draw(None)
    assert pixels_of(right, RIGHT) > 500 and pixels_of(right, WRONG) == 0
    assert pixels_of(wrong, WRONG) > 500 and pixels_of(wrong, RIGHT) == 0
    assert pixels_of(unknown, RIGHT) == pixels_of(unknown, WRONG) == 0
    # Words as well as colours: the lines below the pictures differ.
    below = [np.asarray(drawn.convert("L"))[190:, :336] < 200 for drawn in (right, wrong)]
    assert (below[0] != below[1]).sum() > 30


def test_a_grid_has_each_picture_in_its_place():
    colours = [(10 * i, 0, 0) for i in range(1, 6)]
    sheet = grid([Image.new("RGB", (6, 4), colour) for colour in colours], columns=3)
    assert sheet.size == (18, 8)
    assert [sheet.getpixel((6 * (i % 3) + 3, 4 * (i // 3) + 2)) for i in range(5)] == colours
    assert sheet.getpixel((15, 6)) == (255, 255, 255)
    assert grid([Image.new("RGB", (6, 4))] * 2, columns=3).size == (12, 4)


def test_heat_is_where_the_map_is_hot_and_cold_stays_the_picture():
    pixels = np.full((64, 96, 3), 128, np.uint8)
    heat = np.zeros((2, 3), np.float32)
    heat[0, 2] = 5
    drawn = np.asarray(overlay(pixels, heat)).astype(int)
    assert drawn.shape == (256, 384, 3)
    changed = np.abs(drawn - 128).sum(axis=-1)
    assert changed[20, 370] > 100 and changed[200:, :100].max() == 0
    np.testing.assert_array_equal(drawn, np.asarray(overlay(pixels, 100 * heat)))


def test_a_map_of_zeros_leaves_the_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype("uint8")
    drawn = overlay(pixels, np.zeros((13, 13), np.float32))
    np.testing.assert_array_equal(np.asarray(drawn), pixels)


def test_a_picture_file_appears_when_it_is_whole(tmp_path, monkeypatch):
    save(Image.new("RGB", (4, 4), RED), str(tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == RED

    def full(_, file, *__, **___):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError):
        save(Image.new("RGB", (4, 4)), str(tmp_path / "b.png"))
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_would_be_overwritten_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.png").touch()
    check_new_folder(str(tmp_path / "empty"))
    check_new_folder(str(tmp_path / "new"))
    check_file_target(tmp_path / "new.png", list(PICTURE_FORMATS), must_be_new=True)
    for path, says in (("full", "is not empty"), ("there.png", "is a file")):
        with pytest.raises(InputError, match=says):
            check_new_folder(str(tmp_path / path))
    for path, says in (
        ("there.png", "exists"),
        ("new.bmp", "must end in .png or .jpg"),
        ("no/new.png", "no folder"),
    ):
        with pytest.raises((InputError, FileNotFoundError), match=says):
            check_file_target(tmp_path / path, list(PICTURE_FORMATS), must_be_new=True)
    assert not (tmp_path / "new").exists()
