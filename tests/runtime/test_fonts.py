"""Letters are drawn with a font that has them, or as code points; never as boxes."""

import logging

import numpy as np
import pytest
from PIL import Image

from replknet_paddle.runtime import fonts

CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"
TREE = "\N{CJK UNIFIED IDEOGRAPH-6811}"


@pytest.fixture
def font_folder(tmp_path, monkeypatch):
    """The only folder of fonts of this system, empty."""
    caches = (fonts.font_files, fonts.open_font, fonts.has_letter, fonts.font_of)
    monkeypatch.setattr(fonts, "font_folders", lambda: [tmp_path / "fonts"])
    monkeypatch.setattr(fonts, "_reported", set())
    for cache in caches:
        cache.cache_clear()
    (tmp_path / "fonts" / "deep").mkdir(parents=True)
    yield tmp_path / "fonts" / "deep"
    for cache in caches:
        cache.cache_clear()


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


def drawn(text, pixels=32):
    canvas = Image.new("RGB", (400, 60), "white")
    fonts.draw_text(canvas, (10, 40), text, pixels, (0, 0, 0))
    return np.asarray(canvas)


def test_a_letter_comes_from_the_font_that_has_it(font_folder):
    make_font(font_folder / "a.ttf", "\N{CYRILLIC SMALL LETTER ZHE}")
    make_font(font_folder / "b.ttf", CAT)
    assert fonts.font_of(CAT) == str(font_folder / "b.ttf")
    assert fonts.font_of("a") is None and fonts.has_letter(None, "a")
    assert fonts.readable(f"a {CAT}") == f"a {CAT}"
    ink = (drawn(CAT) < 128).all(axis=-1)
    assert ink[39, 15:30].all() and not ink[20, 10:16].any()  # a triangle: wide below, not above


def test_a_letter_that_no_font_has_is_drawn_as_its_code_point_and_reported_once(
    font_folder, caplog
):
    with caplog.at_level(logging.WARNING):
        assert fonts.readable(f"a{CAT}b") == "aU+732B b"
        fonts.readable(CAT)
    assert caplog.text.count("no font of this system has") == 1
    assert "apt-get install fonts-noto-cjk" in caplog.text
    missing = drawn(fonts.readable(CAT))
    np.testing.assert_array_equal(missing, drawn("U+732B"))


@pytest.mark.parametrize(
    "letter, package",
    [
        (TREE, "fonts-noto-cjk"),
        ("\N{HIRAGANA LETTER A}", "fonts-noto-cjk"),
        ("\N{HANGUL SYLLABLE GA}", "fonts-noto-cjk"),
        ("\N{GRINNING FACE}", "fonts-noto-color-emoji"),
        ("\N{THAI CHARACTER KO KAI}", "fonts-noto-core"),
    ],
)
def test_the_package_that_has_the_letter_is_named(font_folder, caplog, letter, package):
    fonts.readable(letter)
    assert f"apt-get install {package} has one" in caplog.text


def test_joiners_variants_and_line_ends_are_of_no_shape(font_folder):
    assert fonts.readable("a\u200db\ufe0f\n c\t") == "ab c"
    assert fonts.readable("e\u0301") == fonts.readable("\u00e9")


def test_a_damaged_font_file_is_passed_over(font_folder):
    (font_folder / "a.ttf").write_bytes(b"no font")
    make_font(font_folder / "b.ttf", CAT)
    assert fonts.font_of(CAT) == str(font_folder / "b.ttf")


def test_text_is_as_long_as_it_is_drawn_and_is_shortened_to_fit(font_folder):
    make_font(font_folder / "a.ttf", CAT)
    text = f"ab{CAT}{CAT}"
    columns = np.flatnonzero((drawn(text) < 128).any(axis=(0, 2)))
    assert columns.max() - 10 == pytest.approx(fonts.text_length(text, 32), abs=5)
    assert fonts.shortened(text, 32, 400) == text
    for room in (20, 60, 100):
        assert fonts.text_length(fonts.shortened(100 * text, 32, room), 32) <= max(room, 30)
    assert fonts.shortened(100 * text, 32, 100).endswith("...")


def test_emoji_are_drawn_in_colour_where_a_font_has_them():
    path = fonts.font_of("\N{GRINNING FACE}")
    if path is None or "Color" not in path:
        pytest.skip("no font of coloured emoji is installed (fonts-noto-color-emoji)")
    pixels = drawn("\N{GRINNING FACE}").astype(int)
    yellow = (pixels[..., 0] > 200) & (pixels[..., 2] < 120)
    assert yellow.sum() > 100
    rows = np.flatnonzero((pixels < 200).any(axis=(1, 2)))
    assert 20 <= np.ptp(rows) <= 45  # of 32 pixels, whatever size the font's pictures have
