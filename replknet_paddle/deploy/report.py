"""A report of an evaluation: one page of HTML that needs nothing else, and its tables and pictures.

DIR/report.html            everything below in one file, pictures included
DIR/per_class.csv          images, right ones and accuracy of each class
DIR/confusion_matrix.csv   images by true class (row) and predicted class (column)
DIR/confusion_matrix.png
DIR/mistakes/              the wrong answers of the largest probability, drawn
"""

import base64
import csv
import html
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.data.lists import printable
from replknet_paddle.deploy.confusion import draw_confusion_matrix
from replknet_paddle.deploy.pictures import annotate, save
from replknet_paddle.runtime.files import (
    atomic_file,
    atomic_folder,
    check_new_folder,
    path_in_error,
)

logger = logging.getLogger(__name__)

MATRIX_CLASSES = 1000  # with more, the matrix would take gigabytes
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
table { border-collapse: collapse; } caption { text-align: left; color: #555; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #dde3ea; text-align: left; }
thead th { position: sticky; top: 0; background: #fff; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
meter { width: 8rem; }
img { max-width: 100%; } figure { margin: 0 0 1rem; }
.mistakes { display: grid; gap: 1rem;
            grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
figcaption { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Evaluated:
    """What a report is made of.

    Attributes:
        model: its name.
        weights: the file that was evaluated.
        data: the list of images.
        metrics: one line.
        class_names: text for each class.
        outcomes: of the images, in the order of the list.
        path: index -> the image's path.
        picture: index -> the image, RGB, as the network sees it.
    """

    model: str
    weights: str
    data: str
    metrics: str
    class_names: Sequence[str]
    outcomes: Outcomes
    path: Callable[[int], str]
    picture: Callable[[int], Image.Image]


def write_report(folder: str | os.PathLike, evaluated: Evaluated) -> None:
    """Write the report to `folder`, which appears when it is whole.

    Args:
        folder: a new or empty folder.

    Raises:
        InputError: it is something else.
        OSError: it cannot be written.
    """
    check_new_folder(folder)
    target = Path(os.path.realpath(folder))
    with atomic_folder(target) as written:
        _write_files(written, evaluated)
        check_new_folder(target)  # what came meanwhile
    logger.info("report: %s", os.path.join(folder, "report.html"))


def _write_files(folder: Path, evaluated: Evaluated) -> None:
    names, outcomes = evaluated.class_names, evaluated.outcomes
    _write_csv(
        folder / "per_class.csv",
        ["label", "class", "images", "right", "accuracy_percent"],
        (row[:5] for row in _class_rows(evaluated)),
    )
    matrix_file = None
    if len(names) <= MATRIX_CLASSES:
        counts = outcomes.confusion_matrix(len(names))
        rows = ([name, *map(int, row)] for name, row in zip(names, counts))
        _write_csv(folder / "confusion_matrix.csv", ["true class", *names], rows)
        matrix_file = folder / "confusion_matrix.png"
        save(draw_confusion_matrix(counts, names), str(matrix_file))
    mistakes = []
    for number, index in enumerate(outcomes.confident_mistakes(MISTAKES), start=1):
        with path_in_error(folder / "mistakes"):
            (folder / "mistakes").mkdir(exist_ok=True)
        drawn = folder / "mistakes" / f"{number:02d}.jpg"
        save(_draw_mistake(evaluated, index), str(drawn))
        mistakes.append((index, drawn))
    page = _page(evaluated, matrix_file, mistakes)
    with atomic_file(folder / "report.html", errors="replace") as file:
        file.write(page)


def _write_csv(path: Path, header: Sequence[str], rows) -> None:
    with atomic_file(path, newline="", errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _class_rows(evaluated: Evaluated):
    """Label, name, images, right, accuracy in percent ("" without images), and the class that is
    most often given instead."""
    outcomes, names = evaluated.outcomes, evaluated.class_names
    images = outcomes.images_per_class(len(names))
    right = outcomes.right_per_class(len(names))
    instead = {}
    for label, given, count in outcomes.confusions(len(outcomes.labels)):
        instead.setdefault(label, f"{names[given]} ({count})")
    for label, name in enumerate(names):
        accuracy = f"{100 * right[label] / images[label]:.2f}" if images[label] else ""
        yield label, name, int(images[label]), int(right[label]), accuracy, instead.get(label, "")


def _draw_mistake(evaluated: Evaluated, index: int) -> Image.Image:
    names, outcomes = evaluated.class_names, evaluated.outcomes
    return annotate(
        evaluated.picture(index),
        [names[label] for label in outcomes.classes[index]],
        [float(score) for score in outcomes.scores[index]],
        caption=os.path.basename(evaluated.path(index)),
        height=PICTURE_HEIGHT,
        truth=names[outcomes.labels[index]],
    )


# ---- the page


def _page(evaluated: Evaluated, matrix_file: Path | None, mistakes: list) -> str:
    outcomes = evaluated.outcomes
    images = outcomes.images_per_class(len(evaluated.class_names))
    right = outcomes.right_per_class(len(evaluated.class_names))
    there = images > 0
    figures = {
        "images": f"{len(outcomes.labels):,}",
        "top-1": f"{100 * outcomes.is_right.mean():.2f} %",
        "mean of the classes' accuracies": f"{100 * np.mean(right[there] / images[there]):.2f} %",
        "classes with images": f"{there.sum():,} of {len(images):,}",
    }
    boxes = "".join(f"<div><strong>{v}</strong>{k}</div>" for k, v in figures.items())
    title = f"Evaluation of {html.escape(evaluated.model)}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body><h1>{title}</h1>
<p>Weights: {_text(printable(evaluated.weights))}<br>
Images: {_text(printable(evaluated.data))}<br>
{_text(evaluated.metrics)}</p>
<div class="figures">{boxes}</div>
{_per_class_section(evaluated)}
{_matrix_section(matrix_file)}
{_confusions_section(evaluated)}
{_mistakes_section(evaluated, mistakes)}
</body></html>
"""


def _per_class_section(evaluated: Evaluated) -> str:
    rows = []
    for label, name, images, right, accuracy, instead in _class_rows(evaluated):
        bar = f'<meter min="0" max="100" value="{accuracy}">{accuracy} %</meter>'
        rows.append(
            f'<tr><td class="number">{label}</td><th scope="row">{_text(name)}</th>'
            f'<td class="number">{images}</td><td class="number">{right}</td>'
            f'<td class="number">{accuracy + " %" if accuracy else "no images"}</td>'
            f"<td>{bar if accuracy else ''}</td><td>{_text(instead)}</td></tr>"
        )
    head = "<th>label</th><th>class</th><th>images</th><th>right</th><th>accuracy</th><th></th>"
    return (
        '<h2>Accuracy of each class</h2><div class="scroll"><table class="classes">'
        f"<thead><tr>{head}<th>most often taken for</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _matrix_section(matrix_file: Path | None) -> str:
    title = "<h2>Confusion matrix</h2>"
    if matrix_file is None:
        return f"{title}<p>Left out: there are more than {MATRIX_CLASSES:,} classes.</p>"
    alt = "Confusion matrix; confusion_matrix.csv has its numbers"
    return f'{title}<img class="matrix" src="{_data_url(matrix_file)}" alt="{alt}">'


def _confusions_section(evaluated: Evaluated) -> str:
    names = evaluated.class_names
    rows = [
        f"<tr><td>{_text(names[label])}</td><td>{_text(names[given])}</td>"
        f'<td class="number">{count}</td></tr>'
        for label, given, count in evaluated.outcomes.confusions(CONFUSIONS)
    ]
    if not rows:
        return "<h2>Most frequent mistakes</h2><p>None: every image is right.</p>"
    return (
        '<h2>Most frequent mistakes</h2><table class="confusions"><thead><tr><th>true class</th>'
        f"<th>predicted</th><th>images</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _mistakes_section(evaluated: Evaluated, mistakes: list[tuple[int, Path]]) -> str:
    if not mistakes:
        return ""
    names, outcomes = evaluated.class_names, evaluated.outcomes
    figures = []
    for index, file in mistakes:
        said = (
            f"{names[outcomes.labels[index]]}, taken for {names[outcomes.classes[index, 0]]} "
            f"({100 * outcomes.scores[index, 0]:.1f} %)"
        )
        figures.append(
            f'<figure><img src="{_data_url(file)}" alt="{html.escape(said)}">'
            f"<figcaption>{_text(said)}<br>{_text(printable(evaluated.path(index)))}"
            "</figcaption></figure>"
        )
    return (
        "<h2>Most confident mistakes</h2><p>Look at these first: often the label is wrong. "
        "Pictures are shown as the network sees them.</p>"
        f'<div class="mistakes">{"".join(figures)}</div>'
    )


def _text(text: str) -> str:
    return f"<bdi>{html.escape(text)}</bdi>" if text else ""


def _data_url(path: Path) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
