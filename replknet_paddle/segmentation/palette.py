"""Colours of classes: pictures of label maps, and maps laid over their image."""

import colorsys

import numpy as np
from PIL import Image

GOLDEN_RATIO = 0.618033988749895
OVERLAY_SHARE = 0.5  # of the class's colour in an overlay


def palette_of(colours: str | None, num_classes: int) -> np.ndarray:
    """The colour of each class, uint8 (num_classes, 3).

    Args:
        colours: as SEGMENTATION.PALETTE has them; None: computed ones.
    """
    if colours is None:
        return computed_palette(num_classes)
    return np.array([list(bytes.fromhex(colour)) for colour in colours.split()], np.uint8)


def computed_palette(num_classes: int) -> np.ndarray:
    """Colours whose neighbours differ: hues in steps of the golden ratio, three levels of value."""
    colours = [
        colorsys.hsv_to_rgb(i * GOLDEN_RATIO % 1, 0.75, (1.0, 0.8, 0.6)[i % 3])
        for i in range(num_classes)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def label_picture(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """A palette image of a label map (H, W) uint8: its numbers are the classes."""
    picture = Image.frombytes("P", labels.shape[::-1], np.ascontiguousarray(labels).tobytes())
    picture.putpalette(palette.tobytes())
    return picture


def overlay(pixels: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The image (H, W, 3) uint8 tinted by the classes of its pixels (H, W)."""
    tinted = (1 - OVERLAY_SHARE) * pixels + OVERLAY_SHARE * palette[labels]
    return Image.fromarray(np.round(tinted).astype(np.uint8))
