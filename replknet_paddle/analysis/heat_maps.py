"""Arrays between 0 and 1 as pictures, side by side, with one colour bar."""

from collections.abc import Mapping

import numpy as np

from replknet_paddle.analysis.figures import new_figure
from replknet_paddle.analysis.fonts import readable

COLORS = "inferno"
PANEL_INCHES = 4.0


def draw_heat_maps(maps: Mapping[str, np.ndarray], *, label: str):
    """A figure of arrays side by side.

    Args:
        maps: (H, W) by title, values from 0 to 1.
        label: what the colours mean, for the colour bar.

    Raises:
        InputError: matplotlib is missing.
    """
    titles = [readable(title) for title in maps]
    width, height = PANEL_INCHES * len(maps) + 1, PANEL_INCHES + 0.5
    with new_figure(width, height, titles) as figure:
        panels = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, title, values in zip(panels, titles, maps.values()):
            image = axes.imshow(values, cmap=COLORS, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, parse_math=False)  # it may be a file's name
        figure.colorbar(image, ax=list(panels), label=label)
    return figure
