"""The picture of a confusion matrix."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.deploy.pictures import GREY, INK, TRACK
from replknet_paddle.runtime.fonts import draw_text, shortened, text_length

LABELLED_CLASSES = 40  # more have no room for names
CELL = 44  # pixels, with names
SIDE = 1000  # pixels, at least, without
TEXT = 15  # height of the letters
NAME_ROOM = 220  # pixels, at most
MARGIN = 16
LOW = "share of the true class's images: 0 %"  # and a scale of shades, and 100 %
STEPS = 60  # pixels
HIGH_ROOM = 80
FULL = np.array((30, 75, 140), np.float32)


def draw_confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Each row is a true class, each column a predicted one; the shade is the share of the row.

    Args:
        counts: (classes, classes) integers.
        names: of the classes; written, with the counts, for up to `LABELLED_CLASSES`.
    """
    has_names = len(counts) <= LABELLED_CLASSES
    cell = CELL if has_names else max(1, -(-SIDE // len(counts)))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colours = 255 + shares[..., None] * (FULL - 255)
    matrix = Image.fromarray(np.round(colours).astype(np.uint8)).resize(
        (cell * len(counts),) * 2, Image.Resampling.NEAREST
    )
    labels, room = [], 0
    if has_names:
        labels = [shortened(name, TEXT, NAME_ROOM) for name in names]
        room = round(max(text_length(label, TEXT) for label in labels)) + MARGIN // 2

    left, top = 2 * MARGIN + TEXT + room, 2 * MARGIN + TEXT + room
    right = left + max(matrix.width, round(text_length(LOW, TEXT)) + STEPS + HIGH_ROOM) + MARGIN
    size = right, top + matrix.height + 3 * MARGIN + TEXT
    canvas = Image.new("RGB", size, "white")
    canvas.paste(matrix, (left, top))
    draw = ImageDraw.Draw(canvas)
    frame = (left - 1, top - 1, left + matrix.width, top + matrix.height)
    draw.rectangle(frame, outline=GREY)
    draw_text(canvas, (left, MARGIN + TEXT), "predicted class", TEXT, GREY)
    _draw_upright(canvas, (MARGIN, top), "true class", GREY)
    for i, label in enumerate(labels):
        middle = i * cell + cell // 2
        place = (left - MARGIN // 2, top + middle + TEXT // 3)
        draw_text(canvas, place, label, TEXT, INK, anchor="right")
        _draw_upright(canvas, (left + middle - TEXT // 2, top - MARGIN // 2), label, INK, up=True)
    if has_names:
        _draw_counts(canvas, (left, top), counts, shares)
    _draw_scale(canvas, (left, top + matrix.height + MARGIN))
    return canvas


def _draw_counts(canvas, corner: tuple[int, int], counts: np.ndarray, shares: np.ndarray) -> None:
    draw = ImageDraw.Draw(canvas)
    for i in range(len(counts)):
        x, y = corner[0] + i * CELL, corner[1] + i * CELL
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=INK)
    for row, column in np.argwhere(counts > 0).tolist():
        x, y = corner[0] + column * CELL, corner[1] + row * CELL
        colour = (255, 255, 255) if shares[row, column] > 0.5 else INK
        place = (x + CELL / 2, y + CELL / 2 + TEXT // 3)
        text = shortened(str(counts[row, column]), TEXT - 2, CELL)
        draw_text(canvas, place, text, TEXT - 2, colour, anchor="middle")


def _draw_upright(canvas, place: tuple[int, int], text: str, colour, *, up: bool = False) -> None:
    """Text from bottom to top, whose top, or with `up` bottom, is at `place`."""
    width = max(1, round(text_length(text, TEXT)))
    strip = Image.new("RGB", (width, TEXT + TEXT // 2), "white")
    draw_text(strip, (0, TEXT), text, TEXT, colour)
    strip = strip.transpose(Image.Transpose.ROTATE_90)
    canvas.paste(strip, (place[0], place[1] - strip.height if up else place[1]))


def _draw_scale(canvas, place: tuple[int, int]) -> None:
    """What the shades mean."""
    draw = ImageDraw.Draw(canvas)
    draw_text(canvas, (place[0], place[1] + TEXT), LOW, TEXT, GREY)
    x = place[0] + round(text_length(LOW, TEXT)) + 8
    for i in range(STEPS):
        colour = tuple(int(c) for c in np.round(255 + i / (STEPS - 1) * (FULL - 255)))
        draw.rectangle((x + i, place[1] + 2, x + i, place[1] + TEXT), fill=colour)
    draw.rectangle((x - 1, place[1] + 1, x + STEPS, place[1] + TEXT + 1), outline=TRACK)
    draw_text(canvas, (x + STEPS + 8, place[1] + TEXT), "100 %", TEXT, GREY)
