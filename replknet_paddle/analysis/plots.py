"""Pictures by matplotlib: curves of training runs, heat maps, and the frame that both are drawn in.

Figures need no display, are drawn in fonts that have their texts, and are written whole or not at
all. Nothing here imports Paddle.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from replknet_paddle.analysis.fonts import plot_fonts, readable
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file, check_file_target
from replknet_paddle.runtime.packages import import_extra

DOTS_PER_INCH = 120
HEAT_COLORS = "inferno"
PANEL_INCHES = 4.0

# Panels and the keys of metrics.jsonl that each shows, with their line styles.
LOSSES = {"loss (nats)": {"train_loss": ":", "val_loss": "-", "val_ema_loss": "--"}}
# By which the best weights are chosen, in classification and in segmentation.
SCORES = {
    "top-1 (%)": {"val_top1_percent": "-", "val_ema_top1_percent": "--"},
    "mIoU (%)": {"val_miou_percent": "-", "val_ema_miou_percent": "--"},
}


@contextlib.contextmanager
def new_figure(width: float, height: float, names: Sequence[str]) -> Iterator:
    """Give an empty `matplotlib.figure.Figure`, in inches, to draw on in this block.

    Fonts are chosen for `names`, texts of the user's as `readable` gives them.
    """
    figures = import_extra("matplotlib.figure", "plots")
    matplotlib = import_extra("matplotlib", "plots")
    with matplotlib.rc_context({"font.family": plot_fonts(names)}):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def check_figure_target(target: str) -> None:
    """Raise InputError or OSError before work starts, if `save_figure` cannot write `target`."""
    figures = import_extra("matplotlib.figure", "plots")
    kinds = sorted(figures.Figure().canvas.get_supported_filetypes())
    check_file_target(target, [f".{kind}" for kind in kinds])


def save_figure(figure, target: str) -> None:
    """Write a figure in the format that the suffix of `target` names."""
    with atomic_file(target, "wb") as file:
        kind = os.path.splitext(target)[1][1:].lower()
        figure.savefig(file, format=kind, dpi=DOTS_PER_INCH)


def read_metrics(run_folder: str) -> list[dict]:
    """Return the records of a run, one per epoch."""
    path = os.path.join(run_folder, "metrics.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no {path}; give the folder of a training run")
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                record["epoch"] = int(record["epoch"])
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{path}, line {number}: not a record of an epoch") from None
            records.append(record)
    if not records:
        raise InputError(f"{path} holds no epoch yet")
    return records


def best_record(records: list[dict]) -> tuple[str, dict] | None:
    """Return key and record of the best top-1 accuracy or mIoU, of the weights or of their EMA.

    The first of equal ones, as the run keeps it; None where no epoch was evaluated.
    """
    keys = [key for keys in SCORES.values() for key in keys]
    found = [(key, record) for record in records for key in keys if record.get(key) is not None]
    return max(found, key=lambda mark: mark[1][mark[0]], default=None)


def plot_metrics(run_folders: list[str], target: str) -> None:
    """Draw loss and accuracy over epochs, one colour a run, and write them to `target`.

    A star marks the best epoch of each run.
    """
    check_figure_target(target)
    save_figure(build_figure({folder: read_metrics(folder) for folder in run_folders}), target)


def build_figure(runs: dict[str, list[dict]]):
    """Return the figure of `plot_metrics`, of {run folder: records}.

    Its panels are the loss and the scores that some record has, top-1 if none has any.
    """
    names = [readable(os.path.basename(os.path.abspath(folder))) for folder in runs]
    known = {key for records in runs.values() for record in records for key in record}
    scores = {title: keys for title, keys in SCORES.items() if keys.keys() & known}
    panels = LOSSES | (scores or {"top-1 (%)": SCORES["top-1 (%)"]})
    with new_figure(12, 4.8, names) as figure:
        figure.suptitle(f"Training: {', '.join(names)}")
        for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
            for i, (name, records) in enumerate(zip(names, runs.values())):
                draw_run(axes, name, records, keys, colour=f"C{i % 10}")
            axes.set(xlabel="epoch", ylabel=title)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small")
    return figure


def draw_run(axes, name: str, records: list[dict], keys: dict[str, str], *, colour: str) -> None:
    """Draw the curves of one run in one panel, and a star at its best epoch."""
    for key, style in keys.items():
        points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
        if points:
            label = f"{name}: {key.split('_percent')[0]}"
            axes.plot(*zip(*points), style, color=colour, label=label)
    key, record = best_record(records) or (None, None)
    if key in keys:
        label = f"{name}: best, {record[key]:.2f} % at epoch {record['epoch']}"
        axes.plot([record["epoch"]], [record[key]], "*", color=colour, markersize=14, label=label)


def draw_heat_maps(maps: Mapping[str, np.ndarray], *, label: str):
    """Return a figure of arrays (H, W), from 0 to 1, side by side; `label` is for the colours."""
    titles = [readable(title) for title in maps]
    width, height = PANEL_INCHES * len(maps) + 1, PANEL_INCHES + 0.5
    with new_figure(width, height, titles) as figure:
        panels = figure.subplots(1, len(maps), squeeze=False)[0]
        for axes, title, values in zip(panels, titles, maps.values()):
            image = axes.imshow(values, cmap=HEAT_COLORS, vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, parse_math=False)  # it may be a file's name
        figure.colorbar(image, ax=list(panels), label=label)
    return figure


def kernel_magnitudes(model) -> list[np.ndarray]:
    """Return (K, K) float64 for each stage: how strong each position of its large kernels is.

    That is the mean absolute weight over channels and blocks, divided by the largest value. The
    model is a merged `RepLKNet`: a kernel then includes its small kernel and the scales of BN.
    """
    stages = []
    for stage in model.stages:
        weights = [
            layer.large_kernel_reparam.weight.numpy()
            for layer in stage.sublayers()
            if hasattr(layer, "large_kernel_reparam")
        ]
        if not weights:
            raise ValueError("the network is not merged; call structural_reparam() first")
        magnitude = np.abs(np.concatenate(weights).astype(np.float64)).mean(axis=(0, 1))
        stages.append(magnitude / max(magnitude.max(), np.finfo(np.float64).tiny))
    return stages
