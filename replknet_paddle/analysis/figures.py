"""matplotlib figures without a display, written whole or not at all."""

import os

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target, written_whole

DOTS_PER_INCH = 120


def new_figure(width: float, height: float):
    """An empty `matplotlib.figure.Figure`, its sides in inches.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"plotting needs matplotlib ({error}); pip install -r requirements/plots.txt"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def check_figure_target(target: str) -> None:
    """Check before work starts that `save_figure` can write `target`.

    Raises:
        FileNotFoundError: its folder does not exist.
        InputError: matplotlib is missing, or `target` is not named as one of its formats.
    """
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    check_file_target(target, [f".{kind}" for kind in sorted(kinds)])


def save_figure(figure, target: str) -> None:
    """Write a figure in the format that the suffix of `target` names.

    Raises:
        FileNotFoundError, InputError: what `check_figure_target` says.
        OSError: it cannot be written.
    """
    check_figure_target(target)
    with written_whole(target, "wb") as file:
        kind = os.path.splitext(target)[1][1:].lower()
        figure.savefig(file, format=kind, dpi=DOTS_PER_INCH)
