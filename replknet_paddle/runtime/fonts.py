"""Text in pictures, in any writing system that a font of this machine has.

Pillow's own font has Latin letters alone, and draws a box for each other one. Here each letter is
drawn with the first font of the system that has it; what none has is drawn as its code point, and a
warning names the package to install.
"""

import functools
import itertools
import logging
import os
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

logger = logging.getLogger(__name__)

# Preferred ones first, by the beginning of the file's name in lower case.
PREFERRED = (
    *("notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "msyh", "pingfang", "hiragino"),
    *("malgun", "notocoloremoji", "apple color emoji", "seguiemj", "symbola", "dejavusans.ttf"),
)
SUFFIXES = (".ttf", ".otf", ".ttc")
# Sizes in which fonts of pictures, such as NotoColorEmoji, have their only strike.
STRIKES = (109, 160, 136, 128, 96, 64)
NOT_A_CHARACTER = "\uffff"  # which every font draws as what it does not have

# Letters that a warning has been given for.
_reported: set[str] = set()


def font_folders() -> list[Path]:
    """The folders where this system keeps fonts."""
    home = Path.home()
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")]
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    return [*(Path(folder, "fonts") for folder in data.split(":")), own / "fonts", home / ".fonts"]


@functools.cache
def font_files() -> tuple[str, ...]:
    """The font files of this system, preferred ones first, regular ones before bold ones."""
    found = [
        os.path.join(folder, name)
        for top in font_folders()
        for folder, _, names in os.walk(top)
        for name in names
        if name.lower().endswith(SUFFIXES)
    ]

    def rank(path: str):
        name = os.path.basename(path).lower()
        place = next((i for i, start in enumerate(PREFERRED) if name.startswith(start)), 99)
        return place, "regular" not in name, len(name), name

    return tuple(sorted(found, key=rank))


@functools.lru_cache(maxsize=256)
def open_font(path: str | None, pixels: int) -> ImageFont.FreeTypeFont:
    """A font of this height, or, of a font of pictures, of the height it has.

    Args:
        path: the file; None for Pillow's own.

    Raises:
        OSError: it cannot be read.
    """
    if path is None:
        return ImageFont.load_default(pixels)
    problem = None
    for size in (pixels, *STRIKES):
        try:
            return ImageFont.truetype(path, size)
        except OSError as error:
            problem = error
    raise problem


@functools.lru_cache(maxsize=65536)
def has_letter(path: str | None, letter: str) -> bool:
    """Whether a font file has a glyph for `letter`."""
    try:
        font = open_font(path, 20)
        return _drawn(font, letter) != _drawn(font, NOT_A_CHARACTER)
    except (OSError, ValueError):
        return False


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    tile = Image.new("RGB", (2 * round(font.size),) * 2)
    place = (0, 1.5 * font.size)
    ImageDraw.Draw(tile).text(place, letter, "white", font, anchor="ls", embedded_color=True)
    return tile.tobytes()


@functools.lru_cache(maxsize=65536)
def font_of(letter: str) -> str | None:
    """The font file to draw `letter` with; None for Pillow's own, or where none has it."""
    if has_letter(None, letter):
        return None
    return next((path for path in font_files() if has_letter(path, letter)), None)


def readable(text: str) -> str:
    """`text` on one line, with letters that no font has as their code points.

    A warning says once for each such letter which package has a font for it.
    """
    shown, missing = [], []
    for letter in unicodedata.normalize("NFC", " ".join(text.split())):
        if unicodedata.category(letter) in ("Cf", "Cc", "Cs") or letter in "\ufe0e\ufe0f":
            continue  # joiners, directions and variants: of no shape
        if letter != " " and font_of(letter) is None and not has_letter(None, letter):
            missing.append(letter)
            letter = f"U+{ord(letter):04X} "
        shown.append(letter)
    new = sorted(set(missing) - _reported)
    if new:
        _reported.update(new)
        logger.warning(
            "no font of this system has %s, drawn as code points; on Debian and Ubuntu, "
            "apt-get install %s has one",
            " ".join(new[:10]) + (" ..." if len(new) > 10 else ""),
            " ".join(sorted({_package_of(letter) for letter in new})),
        )
    return "".join(shown).strip()


def _package_of(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC", "FULLWIDTH")):
        return "fonts-noto-cjk"
    if unicodedata.category(letter) == "So":
        return "fonts-noto-color-emoji"
    return "fonts-noto-core"


@dataclass(frozen=True)
class Run:
    """Neighbouring letters of one font; `scale` brings a font of pictures to the height."""

    text: str
    font: ImageFont.FreeTypeFont
    scale: float

    @property
    def length(self) -> float:
        return self.scale * self.font.getlength(self.text)


def _runs(text: str, pixels: int) -> list[Run]:
    runs = []
    for path, letters in itertools.groupby(text, lambda x: None if x == " " else font_of(x)):
        font = open_font(path, pixels)
        runs.append(Run("".join(letters), font, pixels / font.size))
    return runs


def text_length(text: str, pixels: int) -> float:
    """Pixels that `text`, as `readable` gives it, takes in letters of this height."""
    return sum(run.length for run in _runs(text, pixels))


def shortened(text: str, pixels: int, room: float) -> str:
    """`text`, readable, or as much of its beginning as fits into `room` pixels, and an ellipsis."""
    text = readable(text[: 50 + int(room)])  # no letter is narrower than a pixel
    if text_length(text, pixels) <= room:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if text_length(text[:middle] + "...", pixels) <= room:
            low = middle
        else:
            high = middle - 1
    return text[:low] + "..."


def draw_text(
    canvas: Image.Image,
    place: tuple[float, float],
    text: str,
    pixels: int,
    colour: tuple[int, int, int],
    *,
    anchor: str = "left",
) -> None:
    """Draw one line, as `readable` or `shortened` gives it.

    Args:
        canvas: RGB.
        place: x of the text's left end, middle or right end, as `anchor` says; y of its baseline.
        pixels: height of the letters.
        anchor: `left`, `middle` or `right`.
    """
    draw = ImageDraw.Draw(canvas)
    x, y = place
    x -= {"left": 0, "middle": 0.5, "right": 1}[anchor] * text_length(text, pixels)
    for run in _runs(text, pixels):
        if run.scale == 1:
            draw.text((x, y), run.text, colour, run.font, anchor="ls", embedded_color=True)
        else:
            _paste_scaled(canvas, (x, y), run, pixels)
        x += run.length


def _paste_scaled(canvas: Image.Image, place: tuple[float, float], run: Run, pixels: int) -> None:
    """Draw pictures of letters at the size they have, and scale them to the text's."""
    size = (max(1, round(run.font.getlength(run.text))), 2 * round(run.font.size))
    tile = Image.new("RGBA", size)
    baseline = round(1.5 * run.font.size)
    draw = ImageDraw.Draw(tile)
    draw.text((0, baseline), run.text, font=run.font, anchor="ls", embedded_color=True)
    tile = tile.resize([max(1, round(side * run.scale)) for side in size], Image.Resampling.BOX)
    corner = (round(place[0]), round(place[1] - baseline * run.scale))
    canvas.paste(tile, corner, tile)


def plot_fonts(texts: Sequence[str]) -> list[str]:
    """Make the fonts that `texts` need known to matplotlib; the `font.family` to draw them with."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    for path in sorted({font_of(letter) or "" for text in texts for letter in text} - {""}):
        if open_font(path, 20).size == 20:  # matplotlib draws no fonts of pictures
            font_manager.fontManager.addfont(path)
            families.append(font_manager.FontProperties(fname=path).get_name())
    return families
