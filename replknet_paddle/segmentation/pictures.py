"""Label maps as pictures: the colours of classes, overlays, and legends that name the colours."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.analysis.plots import open_font
from replknet_paddle.deploy.drawing import GREY, INK, draw_text

GOLDEN_RATIO = 0.618033988749895
OVERLAY_SHARE = 0.5  # of the class's colour in an overlay

LEGEND_ROWS = 20  # beyond which classes share the last one
LEGEND_WIDTH = 18  # in heights of its letters
LEAST_LETTERS = 14  # pixels, the height of letters that can be read

Row = tuple[str, Sequence[int] | None, str]  # of a legend: name, colour or None, share


def palette_of(colours: str | None, num_classes: int) -> np.ndarray:
    """Return the colour of each class, uint8 (num_classes, 3): those of SEGMENTATION.PALETTE, or
    ones whose neighbours differ: hues by the golden ratio, three levels of value."""
    if colours is not None:
        return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.uint8)
    computed = [
        colorsys.hsv_to_rgb(i * GOLDEN_RATIO % 1, 0.75, (1.0, 0.8, 0.6)[i % 3])
        for i in range(num_classes)
    ]
    return np.round(255 * np.array(computed)).astype(np.uint8)


def label_picture(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Return a palette image of a label map (H, W) uint8: its numbers are the classes."""
    picture = Image.frombytes("P", labels.shape[::-1], np.ascontiguousarray(labels).tobytes())
    picture.putpalette(palette.tobytes())
    return picture


def tinted(pixels: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Return the image (H, W, 3) uint8 tinted by the classes of its pixels (H, W)."""
    mixed = np.empty_like(pixels)
    for row, of_row, classes in zip(mixed, pixels, labels):  # at once would take 24 bytes a value
        row[:] = np.round((1 - OVERLAY_SHARE) * of_row + OVERLAY_SHARE * palette[classes])
    return Image.fromarray(mixed)


def class_shares(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the share that each class has of the label map's pixels, (num_classes,) float64;
    zeros for a map without pixels."""
    return np.bincount(labels.ravel(), minlength=num_classes) / max(labels.size, 1)


def largest_first(shares: np.ndarray) -> list[int]:
    """Return the classes that have a share, (num_classes,) -> the largest first."""
    return [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > 0]


def legend_rows(shares: np.ndarray, names: Sequence[str], palette: np.ndarray) -> list[Row]:
    """Return the rows of a legend: the classes that are there, the largest first.

    Args:
        shares: (num_classes, k), the shares of pixels in each of the k label maps that the legend
            belongs to.
    """
    order = largest_first(shares.sum(axis=1))
    if len(order) <= LEGEND_ROWS:
        own, others = order, []
    else:
        own, others = order[: LEGEND_ROWS - 1], order[LEGEND_ROWS - 1 :]
    rows = [(names[i], palette[i].tolist(), _percent(shares[i])) for i in own]
    if others:
        rows.append((f"{len(others)} others", None, _percent(shares[others].sum(axis=0))))
    return rows


def _percent(shares: np.ndarray) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in shares) + " %"


def draw_legend(rows: Sequence[Row], letters: int) -> Image.Image:
    """Return the legend of these rows, with letters so many pixels high."""
    half, step = letters // 2, letters * 3 // 2
    legend = Image.new("RGB", (LEGEND_WIDTH * letters, step * len(rows) + half), "white")
    draw = ImageDraw.Draw(legend)
    left, right = half + step, legend.width - half
    for i, (name, colour, share) in enumerate(rows):
        top = half + i * step
        if colour is not None:
            # An outline, for a colour may be as white as the paper.
            draw.rectangle((half, top, half + letters, top + letters), tuple(colour), GREY)
        base, taken = top + letters * 9 // 10, open_font(None, letters).getlength(share)
        draw_text(draw, (right, base), share, letters, INK, room=right - left, anchor="rs")
        draw_text(draw, (left, base), name, letters, INK, room=right - left - taken - half)
    return legend


def with_legend(picture: Image.Image, rows: Sequence[Row]) -> Image.Image:
    """Return a picture at its own size, and on its right a legend of these rows."""
    # As high as the picture, if it has all of its rows.
    legend = draw_legend(rows, max(LEAST_LETTERS, min(picture.size) // 32))
    size = (picture.width + legend.width, max(picture.height, legend.height))
    sheet = Image.new("RGB", size, "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(legend, (picture.width, 0))
    return sheet
