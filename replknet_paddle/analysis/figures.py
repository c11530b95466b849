"""matplotlib figures without a display, in fonts that have their texts, written whole or not."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from replknet_paddle.analysis.fonts import plot_fonts
from replknet_paddle.runtime.extras import import_extra
from replknet_paddle.runtime.files import check_file_target, written_whole

DOTS_PER_INCH = 120


@contextlib.contextmanager
def new_figure(width: float, height: float, names: Sequence[str]) -> Iterator:
    """An empty `matplotlib.figure.Figure` to draw on in this block.

    Args:
        width, height: inches.
        names: texts of the user's, as `readable` gives them, for which fonts are chosen.

    Raises:
        InputError: matplotlib is missing.
    """
    figures = import_extra("matplotlib.figure", "plots")
    matplotlib = import_extra("matplotlib", "plots")
    with matplotlib.rc_context({"font.family": plot_fonts(names)}):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def check_figure_target(target: str) -> None:
    """Check before work starts that `save_figure` can write `target`.

    Raises:
        FileNotFoundError: its folder does not exist.
        InputError: matplotlib is missing, or `target` is not named as one of its formats.
    """
    figures = import_extra("matplotlib.figure", "plots")
    kinds = sorted(figures.Figure().canvas.get_supported_filetypes())
    check_file_target(target, [f".{kind}" for kind in kinds])


def save_figure(figure, target: str) -> None:
    """Write a figure in the format that the suffix of `target` names.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(target, "wb") as file:
        kind = os.path.splitext(target)[1][1:].lower()
        figure.savefig(file, format=kind, dpi=DOTS_PER_INCH)
