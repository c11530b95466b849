"""Drawn pictures, by their pixels, and the fonts that they are written in."""

import logging
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from replknet_paddle.analysis import plots
from replknet_paddle.deploy import drawing
from replknet_paddle.deploy.drawing import (
    BAR,
    RIGHT,
    TRACK,
    WRONG,
    Drawings,
    annotate,
    draw_text,
    overlay,
    save,
)
from replknet_paddle.deploy.predict import Prediction

RED = (255, 0, 0)
CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"


def bar_lengths(drawn):
    """The longest run of the bars' colour in each row of bars, from top to bottom."""
    is_bar = (np.asarray(drawn) == BAR).all(axis=-1).sum(axis=1)
    rows = np.flatnonzero(is_bar)
    groups = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    return [int(is_bar[group].max()) for group in groups]


@pytest.mark.parametrize("height", [160, 480])
def test_bars_are_as_long_as_the_probabilities(height):
    scores = [0.5, 0.25, 0.125, 0.0625, 0.03125]
    drawn = annotate(
        Image.new("RGB", (60, 40), RED), list("abcde"), scores, caption="x", height=height
    )
    assert drawn.size == (3 * height, height)
    lengths = bar_lengths(drawn)
    assert lengths == pytest.approx([lengths[0] * score / 0.5 for score in scores], abs=2)


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


@settings(max_examples=30, deadline=None)
@given(st.one_of(st.text(max_size=40), st.text("二叉\ud800\u200db\n", min_size=200)))
def test_any_text_stays_within_the_picture(text):
    plain = np.asarray(annotate(Image.new("RGB", (9, 9)), ["a"], [1.0], caption=""))
    drawn = annotate(Image.new("RGB", (9, 9)), [text], [1.0], caption=text, truth=text)
    np.testing.assert_array_equal(np.asarray(drawn)[:, -12:], plain[:, -12:])  # the margin


def test_right_and_wrong_are_told_apart_by_colours_and_words():
    def draw(truth):
        picture = Image.new("RGB", (60, 40), RED)
        return annotate(picture, ["cat", "dog"], [0.9, 0.1], caption="x", truth=truth)

    drawn = [np.asarray(draw(truth)) for truth in ("cat", "dog", None)]
    for colour, counts in ((RIGHT, [True, False, False]), (WRONG, [False, True, False])):
        assert [(d == colour).all(axis=-1).sum() > 500 for d in drawn] == counts
        assert [(d == colour).all(axis=-1).sum() > 0 for d in drawn] == counts
    below = [d[190:, :336].mean(axis=-1) < 200 for d in drawn]
    assert (below[0] != below[1]).sum() > 30


@pytest.mark.parametrize(
    "truth, said",
    [("Gebäude", ["right"]), ("people", ["is people; taken for Gebäude"]), (None, [])],
)
def test_a_mistake_names_both_classes(monkeypatch, truth, said):
    texts = []
    monkeypatch.setattr(drawing, "draw_text", lambda _, __, text, *___, **____: texts.append(text))
    picture, names = Image.new("RGB", (60, 40)), ["Gebäude", "people"]
    annotate(picture, names, [0.9, 0.1], caption="x.jpg", truth=truth)
    assert texts == [*said, "x.jpg", "Gebäude", "90.0 %", "people", "10.0 %"]


