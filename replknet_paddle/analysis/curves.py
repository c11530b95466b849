"""Curves of training runs, from their metrics.jsonl."""

import json
import os

from replknet_paddle.runtime.errors import InputError

# Panels and the keys of metrics.jsonl that each shows, with their line styles.
PANELS = {
    "loss (nats)": {"train_loss": ":", "val_loss": "-", "val_ema_loss": "--"},
    "top-1 (%)": {"val_top1_percent": "-", "val_ema_top1_percent": "--"},
}


def read_metrics(run_folder: str) -> list[dict]:
    """The records of a run, one per epoch.

    Raises:
        FileNotFoundError: no metrics.jsonl there.
        InputError: a line that is no record, or none at all.
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


def plot_metrics(run_folders: list[str], target: str) -> None:
    """Draw loss and accuracy over epochs, one colour a run, and write them to `target`.

    Raises:
        InputError: matplotlib is missing, `target` is no picture, or what `read_metrics` says.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"plotting needs matplotlib ({error}); pip install -r requirements/plots.txt"
        ) from None
    runs = {folder: read_metrics(folder) for folder in run_folders}
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        for i, (folder, records) in enumerate(runs.items()):
            name = os.path.basename(os.path.normpath(folder))
            for key, style in keys.items():
                points = [(r["epoch"], r[key]) for r in records if key in r]
                if points:
                    label = f"{name}: {key.split('_percent')[0]}"
                    axes.plot(*zip(*points), style, color=f"C{i % 10}", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    try:
        figure.savefig(target, dpi=120)
    except ValueError as error:  # a suffix that stands for no kind of picture
        raise InputError(f"cannot write {target}: {error}") from None
