"""Curves of training runs, from their metrics.jsonl."""

import json
import os

from replknet_paddle.analysis.figures import check_figure_target, new_figure, save_figure
from replknet_paddle.analysis.fonts import readable
from replknet_paddle.runtime.errors import InputError

# Panels and the keys of metrics.jsonl that each shows, with their line styles.
LOSSES = {"loss (nats)": {"train_loss": ":", "val_loss": "-", "val_ema_loss": "--"}}
# By which the best weights are chosen, in classification and in segmentation.
SCORES = {
    "top-1 (%)": {"val_top1_percent": "-", "val_ema_top1_percent": "--"},
    "mIoU (%)": {"val_miou_percent": "-", "val_ema_miou_percent": "--"},
}


def panels_of(records: list[dict]) -> dict[str, dict[str, str]]:
    """The panels to draw: the loss, and the scores that some record has, top-1 if none has any."""
    known = {key for record in records for key in record}
    scores = {title: keys for title, keys in SCORES.items() if keys.keys() & known}
    return LOSSES | (scores or {"top-1 (%)": SCORES["top-1 (%)"]})


def read_metrics(run_folder: str) -> list[dict]:
    """The records of a run, one per epoch.

    Raises:
        FileNotFoundError: no metrics.jsonl there.
        InputError: a line that is not a record, or none at all.
    """
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
    """The key and the record of the best top-1 accuracy or mIoU, of the weights or of their EMA.

    The first of equal ones, as the run keeps it; None where no epoch was evaluated.
    """
    found = [
        (record[key], key, record)
        for record in records
        for keys in SCORES.values()
        for key in keys
        if record.get(key) is not None
    ]
    return max(found, key=lambda mark: mark[0])[1:] if found else None


def plot_metrics(run_folders: list[str], target: str) -> None:
    """Draw loss and accuracy over epochs, one colour a run, and write them to `target`.

    A star marks the best epoch of each run.

    Raises:
        FileNotFoundError: no folder to write into, or what `read_metrics` says.
        InputError: matplotlib is missing, `target` is not a picture, or what `read_metrics` says.
        OSError: it cannot be written.
    """
    check_figure_target(target)
    save_figure(build_figure({folder: read_metrics(folder) for folder in run_folders}), target)


def build_figure(runs: dict[str, list[dict]]):
    """The figure of `plot_metrics`, of {run folder: records}."""
    names = [readable(os.path.basename(os.path.abspath(folder))) for folder in runs]
    with new_figure(12, 4.8, names) as figure:
        figure.suptitle(f"Training: {', '.join(names)}")
        panels = panels_of([record for records in runs.values() for record in records])
        for axes, (title, keys) in zip(figure.subplots(1, len(panels)), panels.items()):
            for i, (name, records) in enumerate(zip(names, runs.values())):
                draw_run(axes, name, records, keys, colour=f"C{i % 10}")
            axes.set_xlabel("epoch")
            axes.set_ylabel(title)
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small")
    return figure


def draw_run(axes, name: str, records: list[dict], keys: dict[str, str], *, colour: str) -> None:
    """Draw the curves of one run in one panel, and a star at its best epoch."""
    for key, style in keys.items():
        points = [
            (record["epoch"], record[key]) for record in records if record.get(key) is not None
        ]
        if points:
            label = f"{name}: {key.split('_percent')[0]}"
            axes.plot(*zip(*points), style, color=colour, label=label)
    best = best_record(records)
    if best is not None and best[0] in keys:
        key, record = best
        label = f"{name}: best, {record[key]:.2f} % at epoch {record['epoch']}"
        axes.plot([record["epoch"]], [record[key]], "*", color=colour, markersize=14, label=label)
