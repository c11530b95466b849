"""Fonts of this system for people's texts, in any script, in drawn pictures and in plots.

Pillow's own font has Latin letters alone, so a text is drawn with the first font of the system that
has all of its letters.
"""

import functools
import logging
import os
import unicodedata
from collections.abc import Sequence

from PIL import ImageFont

logger = logging.getLogger(__name__)

FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", r"C:\Windows\Fonts"),
)
SUFFIXES = (".ttf", ".otf", ".ttc")
# Preferred fonts first, by the beginning of the file's name in lower case.
PREFERRED = (
    *("dejavusans.ttf", "notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "msyh"),
    *("pingfang", "hiragino", "malgun", "notosans", "seguiemj", "symbola"),
)
NOT_A_CHARACTER = "\uffff"  # which every font draws as it draws what it does not have


def readable(text: str) -> str:
    """Return `text` on one line, without letters of no shape: joiners, directions, variants."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFC", " ".join(text.split()))
        if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") and letter not in "\ufe0e\ufe0f"
    ).strip()


@functools.lru_cache(maxsize=4096)
def find_font(text: str, own: str | None = None) -> str | None:
    """Return the file of the first font that has the letters of `text`, or most of them.

    The library's `own` font comes first, None for Pillow's. A warning is given for the first text
    that no font has all letters of.
    """
    letters = set(text) - {" "}
    best, most = own, -1
    for path in (own, *font_files()):
        count = sum(has_letter(path, letter) for letter in letters)
        if count > most:
            best, most = path, count
        if count == len(letters):
            return best
    _warn_of_missing_letters()
    return best


@functools.cache
def _warn_of_missing_letters() -> None:
    """Say which packages have fonts, once."""
    logger.warning(
        "no font of this system has all letters of a text, so some are drawn as boxes; on Debian "
        "and Ubuntu, apt-get install fonts-noto-cjk has Chinese, Japanese and Korean ones, "
        "fonts-noto-core most others"
    )


@functools.cache
def font_files() -> tuple[str, ...]:
    """Return the font files of this system, preferred ones first, regular ones before bold ones."""
    found = [
        os.path.join(folder, name)
        for top in FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(top))
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
    """Return a font of `find_font` with letters of this height; OSError if it has none."""
    return ImageFont.load_default(pixels) if path is None else ImageFont.truetype(path, pixels)


@functools.lru_cache(maxsize=65536)
def has_letter(path: str | None, letter: str) -> bool:
    """Return whether a font has a shape for `letter`."""
    try:
        font = open_font(path, 20)
        drawn, missing = font.getmask(letter), font.getmask(NOT_A_CHARACTER)
    except (OSError, ValueError):
        return False
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def plot_fonts(texts: Sequence[str]) -> list[str]:
    """Return matplotlib's `font.family`, of which it takes each letter from the first that fits."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")  # which matplotlib brings
    families = {"DejaVu Sans": None}  # in order
    for text in texts:
        path = find_font(text, own)
        if path != own:
            font_manager.fontManager.addfont(path)
            families[font_manager.FontProperties(fname=path).get_name()] = None
    return list(families)