@pytest.mark.parametrize("count, size", [(5, (1440, 320)), (2, (960, 160)), (20, (1440, 640))])
def test_a_grid_has_each_of_the_first_pictures_in_its_place(tmp_path, count, size):
    drawings = Drawings(["a"], None, str(tmp_path / "grid.png"))
    colours = [(100 + 10 * i, 0, 0) for i in range(count)]
    for i, colour in enumerate(colours):
        picture = Image.new("RGB", (60, 40), colour)
        drawings.add(Prediction(f"{i}.png", labels=(0,), scores=(0.0,), picture=picture))
    drawings.finish()
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == size
        places = [(480 * (i % 3) + 112, 160 * (i // 3) + 65) for i in range(12)]
        assert [sheet.getpixel(place) for place in places[:count]] == colours[:12]


def test_heat_is_where_the_map_is_hot_and_cold_stays_the_picture():
    picture = Image.effect_noise((96, 64), 80).convert("RGB")
    strength = np.zeros((64, 96))
    strength[:, 90:] = np.linspace(0, 1, 6)
    is_seen = np.ones((64, 96), bool)
    is_seen[:8] = False
    drawn, pixels = np.asarray(overlay(picture, strength, is_seen), int), np.asarray(picture, int)
    np.testing.assert_array_equal(drawn[8:, :91], pixels[8:, :91])
    hottest = 0.3 * pixels[8:, -1] + 0.7 * np.array([250, 245, 160])
    np.testing.assert_allclose(drawn[8:, -1], hottest, atol=0.5)
    pale = 0.25 * pixels[:8] + 0.75 * np.array(TRACK)
    np.testing.assert_allclose(drawn[:8], pale, atol=0.5)


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


# ---- fonts


@pytest.fixture
def font_folder(tmp_path, monkeypatch):
    """The only folder of fonts of this system, empty."""
    cached = ("font_files", "open_font", "has_letter", "find_font", "_warn_of_missing_letters")
    monkeypatch.setattr(plots, "FONT_FOLDERS", [str(tmp_path / "fonts")])
    for name in cached:
        getattr(plots, name).cache_clear()
    (tmp_path / "fonts" / "deep").mkdir(parents=True)
    yield tmp_path / "fonts" / "deep"
    for name in cached:
        getattr(plots, name).cache_clear()


def make_font(path, letters):
    """A font whose glyph for each of `letters` is a triangle, and for any other a box."""
    builder = pytest.importorskip("fontTools.fontBuilder", reason="fontTools makes the font")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def glyph(*points):
        pen = pens.TTGlyphPen(None)
        pen.moveTo(points[0])
        for point in points[1:]:
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"u{ord(letter):X}" for letter in letters})
    shapes = {name: glyph((0, 0), (500, 800), (900, 0)) for name in names[1:]}
    font.setupGlyf({".notdef": glyph((0, 0), (0, 700), (700, 700), (700, 0)), **shapes})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Triangles", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def test_a_text_is_drawn_with_the_first_font_that_has_all_of_it_or_most(font_folder, caplog):
    (font_folder / "a.ttf").write_bytes(b"no font")
    make_font(font_folder / "b.ttf", "\N{CYRILLIC SMALL LETTER ZHE}")
    make_font(font_folder / "c.ttf", f"a{CAT}")
    assert plots.find_font("a") is None
    assert plots.find_font(f"a {CAT}") == str(font_folder / "c.ttf")
    assert caplog.text == ""
    for _ in range(2):  # a letter that no font has
        assert plots.find_font(f"{CAT}{CAT}\N{HIRAGANA LETTER A}") == str(font_folder / "c.ttf")
        assert plots.find_font("b\N{GRINNING FACE}") is None
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "apt-get install fonts-noto-cjk" in caplog.text
    canvas = Image.new("RGB", (400, 60), "white")
    draw_text(ImageDraw.Draw(canvas), (10, 40), CAT, 32, (0, 0, 0), room=400)
    ink = (np.asarray(canvas) < 128).all(axis=-1)
    assert ink[39, 15:30].all() and not ink[20, 10:16].any()  # a triangle: wide below, not above


def test_plots_take_the_letters_that_their_own_font_has_not_from_others(font_folder, caplog):
    pytest.importorskip("matplotlib", reason="requirements/plots.txt")
    make_font(font_folder / "a.ttf", CAT)
    assert plots.plot_fonts(["\u00c4b", CAT, f"{CAT}{CAT}"]) == ["DejaVu Sans", "Triangles"]
    assert caplog.text == ""


def test_letters_without_a_shape_and_line_ends_are_left_out():
    assert plots.readable("a\u200db\ufe0f\n c\t\ud800") == "ab c"
    assert plots.readable("e\u0301") == plots.readable("\u00e9")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text("abW. ", min_size=1, max_size=60), st.integers(30, 300))
def test_a_text_is_drawn_whole_or_as_much_of_its_beginning_as_fits(text, room):
    canvas = Image.new("L", (400, 60))
    draw_text(ImageDraw.Draw(canvas), (10, 40), text, 32, 255, room=room)
    columns = np.flatnonzero(np.asarray(canvas).any(axis=0))
    font = plots.open_font(None, 32)
    length = font.getlength(plots.readable(text))
    assert columns.size == 0 or columns.max() <= 10 + min(room, length) + 2
    if length > room:
        assert columns.max() >= 10 + room - font.getlength("W") - 12
