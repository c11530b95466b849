"""Pictures with what the network says of them drawn beside, and heat maps drawn over them."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from replknet_paddle.runtime.files import atomic_file
from replknet_paddle.runtime.fonts import draw_text, shortened, text_length

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG"}

MARGIN = 12  # of a 240-pixel picture; everything grows with the height
BAR = (70, 120, 190)
TRACK = (232, 236, 241)
INK = (25, 28, 32)
GREY = (110, 115, 120)
# Blue-green and vermilion, which colour-blind people tell apart; words say the same.
RIGHT = (0, 130, 110)
WRONG = (205, 75, 0)

# Dark blue, violet, orange, light yellow: brightness grows all the way.
HEAT_COLOURS = ("#0a0832", "#5a146e", "#be3755", "#f57d14", "#faf5a0")
_HEAT = np.array([ImageColor.getrgb(colour) for colour in HEAT_COLOURS], np.float32)


def annotate(
    picture: Image.Image,
    texts: Sequence[str],
    scores: Sequence[float],
    *,
    caption: str,
    height: int = 240,
    truth: str | None = None,
) -> Image.Image:
    """`picture` on the left, a bar for each class on the right, the most probable one on top.

    Args:
        picture: RGB; shown as large as fits, small ones without smoothing, so that their pixels
            can be seen.
        texts, scores: names and probabilities of some classes, in the order to show them in.
        caption: what to write below the picture.
        height: of the result, pixels; its width is three times that.
        truth: name of the true class, where it is known: a frame and a line of text then say
            whether the first of `texts` is right.
    """
    margin = MARGIN * height // 240
    small, large = height // 16, height // 13  # of the letters
    canvas = Image.new("RGB", (3 * height, height), "white")
    draw = ImageDraw.Draw(canvas)

    width = int(1.4 * height)
    lines = 1 if truth is None else 2
    tall = height - 2 * margin - 2 * small - (lines - 1) * (small + margin // 2)
    shown = fitted(picture, (width, tall))
    left, top = margin + (width - shown.width) // 2, margin + (tall - shown.height) // 2
    canvas.paste(shown, (left, top))
    middle = margin + width / 2
    if truth is not None:
        is_right = bool(texts) and texts[0] == truth
        colour = RIGHT if is_right else WRONG
        edge = max(2, margin // 4)
        right, bottom = left + shown.width + edge - 1, top + shown.height + edge - 1
        frame = (left - edge, top - edge, right, bottom)
        draw.rectangle(frame, outline=colour, width=edge)
        verdict = shortened("right" if is_right else f"wrong: {truth}", small, width)
        place = (middle, height - margin - small - margin // 2)
        draw_text(canvas, place, verdict, small, colour, anchor="middle")
    caption = shortened(caption, small, width)
    draw_text(canvas, (middle, height - margin), caption, small, GREY, anchor="middle")

    left, right = width + 2 * margin, canvas.width - margin
    row = (height - 2 * margin) / max(len(texts), 5)
    for i, (text, score) in enumerate(zip(texts, scores)):
        top = margin + i * row
        percent = f"{100 * score:.1f} %"
        size = min(large, int(row / 2))
        baseline = top + size
        room = right - left - text_length(percent, size) - margin
        draw_text(canvas, (left, baseline), shortened(text, size, room), size, INK)
        draw_text(canvas, (right, baseline), percent, size, INK, anchor="right")
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
    with atomic_file(path, "wb") as file:
        picture.save(file, PICTURE_FORMATS[suffix], quality=90)
