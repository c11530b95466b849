"""The picture of an inference benchmark: milliseconds with their ranges, a panel a batch size."""

from collections.abc import Sequence
from pathlib import Path

from replknet_paddle.runtime.files import atomic_file
from replknet_paddle.runtime.packages import import_extra


def chart_suffixes() -> list[str]:
    """Endings of the pictures that can be drawn.

    Raises:
        InputError: matplotlib is missing.
    """
    figures = import_extra("matplotlib.figure", "plots")
    return [f".{kind}" for kind in sorted(figures.Figure().canvas.get_supported_filetypes())]


def draw_chart(path: str, rows: Sequence, title: str) -> None:
    """Draw the median time of a batch as points, with lines from the fastest to the slowest run.

    The axis is logarithmic, so that eager mode, some ten times slower, leaves the others legible.

    Args:
        rows: `inference.Row`, one or several batch sizes.

    Raises:
        InputError: matplotlib is missing.
    """
    batches = sorted({row.batch for row in rows})
    figure = build_chart(rows, batches, title)
    with atomic_file(path, "wb") as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:])


def build_chart(rows: Sequence, batches: Sequence[int], title: str):
    """The figure of `draw_chart`, a panel for each of `batches`."""
    figures = import_extra("matplotlib.figure", "plots")
    ticker = import_extra("matplotlib.ticker", "plots")
    count = max(sum(row.batch == batch for row in rows) for batch in batches)
    figure = figures.Figure(figsize=(7 * len(batches), 1.6 + 0.45 * count), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
        shown = [row for row in rows if row.batch == batch][::-1]
        medians = [row.median_ms for row in shown]
        eager = next((row.median_ms for row in shown if row.backend == "dygraph"), None)
        places = range(len(shown))
        colours = ["C1" if row.backend == "dygraph" else "C0" for row in shown]
        axes.hlines(places, min(medians) / 1.3, medians, colors="0.85", linewidth=1, zorder=1)
        fastest, slowest = [row.min_ms for row in shown], [row.max_ms for row in shown]
        axes.hlines(places, fastest, slowest, colors=colours, linewidth=3, zorder=2)
        axes.scatter(medians, places, color=colours, zorder=3)
        axes.set_yticks(places, [name_of(row) for row in shown])
        for place, row in zip(places, shown):
            text = f"{row.median_ms:,.0f} ms" if row.median_ms >= 100 else f"{row.median_ms:.3g} ms"
            if eager and row.backend != "dygraph":
                text += f", eager / {eager / row.median_ms:.1f}"
            axes.annotate(
                text, (row.max_ms, place), (8, 0), textcoords="offset points", va="center"
            )
        axes.set_xscale("log")
        axes.set_xlim(min(fastest) / 1.3, 6 * max(slowest))
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("milliseconds a batch: median, and range of the runs (logarithmic)")
    return figure


def name_of(row) -> str:
    """How the chart calls a row."""
    if row.backend == "dygraph":
        return "eager mode (Paddle's own)"
    return f"{row.backend} {row.precision}, {row.network}"
