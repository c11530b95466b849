"""A report of a segmentation's evaluation, in the form of a classifier's (`deploy.report`).

DIR/report.html            everything below in one file, pictures included
DIR/per_class.csv          pixels, IoU and accuracy of each class
DIR/confusion_matrix.csv   pixels by true class (row) and predicted class (column)
DIR/confusion_matrix.png
DIR/mistakes/              the images of the lowest IoU, with predictions and labels
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from replknet_paddle.data.lists import IGNORED
from replknet_paddle.deploy.drawing import INK, draw_text, fitted
from replknet_paddle.deploy.report import (
    CONFUSIONS,
    MISTAKES,
    PICTURE_HEIGHT,
    bar,
    confusions_section,
    html_table,
    html_text,
    matrix_section,
    mistake_figure,
    taken_for,
    write_csv,
    write_page,
)
from replknet_paddle.segmentation.data import SegmentationDataset
from replknet_paddle.segmentation.evaluate import SegmentationMetrics
from replknet_paddle.segmentation.pictures import (
    LEAST_LETTERS,
    class_shares,
    draw_legend,
    legend_rows,
    palette_of,
)

PANEL_WIDTH = 320  # pixels, at most
MARGIN = 12  # pixels
WHITE = (255, 255, 255)  # the colour of pixels that do not count


def write_segmentation_report(
    folder: str | os.PathLike,
    metrics: SegmentationMetrics,
    *,
    config,
    class_names: Sequence[str] | None,
    dataset: SegmentationDataset,
    infer: Callable,
    overwrite: bool = False,
) -> None:
    """Write the report of an evaluation to `folder`, as `write_page`.

    Args:
        metrics: with the IoU of each image of `dataset`.
        infer: pixels (H, W, 3) uint8 -> their classes (1, H, W), as in the evaluation.
    """
    names = class_names or list(map(str, range(config.MODEL.NUM_CLASSES)))

    def sections(written: Path) -> list[str]:
        worst = metrics.worst_images(MISTAKES)
        palette = palette_of(config.SEGMENTATION.PALETTE, len(names))
        figures = []
        for number, index in enumerate(worst, start=1):
            sample, labels = dataset.read_sample(0, index)
            predicted = infer(sample.pixels)[0].numpy()
            drawn = compare(sample.pixels, predicted, labels, names, palette)
            said = f"mean IoU {metrics.image_ious[index]:.2f} %"
            path = ", ".join(dataset.files(index))
            figures.append(mistake_figure(written, number, drawn, said, path))
        return [
            _classes(written, metrics, names),
            matrix_section(written, metrics.confusion, names, "pixel"),
            confusions_section(metrics.confusions(CONFUSIONS), names, "pixel"),
            _worst(figures),
        ]

    pixels = metrics.confusion.sum(axis=1)
    write_page(
        folder,
        model=config.MODEL.NAME,
        weights=config.MODEL.PRETRAINED,
        data=dataset.list_file,
        metrics=metrics.summary,
        figures={
            "images": f"{metrics.images:,}",
            "mIoU": f"{metrics.miou_percent:.2f} %",
            "pixel accuracy": f"{metrics.pixel_accuracy_percent:.2f} %",
            "pixels that count": f"{pixels.sum():,}",
            "classes with pixels": f"{(pixels > 0).sum():,} of {len(names):,}",
        },
        sections=sections,
        overwrite=overwrite,
    )


def _classes(folder: Path, metrics: SegmentationMetrics, names: Sequence[str]) -> str:
    """Write per_class.csv; return its section, which has the most frequent mistake as well."""
    confusion = metrics.confusion
    counts = np.stack([confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)], axis=1)
    percents = zip(metrics.class_iou_percent, metrics.class_accuracy_percent)
    rows = [
        [label, name, *row, *("" if np.isnan(percent) else f"{percent:.6g}" for percent in pair)]
        for label, (name, row, pair) in enumerate(zip(names, counts.tolist(), percents))
    ]
    header = ["label", "class", "pixels", "predicted", "right", "iou_percent", "accuracy_percent"]
    write_csv(folder / "per_class.csv", header, rows)
    instead = taken_for(metrics.confusions(), names)
    table = html_table(
        [*header[:5], "IoU", "accuracy", "most often taken for"],
        (
            (label, html_text(name), *row, bar(iou, "-"), bar(accuracy, "-"))
            + (html_text(instead.get(label, "")),)
            for label, name, *row, iou, accuracy in rows
        ),
    )
    return f'<h2>IoU and accuracy of each class</h2><div class="scroll">{table}</div>'


def _worst(figures: Sequence[str]) -> str:
    """Return the section of the images of the lowest IoU."""
    if not figures:
        return ""
    return (
        "<h2>Worst pictures</h2><p>Look at these first: often the label is wrong. They have the "
        "lowest mean IoU of the classes that their labels have. White pixels of predictions and "
        f"labels do not count.</p>{''.join(figures)}"
    )


def compare(
    pixels: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    palette: np.ndarray,
) -> Image.Image:
    """Return an image (H, W, 3) uint8, its prediction and its label (H, W) side by side, and a
    legend with the shares of both; the prediction is shown where pixels count."""
    counts = labels != IGNORED
    picture = fitted(Image.fromarray(pixels), (PANEL_WIDTH, PICTURE_HEIGHT))
    colours = np.full((IGNORED + 1, 3), WHITE, np.uint8)
    colours[: len(palette)] = palette

    def panel(classes: np.ndarray) -> Image.Image:
        small = Image.fromarray(classes).resize(picture.size, Image.Resampling.NEAREST)
        return Image.fromarray(colours[np.asarray(small)])

    maps = predicted, labels
    shares = np.stack([class_shares(x[counts], len(names)) for x in maps], axis=1)
    rows = [("", None, "prediction / label"), *legend_rows(shares, names, palette)]
    if not counts.all():
        rows.append(("does not count", WHITE, ""))
    legend = draw_legend(rows, LEAST_LETTERS)
    panels = {
        "image": picture,
        "prediction": panel(np.where(counts, predicted, np.uint8(IGNORED))),
        "label": panel(labels),
    }
    step, top = picture.width + MARGIN, 2 * LEAST_LETTERS
    size = (len(panels) * step + legend.width, max(top + picture.height, legend.height))
    sheet = Image.new("RGB", size, "white")
    for i, (title, shown) in enumerate(panels.items()):
        place = (i * step, top * 2 // 3)
        draw_text(ImageDraw.Draw(sheet), place, title, LEAST_LETTERS, INK, room=picture.width)
        sheet.paste(shown, (i * step, top))
    sheet.paste(legend, (len(panels) * step, 0))
    return sheet
