"""Pictures with what the network says of them drawn beside, and heat maps drawn over them."""

import bisect
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from replknet_paddle.analysis.plots import find_font, open_font, readable
from replknet_paddle.runtime.files import atomic_file, path_in_error

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG"}
PICTURE_HEIGHT = 480  # pixels, of the saved pictures
GRID_COLUMNS = 3
GRID_HEIGHT = 160  # pixels, of each picture in the grid
GRID_PICTURES = 12

MARGIN = 12  # of a 240-pixel picture; everything grows with the height
BAR = (70, 120, 190)
TRACK = (232, 236, 241)
INK = (25, 28, 32)
GREY = (110, 115, 120)
# Blue-green and vermilion, which colour-blind people tell apart; words say the same.
RIGHT = (0, 130, 110)
WRONG = (205, 75, 0)
PALE = 0.75  # of TRACK, over what the network does not see

# Dark blue, violet, orange, light yellow: brightness grows all the way.
HEAT_COLOURS = ("#0a0832", "#5a146e", "#be3755", "#f57d14", "#faf5a0")
_HEAT = np.array([ImageColor.getrgb(colour) for colour in HEAT_COLOURS], np.float32)


class Drawings:
    """Draws predictions as they come: one file each in `folder`, and the first `GRID_PICTURES` in
    `grid_file`; None for none."""

    def __init__(self, class_names: Sequence[str], folder: str | None, grid_file: str | None):
        self.class_names = class_names
        self.folder = folder
        self.grid_file = grid_file
        self.count = 0
        self.cells = []

    def add(self, prediction) -> None:
        """Draw a `Prediction` that has a picture."""
        self.count += 1
        if self.folder is not None:
            with path_in_error(self.folder):
                os.makedirs(self.folder, exist_ok=True)
            # The number keeps apart what has one name in several folders.
            stem = os.path.splitext(os.path.basename(prediction.path))[0]
            name = f"{self.count:06d}_{stem[:50]}.jpg"
            save(self.draw(prediction, PICTURE_HEIGHT), os.path.join(self.folder, name))
        if self.grid_file is not None and len(self.cells) < GRID_PICTURES:
            self.cells.append(self.draw(prediction, GRID_HEIGHT))

    def draw(self, prediction, height: int) -> Image.Image:
        """Return the prediction's picture, heat map if any, and classes, `height` pixels high."""
        folder, name = os.path.split(prediction.path)
        return annotate(
            prediction.picture,
            [self.class_names[label] for label in prediction.labels],
            prediction.scores,
            caption=os.path.join(os.path.basename(folder), name),
            height=height,
            truth=None if prediction.truth is None else self.class_names[prediction.truth],
            heat=prediction.heat,
        )

    def finish(self) -> None:
        """Write the grid, if there is anything in it."""
        if self.cells:
            width, height = self.cells[0].size
            columns, rows = min(GRID_COLUMNS, len(self.cells)), -(-len(self.cells) // GRID_COLUMNS)
            sheet = Image.new("RGB", (columns * width, rows * height), "white")
            for i, cell in enumerate(self.cells):
                sheet.paste(cell, (i % GRID_COLUMNS * width, i // GRID_COLUMNS * height))
            save(sheet, self.grid_file)


def annotate(
    picture: Image.Image,
    texts: Sequence[str],
    scores: Sequence[float],
    *,
    caption: str,
    height: int = 240,
    truth: str | None = None,
    heat: Image.Image | None = None,
) -> Image.Image:
    """Return `picture` on the left, and a bar for each class on the right, the first one on top.

    The result is `height` pixels high and three times as wide. The picture is as large as fits,
    small ones without smoothing, so that their pixels can be seen. Where the true class is known, a
    frame and a line of text say whether the first of `texts` is right, and else both classes.
    `heat`, the picture with the heat map of this first one over it, goes between them and makes the
    result wider.
    """
    margin = MARGIN * height // 240
    small, large = height // 16, height // 13  # of the letters
    width = int(1.4 * height)
    wider = 0 if heat is None else width + margin
    canvas = Image.new("RGB", (3 * height + wider, height), "white")
    draw = ImageDraw.Draw(canvas)

    lines = 1 if truth is None else 2
    tall = height - 2 * margin - 2 * small - (lines - 1) * (small + margin // 2)
    shown = fitted(picture, (width, tall))
    left, top = margin + (width - shown.width) // 2, margin + (tall - shown.height) // 2
    canvas.paste(shown, (left, top))
    middle = margin + width / 2
    if truth is not None:
        is_right = texts[0] == truth
        colour = RIGHT if is_right else WRONG
        edge = max(2, margin // 4)
        right, bottom = left + shown.width + edge - 1, top + shown.height + edge - 1
        frame = (left - edge, top - edge, right, bottom)
        draw.rectangle(frame, outline=colour, width=edge)
        verdict = "right" if is_right else f"is {truth}; taken for {texts[0]}"
        place = (middle, height - margin - small - margin // 2)
        draw_text(draw, place, verdict, small, colour, room=width, anchor="ms")
    draw_text(draw, (middle, height - margin), caption, small, GREY, room=width, anchor="ms")
    if heat is not None:
        canvas.paste(heat.resize(shown.size, Image.Resampling.BICUBIC), (left + wider, top))
        place, said = (middle + wider, height - margin), f"where it looks for {texts[0]}"
        draw_text(draw, place, said, small, GREY, room=width, anchor="ms")

    left, right = width + wider + 2 * margin, canvas.width - margin
    row = (height - 2 * margin) / max(len(texts), 5)
    size = min(large, int(row / 2))
    for i, (text, score) in enumerate(zip(texts, scores)):
        top = margin + i * row
        percent = f"{100 * score:.1f} %"
        room = right - left - open_font(None, size).getlength(percent) - margin
        draw_text(draw, (left, top + size), text, size, INK, room=room)
        draw_text(draw, (right, top + size), percent, size, INK, room=right - left, anchor="rs")
        bar = (left, top + row * 0.62, right, top + row * 0.82)
        draw.rectangle(bar, TRACK)
        if score > 0:
            draw.rectangle((*bar[:2], left + max(1, score * (right - left)), bar[3]), BAR)
    return canvas


def draw_text(draw, place, text: str, pixels: int, colour, *, room: float, anchor="ls") -> None:
    """Draw the beginning of `text` that fits into `room` pixels, by a font that has its letters."""
    text = readable(text[: 50 + int(room)])  # no letter is narrower than a pixel
    font = open_font(find_font(text), pixels)
    if font.getlength(text) > room:
        lengths = range(1, len(text))
        fits = bisect.bisect(lengths, room, key=lambda n: font.getlength(text[:n] + "..."))
        text = text[:fits] + "..."
    draw.text(place, text, colour, font, anchor=anchor)


def overlay(picture: Image.Image, strength: np.ndarray, is_seen: np.ndarray) -> Image.Image:
    """Return a picture, RGB, with heat over it: `strength` (height, width) in [0, 1], where 0 shows
    the bare picture. Where `is_seen` (height, width) is False, the picture is pale."""
    pixels = np.asarray(picture, np.float32)
    steps = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(strength, steps, _HEAT[:, c]) for c in range(3)], axis=-1)
    opacity = np.where(is_seen, 0.7 * strength, PALE)[..., None]
    mixed = (1 - opacity) * pixels + opacity * np.where(is_seen[..., None], colours, TRACK)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return `picture` scaled to just fit `size` (width, height)."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    few = max(picture.size) <= 64
    return picture.resize(target, Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """Write a picture file that has its name when it is whole."""
    suffix = os.path.splitext(path)[1].lower()
    with atomic_file(path, "wb") as file:
        picture.save(file, PICTURE_FORMATS[suffix], quality=90)
