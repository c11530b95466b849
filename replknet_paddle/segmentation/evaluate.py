"""The training loss of segmentation, and its metrics from a confusion matrix, which adds up over
images and processes."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.data.lists import IGNORED
from replknet_paddle.runtime.processes import sum_over_ranks
from replknet_paddle.segmentation.upernet import resize

AUXILIARY_WEIGHT = 0.4


class SegmentationLoss:
    """Cross entropy of the decode head's logits plus 0.4 times the auxiliary head's.

    Each is the sum over the pixels that count divided by the number of all pixels, ignored and
    padded ones among them: the mean of the official code (mmsegmentation's `avg_non_ignore` False).

    Args:
        align_corners: how logits are resized.
    """

    def __init__(self, *, align_corners: bool):
        self.align_corners = align_corners

    def __call__(
        self, logits: tuple[paddle.Tensor, paddle.Tensor], labels: paddle.Tensor
    ) -> paddle.Tensor:
        """Logits (N, num_classes, h, w) of both heads, labels (N, H, W) -> mean loss, nats."""
        decoded, auxiliary = (self.of_head(head, labels) for head in logits)
        return decoded + AUXILIARY_WEIGHT * auxiliary

    def of_head(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """Cross entropy of one head."""
        size = labels.shape[1:]
        logits = resize(logits.astype("float32"), size, align_corners=self.align_corners)
        return F.cross_entropy(
            logits, labels.astype("int64"), axis=1, ignore_index=IGNORED, reduction="none"
        ).mean()


@dataclass(frozen=True)
class SegmentationMetrics:
    """The result of one evaluation.

    Attributes:
        images: how many were evaluated.
        confusion: (num_classes, num_classes) int64, pixels by label (row) and prediction (column);
            ignored pixels are not in it.
        class_names: for `table`; None: numbers.
    """

    images: int
    confusion: np.ndarray
    class_names: tuple[str, ...] | None = None

    @property
    def class_iou_percent(self) -> np.ndarray:
        """Intersection over union of each class, float64; NaN for one that neither a label nor a
        prediction has."""
        hits = np.diag(self.confusion)
        union = self.confusion.sum(axis=0) + self.confusion.sum(axis=1) - hits
        return np.where(union > 0, 100.0 * hits / np.maximum(union, 1), np.nan)

    @property
    def class_accuracy_percent(self) -> np.ndarray:
        """Share of each class's pixels that are right; NaN for a class without any."""
        pixels = self.confusion.sum(axis=1)
        return np.where(pixels > 0, 100.0 * np.diag(self.confusion) / np.maximum(pixels, 1), np.nan)

    @property
    def miou_percent(self) -> float:
        """Mean of the classes' IoU, those that are NaN left out."""
        known = self.class_iou_percent[~np.isnan(self.class_iou_percent)]
        return float(known.mean()) if known.size else 0.0

    @property
    def pixel_accuracy_percent(self) -> float:
        """aAcc: share of all pixels that are right."""
        return 100.0 * int(np.trace(self.confusion)) / max(int(self.confusion.sum()), 1)

    @property
    def score(self) -> float:
        """The mIoU, by which the best weights of a run are chosen."""
        return self.miou_percent

    def record(self, prefix: str) -> dict:
        """Return the entries of metrics.jsonl, each key beginning with `prefix`."""
        return {
            f"{prefix}_miou_percent": self.miou_percent,
            f"{prefix}_pixel_accuracy_percent": self.pixel_accuracy_percent,
            f"{prefix}_class_iou_percent": [
                None if np.isnan(iou) else float(iou) for iou in self.class_iou_percent
            ],
        }

    def table(self) -> str:
        """Return a line for each class: its name, IoU and accuracy."""
        names = self.class_names or [str(i) for i in range(len(self.confusion))]
        width = max(5, *map(len, names))
        lines = [f"{'class':{width}}  IoU %  accuracy %"]
        for name, iou, accuracy in zip(names, self.class_iou_percent, self.class_accuracy_percent):
            lines.append(f"{name:{width}}  {iou:5.2f}  {accuracy:10.2f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        known = int((~np.isnan(self.class_iou_percent)).sum())
        return (
            f"mIoU {self.miou_percent:.2f} % ({known} of {len(self.confusion)} classes), "
            f"pixel accuracy {self.pixel_accuracy_percent:.2f} %, {self.images} images\n"
            f"{self.table()}"
        )


class ConfusionSums:
    """Sums over the images of one process; `total` adds up the processes."""

    def __init__(self, num_classes: int, class_names: tuple[str, ...] | None = None):
        self.num_classes = num_classes
        self.class_names = class_names
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.images = 0

    def add(self, probabilities: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Count a batch: probabilities (N, num_classes, H, W), labels (N, H, W) with `IGNORED`."""
        predicted = probabilities.argmax(axis=1).numpy()
        labels = labels.numpy().astype(np.int64)
        counted = labels != IGNORED
        pairs = labels[counted] * self.num_classes + predicted[counted]
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        self.confusion += counts.reshape(self.confusion.shape)
        self.images += len(labels)

    def total(self) -> SegmentationMetrics:
        """Return the metrics over all processes. Counts are exact up to 2**53 pixels."""
        sums = sum_over_ranks(np.append(self.confusion.ravel(), self.images).astype("float64"))
        *confusion, images = sums.astype(np.int64)
        return SegmentationMetrics(
            int(images), np.array(confusion).reshape(self.confusion.shape), self.class_names
        )
