"""Pictures by matplotlib: curves of training runs, heat maps, and the frame that both are drawn in;
and the fonts of this system for people's texts, in any script, in these and in drawn pictures.

Figures need no display and are written whole or not at all. Nothing here imports Paddle.
"""

import contextlib
import functools
import json
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import ImageFont

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file, check_file_target
from replknet_paddle.runtime.packages import import_extra

logger = logging.getLogger(__name__)

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

FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", r"C:\Windows\Fonts"),
)
FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
# Preferred fonts first, by the beginning of the file's name in lower case.
PREFERRED_FONTS = (
    *("dejavusans.ttf", "notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "msyh"),
    *("pingfang", "hiragino", "malgun", "notosans", "seguiemj", "symbola"),
)
NOT_A_CHARACTER = "\uffff"  # which every font draws as it draws what it does not have


@contextlib.contextmanager
def new_figure(width: float, height: float, names: Sequence[str]) -> Iterator:
    """Give an empty `matplotlib.figure.Figure`, in inches, to draw on in this block.

    Fonts are chosen for `names`, texts of the user's as `readable` gives them.
    """
    figures = import_extra("matplotlib.figure", "plots")
    matplotlib = import_extra("matplotlib", "plots")
    with matplotlib.rc_context({"font.family": plot_fonts(names)}):
        yield figures.Figure(figsize=(width, height), layout="constrained")


def check_figure_target(target: str, *, must_be_new: bool = False) -> None:
    """Raise InputError or OSError before work starts, if `save_figure` cannot write `target`, or it
    exists though it `must_be_new`."""
    figures = import_extra("matplotlib.figure", "plots")
    kinds = sorted(figures.Figure().canvas.get_supported_filetypes())
    check_file_target(target, [f".{kind}" for kind in kinds], must_be_new=must_be_new)


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
    save_figure(build_figure({folder: read_metrics(folder) for folder in run_folders}), target)


def build_figure(runs: dict[str, list[dict]]):
    """Return the figure of `plot_metrics`, of {run folder: records}.

    Its panels are the loss and the scores that some record has, top-1 if none has any.
    """
    names = [readable(os.path.basename(os.path.abspath(folder))) for folder in runs]
    if len(set(names)) < len(names):
        names = list(map(readable, runs))
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


# ---- fonts. Pillow's own has Latin letters alone, so a text is drawn with the first font of the
# system that has all of its letters.


def readable(text: str) -> str:
    """Return `text` on one line, without letters of no shape: joiners, directions, variants."""
    return "".join(
        letter
        for letter in unicodedata.normalize("NFC", " ".join(text.split()))
        if unicodedata.category(letter) not in ("Cc", "Cf", "Cs") and letter not in "\ufe0e\ufe0f"
    ).strip()


@functools.lru_cache(maxsize=4096)
def find_font(text: str, own: str | None = None) -> str | None:
    """Return the file of the first font that has the letters of `text`, or most of them.

    The library's `own` font comes first, None for Pillow's. A warning is given for the first text
    that no font has all letters of.
    """
    letters = set(text) - {" "}
    best, most = own, -1
    for path in (own, *font_files()):
        count = sum(has_letter(path, letter) for letter in letters)
        if count > most:
            best, most = path, count
        if count == len(letters):
            return best
    _warn_of_missing_letters()
    return best


@functools.cache
def _warn_of_missing_letters() -> None:
    """Say which packages have fonts, once."""
    logger.warning(
        "no font of this system has all letters of a text, so some are drawn as boxes; on Debian "
        "and Ubuntu, apt-get install fonts-noto-cjk has Chinese, Japanese and Korean ones, "
        "fonts-noto-core most others"
    )


@functools.cache
def font_files() -> tuple[str, ...]:
    """Return the font files of this system, preferred ones first, regular ones before bold ones."""
    found = [
        os.path.join(folder, name)
        for top in FONT_FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(top))
        for name in names
        if name.lower().endswith(FONT_SUFFIXES)
    ]

    def rank(path: str):
        name = os.path.basename(path).lower()
        place = next((i for i, start in enumerate(PREFERRED_FONTS) if name.startswith(start)), 99)
        return place, "regular" not in name, len(name), name

    return tuple(sorted(found, key=rank))


@functools.lru_cache(maxsize=256)
def open_font(path: str | None, pixels: int) -> ImageFont.FreeTypeFont:
    """Return a font of `find_font` with letters of this height; OSError if it has none."""
    return ImageFont.load_default(pixels) if path is None else ImageFont.truetype(path, pixels)


@functools.lru_cache(maxsize=65536)
def has_letter(path: str | None, letter: str) -> bool:
    """Return whether a font has a shape for `letter`."""
    try:
        font = open_font(path, 20)
        drawn, missing = font.getmask(letter), font.getmask(NOT_A_CHARACTER)
    except (OSError, ValueError):
        return False
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def plot_fonts(texts: Sequence[str]) -> list[str]:
    """Return matplotlib's `font.family`, of which it takes each letter from the first that fits."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")  # which matplotlib brings
    families = {"DejaVu Sans": None}  # in order
    for text in texts:
        path = find_font(text, own)
        if path != own:
            font_manager.fontManager.addfont(path)
            families[font_manager.FontProperties(fname=path).get_name()] = None
    return list(families)
