"""Pictures with what the network says of them drawn beside, and heat maps drawn over them."""

import bisect
import functools
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from replknet_paddle.runtime.files import written_whole

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG"}

MARGIN = 12  # of a 240-pixel picture; everything grows with the height
BAR = (70, 120, 190)
TRACK = (232, 236, 241)
INK = (25, 28, 32)
GREY = (110, 115, 120)

# Pillow's own font has Latin letters alone; these are where systems keep others.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "DejaVuSans.ttf",
)

# Dark blue, violet, orange, light yellow: brightness grows all the way.
_HEAT = np.array(
    [[10, 8, 50], [90, 20, 110], [190, 55, 85], [245, 125, 20], [250, 245, 160]], np.float32
)


def annotate(
    picture: Image.Image,
    texts: Sequence[str],
    scores: Sequence[float],
    *,
    caption: str,
    height: int = 240,
) -> Image.Image:
    """`picture` on the left, a bar for each class on the right, the most probable one on top.

    Args:
        picture: RGB; shown as large as fits, small ones without smoothing, so that their pixels
            can be seen.
        texts, scores: names and probabilities of some classes, in the order to show them in.
        caption: what to write below the picture.
        height: of the result, pixels; its width is three times that.
    """
    margin = MARGIN * height // 240
    small, large = height // 16, height // 13  # of the letters
    canvas = Image.new("RGB", (3 * height, height), "white")
    draw = ImageDraw.Draw(canvas)

    width, tall = int(1.4 * height), height - 2 * margin - 2 * small
    shown = fitted(picture, (width, tall))
    canvas.paste(shown, (margin + (width - shown.width) // 2, margin + (tall - shown.height) // 2))
    font = font_for(caption, small)
    caption = _shortened(caption, font, width)
    draw.text((margin + width / 2, height - margin), caption, GREY, font, anchor="ms")

    left, right = width + 2 * margin, canvas.width - margin
    row = (height - 2 * margin) / max(len(texts), 5)
    for i, (text, score) in enumerate(zip(texts, scores)):
        top = margin + i * row
        percent = f"{100 * score:.1f} %"
        size = min(large, int(row / 2))
        number, font = font_for(percent, size), font_for(text, size)
        room = right - left - number.getlength(percent) - margin
        draw.text((left, top), _shortened(text, font, room), INK, font)
        draw.text((right, top), percent, INK, number, anchor="ra")
        bar = (left, top + row * 0.62, right, top + row * 0.82)
        draw.rectangle(bar, TRACK)
        if score > 0:
            draw.rectangle((*bar[:2], left + max(1, score * (right - left)), bar[3]), BAR)
    return canvas


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, side by side and below each other, `columns` in a row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (min(columns, len(pictures)) * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def overlay(pixels: np.ndarray, heat: np.ndarray) -> Image.Image:
    """A heat map over what the network saw.

    Args:
        pixels: (H, W, 3) uint8.
        heat: (h, w) float, >= 0, for the same section of the picture; 0 shows the bare picture.

    Returns:
        A picture of at least 384 pixels a side, in the shape of `pixels`.
    """
    peak = float(heat.max())
    strength = Image.fromarray((heat / peak if peak > 0 else heat).astype(np.float32))
    picture = fitted(Image.fromarray(pixels), (384, 384)) if max(pixels.shape) < 384 else None
    picture = picture or Image.fromarray(pixels)
    strength = np.asarray(strength.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(strength, steps, _HEAT[:, c]) for c in range(3)], axis=-1)
    opacity = 0.7 * strength[..., None]
    mixed = (1 - opacity) * np.asarray(picture, np.float32) + opacity * colours
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`picture` scaled to just fit `size` (width, height)."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    few = max(picture.size) <= 64
    return picture.resize(target, Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)


def save(picture: Image.Image, path: str) -> None:
    """Write a picture file that has its name when it is whole."""
    suffix = os.path.splitext(path)[1].lower()
    with written_whole(path, "wb") as file:
        picture.save(file, PICTURE_FORMATS[suffix], quality=90)


def font_for(text: str, pixels: int) -> ImageFont.ImageFont:
    """A font that has the letters of `text`, where the system has one."""
    return _font(text.isascii(), pixels)


@functools.lru_cache
def _font(is_ascii: bool, pixels: int) -> ImageFont.ImageFont:
    if not is_ascii:
        for name in _WIDE_FONTS:
            try:
                return ImageFont.truetype(name, pixels)
            except OSError:
                continue
    return ImageFont.load_default(pixels)


def _shortened(text: str, font, pixels: float) -> str:
    """`text`, or as much of its beginning as fits, and an ellipsis."""
    text = " ".join(text.split())
    if font.getlength(text) <= pixels:
        return text
    lengths = range(len(text) + 1)
    fits = bisect.bisect_right(lengths, pixels, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(0, fits - 1)] + "..."
