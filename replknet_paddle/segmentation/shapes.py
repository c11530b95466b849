"""Synthetic images of circles, squares and triangles with their labels, to try segmentation on."""

import colorsys
import os

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.data.class_names import CLASS_NAMES_FILE
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.runtime.files import write_text
from replknet_paddle.segmentation.transforms import IGNORED

CLASSES = ("background", "circle", "square", "triangle")
SIDE = 64  # pixels of an image
VAL_EVERY = 5  # every fifth image goes to validation


def make_shapes(folder: str, *, count: int = 200, seed: int = 0) -> None:
    """Write images/, labels/, class_names.txt, train_list.txt and val_list.txt below `folder`.

    The lists are written last: a folder that has both is complete.

    Raises:
        OSError: it cannot be written.
    """
    lists = {True: [], False: []}
    for kind in ("images", "labels"):
        os.makedirs(os.path.join(folder, kind), exist_ok=True)
    for i in range(count):
        paths = [f"{kind}/{i:04d}.png" for kind in ("images", "labels")]
        for path, image in zip(paths, draw(np.random.default_rng((seed, i)))):
            image.save(os.path.join(folder, path))
        lists[i % VAL_EVERY != 0].append(" ".join(paths) + "\n")
    write_text(os.path.join(folder, CLASS_NAMES_FILE), "\n".join(CLASSES) + "\n")
    for is_train, lines in lists.items():
        write_text(os.path.join(folder, LIST_FILES[is_train]), "".join(lines))


def draw(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A noisy grey image of two to four shapes, and its labels; outlines are ignored.

    A class has a range of hues: green circles, blue squares, red triangles.
    """
    image = Image.new("RGB", (SIDE, SIDE), (int(rng.integers(40, 216)),) * 3)
    labels = Image.new("L", (SIDE, SIDE), 0)
    for _ in range(rng.integers(2, 5)):
        label = int(rng.integers(1, len(CLASSES)))
        hue = 120 * label + rng.uniform(-20, 20)  # degrees
        colour = colorsys.hsv_to_rgb(hue % 360 / 360, rng.uniform(0.6, 1), rng.uniform(0.5, 1))
        radius = int(rng.integers(11, 21))
        x, y = rng.integers(radius, SIDE - radius, 2).tolist()
        for picture, fill, outline in (
            (image, tuple(round(255 * channel) for channel in colour), None),
            (labels, label, IGNORED),
        ):
            draw_shape(ImageDraw.Draw(picture), label, (x, y, radius), fill, outline)
    pixels = np.array(image) + rng.normal(0, 12, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), labels


def draw_shape(canvas: ImageDraw.ImageDraw, label: int, place: tuple, fill, outline) -> None:
    """Draw the shape of a class around (x, y) within a radius, pixels."""
    x, y, radius = place
    if CLASSES[label] == "triangle":
        corners = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
        canvas.polygon(corners, fill, outline)
        return
    box = (x - radius, y - radius, x + radius, y + radius)
    shape = canvas.ellipse if CLASSES[label] == "circle" else canvas.rectangle
    shape(box, fill, outline)
