"""A report of an evaluation: one page of HTML that needs nothing else, and its tables and pictures.

DIR/report.html            everything below in one file, pictures included
DIR/per_class.csv          images, right ones, accuracy, precision and F1 of each class
DIR/confusion_matrix.csv   images by true class (row) and predicted class (column)
DIR/confusion_matrix.png
DIR/reliability.png        accuracy by the probability of the predicted class
DIR/mistakes/              the wrong answers of the largest probability, drawn
"""

import base64
import csv
import html
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.analysis.plots import new_figure, readable, save_figure
from replknet_paddle.config_keys import TWO_CLASS_FIGURES
from replknet_paddle.deploy.drawing import annotate, save
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import (
    atomic_file,
    atomic_folder,
    check_new_folder,
    path_in_error,
)
from replknet_paddle.runtime.terminal import printable

logger = logging.getLogger(__name__)

MATRIX_CLASSES = 1000  # with more, the matrix would take gigabytes
LABELLED_CLASSES = 40  # with more, its picture has no room for names and counts
LABEL_LETTERS = 30
MISTAKES = 24
CONFUSIONS = 20
PICTURE_HEIGHT = 240  # pixels

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #191c20; max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0; }
.figures div { background: #eef2f7; border-radius: .5rem; padding: .6rem 1.2rem; }
.figures strong { display: block; font-size: 1.5rem; }
.scroll { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #dde3ea; text-align: left; }
thead th { position: sticky; top: 0; background: #fff; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:has(meter) { white-space: nowrap; }
img { max-width: 100%; } figure { margin: 0 0 1rem; }
.mistakes { display: grid; gap: 1rem;
            grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.mistakes.wide { grid-template-columns: repeat(auto-fill, minmax(min(32rem, 100%), 1fr)); }
figcaption { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
"""

REPORT_FILE = "report.html"
# All that a report has, for segmentation as well.
REPORT_FILES = (
    r"report\.html|(per_class|confusion_matrix)\.csv|(confusion_matrix|reliability)\.png"
    r"|mistakes(/\d+\.jpg)?"
)


@dataclass(frozen=True)
class Evaluated:
    """The parts of a report."""

    model: str
    weights: str  # the file that was evaluated
    data: str  # the list of images
    metrics: str  # one line
    class_names: Sequence[str]
    outcomes: Outcomes
    path: Callable[[int], str]  # of the image at an index in the list
    picture: Callable[[int], Image.Image]  # RGB, as the network sees it
    heat: Callable[[int, Image.Image], Image.Image] | None = None  # the same, under its heat map


def write_report(
    folder: str | os.PathLike, evaluated: Evaluated, *, overwrite: bool = False
) -> None:
    """Write the report to `folder`, as `write_page`."""
    names, outcomes = evaluated.class_names, evaluated.outcomes

    def sections(written: Path) -> list[str]:
        matrix = None
        if len(names) <= MATRIX_CLASSES:
            matrix = outcomes.confusion_matrix()
        return [
            _classes(written, evaluated),
            matrix_section(written, matrix, names, "image"),
            confusions_section(outcomes.confusions(CONFUSIONS), names, "image"),
            _reliability(written, outcomes),
            _mistakes(written, evaluated),
        ]

    write_page(
        folder,
        model=evaluated.model,
        weights=evaluated.weights,
        data=evaluated.data,
        metrics=evaluated.metrics,
        figures=_figures(evaluated),
        sections=sections,
        overwrite=overwrite,
    )


def write_page(
    folder: str | os.PathLike,
    *,
    model: str,
    weights: str,
    data: str,
    metrics: str,
    figures: dict[str, str],
    sections: Callable[[Path], list[str]],
    overwrite: bool,
) -> None:
    """Write a report to `folder`, which appears when it is whole: new or empty or, to `overwrite`,
    with an earlier report.

    Args:
        model, weights, data, metrics: as in `Evaluated`.
        figures: what is shown on top, by its name.
        sections: the folder that is being written -> the HTML below that, once the files that
            belong to it are in the folder.
    """
    replaces = REPORT_FILES if overwrite else None
    check_new_folder(folder, replaces=replaces)
    target = Path(os.path.realpath(folder))
    with atomic_folder(target) as written:
        content = "\n".join(sections(written))
        with atomic_file(written / REPORT_FILE, errors="replace") as file:
            file.write(_page(model, weights, data, metrics, figures, content))
        check_new_folder(target, replaces=replaces)  # what came meanwhile
    logger.info("report: %s", os.path.join(folder, REPORT_FILE))


def _figures(evaluated: Evaluated) -> dict[str, str]:
    """Return the figures of a classifier's evaluation by their names."""
    outcomes, count = evaluated.outcomes, len(evaluated.class_names)
    there, found = outcomes.images_per_class() > 0, outcomes.figures()
    return {
        "image" if outcomes.images == 1 else "images": f"{outcomes.images:,}",
        "top-1": f"{100 * outcomes.is_right.mean():.2f} %",
        "balanced accuracy, the mean of the classes' accuracies": (
            f"{100 * found['balanced_accuracy']:.2f} %"
        ),
        "macro F1": f"{100 * found['macro_f1']:.2f} %",
        **{
            title: f"{found[name]:.4f}".replace("nan", "-")
            for title, name in zip(("ROC AUC", "average precision"), TWO_CLASS_FIGURES)
            if name in found
        },
        "classes with images": f"{there.sum():,} of {count:,}",
        "expected calibration error": f"{100 * outcomes.calibration_error:.2f} %".replace(
            "nan", "-"
        ),
    }


def _page(
    model: str, weights: str, data: str, metrics: str, figures: dict[str, str], sections: str
) -> str:
    """Return the page, with the figures of the evaluation on top."""
    boxes = "".join(f"<div><strong>{v}</strong>{k}</div>" for k, v in figures.items())
    title = f"Evaluation of {html.escape(model)}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>
<p>Weights: {html_text(printable(weights))}<br>
Images: {html_text(printable(data))}<br>
{html_text(metrics)}</p>
<div class="figures">{boxes}</div>
{sections}
</body></html>
"""


def _classes(folder: Path, evaluated: Evaluated) -> str:
    """Write per_class.csv; return its section, which has the most frequent mistake as well."""
    outcomes, names = evaluated.outcomes, evaluated.class_names
    images, right = outcomes.images_per_class().tolist(), outcomes.right_per_class().tolist()
    of_class, known = outcomes.per_class(), outcomes.is_known

    def percents(figure: str, there: Iterable) -> list[str]:
        return [
            f"{100 * x:.6g}" if is_there else "" for x, is_there in zip(of_class[figure], there)
        ]

    figures = percents("recall", images), percents("precision", known), percents("f1", known)
    rows = [*zip(range(len(names)), names, images, right, *figures)]
    columns = ["label", "class", "images", "right"]
    in_percent = ["accuracy_percent", "precision_percent", "f1_percent"]
    write_csv(folder / "per_class.csv", [*columns, *in_percent], rows)
    instead = taken_for(outcomes.confusions(len(outcomes.labels)), names)
    table = html_table(
        [*columns, "accuracy (recall)", "precision", "F1", "most often taken for"],
        (
            (label, html_text(name), n, good, *map(bar, found), html_text(instead.get(label, "")))
            for label, name, n, good, *found in rows
        ),
    )
    return f'<h2>Accuracy of each class</h2><div class="scroll">{table}</div>'


def taken_for(confusions: Iterable[tuple[int, int, int]], names: Sequence[str]) -> dict[int, str]:
    """Return the class that each label is most often taken for, and how often: of (label, class,
    count), the most first."""
    instead = {}
    for label, given, count in confusions:
        instead.setdefault(label, f"{names[given]} ({count:,})")
    return instead


def matrix_section(folder: Path, counts: np.ndarray | None, names: Sequence[str], unit: str) -> str:
    """Write the confusion matrix as numbers and as a picture; return its section.

    `counts` (classes, classes) by true class (row) are of a `unit`, image or pixel; None: too many.
    """
    title = "<h2>Confusion matrix</h2>"
    if counts is None:
        return f"{title}<p>Left out: there are more than {MATRIX_CLASSES:,} classes.</p>"
    rows = ([name, *row] for name, row in zip(names, counts.tolist()))
    write_csv(folder / "confusion_matrix.csv", ["true class", *names], rows)
    picture = folder / "confusion_matrix.png"
    try:
        save_figure(draw_confusion_matrix(counts, names, unit), picture)
    except InputError as error:  # without matplotlib: an evaluation may have taken hours
        logger.warning("confusion_matrix.png is left out: %s", error)
        return f"{title}<p>confusion_matrix.csv has it; no picture: {html.escape(str(error))}</p>"
    return title + _image(picture, "Confusion matrix; confusion_matrix.csv has its numbers")


def draw_confusion_matrix(counts: np.ndarray, names: Sequence[str], unit: str = "image"):
    """Return a figure of integers (classes, classes): each row is a true class, each column a
    predicted one, and the shade is the share of the row.

    Cells have the counts or, of a `unit` of which there are millions, pixel, the shares in percent.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    has_names = len(names) <= LABELLED_CLASSES
    labels = list(map(_label, names)) if has_names else []
    inches = 4 + 0.4 * len(names) if has_names else 12
    with new_figure(inches, inches, labels) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted class", ylabel="true class")
        figure.colorbar(image, shrink=0.5, label=f"share of the true class's {unit}s")
        if has_names:
            places = range(len(labels))
            axes.set_xticks(places, labels, rotation="vertical", parse_math=False)
            axes.set_yticks(places, labels, parse_math=False)
            for row, column in np.argwhere(counts):
                colour = "white" if shares[row, column] > 0.5 else "black"
                text = str(counts[row, column])
                if unit == "pixel":
                    text = f"{100 * shares[row, column]:.1f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, size=8)
    return figure


def _label(name: str) -> str:
    """Return a class name for an axis."""
    name = readable(name)
    return name if len(name) <= LABEL_LETTERS else name[: LABEL_LETTERS - 3] + "..."


def _reliability(folder: Path, outcomes: Outcomes) -> str:
    """Draw reliability.png; return its section."""
    title, picture = "<h2>Confidence</h2>", folder / "reliability.png"
    try:
        save_figure(draw_reliability(outcomes), picture)
    except InputError as error:  # as above
        return f"{title}<p>No picture: {html.escape(str(error))}</p>"
    said = "Below the dashed line, answers are right less often than they say; dark: many images."
    return f"{title}<p>{said}</p>{_image(picture, 'Accuracy by the probability of the answer')}"


def draw_reliability(outcomes: Outcomes):
    """Return a figure of the accuracy in each bin of confidence, darker where more images are."""
    images, _, right = outcomes.confidence_bins().T
    accuracy, places = right / np.maximum(images, 1), (np.arange(len(images)) + 0.5) / len(images)
    colours = [(0.1, 0.3, 0.6, 0.1 + 0.9 * share) for share in images / images.max()]
    with new_figure(6, 5, []) as figure:
        axes = figure.subplots()
        axes.bar(places, accuracy, 1 / len(images), edgecolor="black", color=colours)
        axes.plot([0, 1], [0, 1], "--", color="grey")
        axes.set(xlabel="probability of the predicted class", ylabel="accuracy", ylim=(0, 1))
    return figure


def confusions_section(
    confusions: Sequence[tuple[int, int, int]], names: Sequence[str], unit: str
) -> str:
    """Return the section of the pairs of classes that are taken for each other most often."""
    title = "<h2>Most frequent mistakes</h2>"
    if not confusions:
        return f"{title}<p>None: every {unit} is right.</p>"
    rows = ((html_text(names[label]), html_text(names[given]), n) for label, given, n in confusions)
    return title + html_table(["true class", "predicted", f"{unit}s"], rows)


def _mistakes(folder: Path, evaluated: Evaluated) -> str:
    """Draw the most confident mistakes; return their section."""
    names, outcomes = evaluated.class_names, evaluated.outcomes
    figures = []
    for number, index in enumerate(outcomes.confident_mistakes(MISTAKES), start=1):
        truth, path = names[outcomes.labels[index]], evaluated.path(index)
        texts = [names[label] for label in outcomes.classes[index]]
        picture, heat = evaluated.picture(index), None
        said = f"is {truth}; taken for {texts[0]} ({100 * outcomes.scores[index, 0]:.1f} %)"
        if evaluated.heat is not None and np.isfinite(outcomes.scores[index, 0]):
            heat = evaluated.heat(index, picture)
            said += f"; beside it, where the network looks for {texts[0]}"
        drawn = annotate(
            picture,
            texts,
            outcomes.scores[index].tolist(),
            caption=os.path.basename(path),
            height=PICTURE_HEIGHT,
            truth=truth,
            heat=heat,
        )
        figures.append(mistake_figure(folder, number, drawn, said, path))
    if not figures:
        return ""
    return (
        "<h2>Most confident mistakes</h2><p>Look at these first: often the label is wrong. "
        "Pictures are shown as the network sees them.</p>"
        f'<div class="mistakes{" wide" if evaluated.heat else ""}">{"".join(figures)}</div>'
    )


def mistake_figure(folder: Path, number: int, drawn: Image.Image, said: str, path: str) -> str:
    """Write the picture of a mistake; return it with its caption, which has the image's path."""
    file = folder / "mistakes" / f"{number:02d}.jpg"
    with path_in_error(file.parent):
        file.parent.mkdir(exist_ok=True)
    save(drawn, file)
    return (
        f"<figure>{_image(file, said)}<figcaption>{html_text(said)}<br>{html_text(printable(path))}"
        "</figcaption></figure>"
    )


def write_csv(path: Path, header: Sequence[str], rows: Iterable) -> None:
    """Write a table that has its name when it is whole."""
    with atomic_file(path, newline="", errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def html_table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a table of cells that are HTML or numbers."""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(content: str | int) -> str:
    """Return a cell of a table."""
    kind = ' class="number"' if isinstance(content, int) else ""
    return f"<td{kind}>{f'{content:,}' if kind else content}</td>"


def bar(percent: str, absent: str = "no images") -> str:
    """Return a bar of this accuracy, and its number; "" is that of a class that is `absent`."""
    if not percent:
        return absent
    return f'<meter max="100" value="{percent}"></meter> {float(percent):.2f} %'


def _image(path: Path, alt: str) -> str:
    """Return the picture itself, as a part of the page."""
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}">'


def html_text(text: str) -> str:
    """Return a text of the user's as HTML, in whichever direction it is written."""
    return f"<bdi>{html.escape(text)}</bdi>" if text else ""
