"""Classification metrics as exact sums over batches and processes."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.runtime.processes import sum_over_ranks


@dataclass(frozen=True)
class Metrics:
    """The results of one evaluation.

    Attributes:
        images: how many were evaluated.
        top1, top5: how many of them had their label among the 1 or 5 largest logits.
        loss: mean cross entropy, in nats.
    """

    images: int
    top1: int
    top5: int
    loss: float

    @property
    def top1_percent(self) -> float:
        return 100.0 * self.top1 / self.images

    @property
    def top5_percent(self) -> float:
        return 100.0 * self.top5 / self.images

    @property
    def score(self) -> float:
        """By which the best weights of a run are chosen; -1 for those whose loss is not finite."""
        return self.top1_percent if np.isfinite(self.loss) else -1.0

    def record(self, prefix: str) -> dict[str, float]:
        """The figures for metrics.jsonl; each key begins with `prefix`."""
        return {
            f"{prefix}_top1_percent": self.top1_percent,
            f"{prefix}_top5_percent": self.top5_percent,
            f"{prefix}_loss": self.loss,
        }

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1_percent:.2f} % ({self.top1}/{self.images}), "
            f"top-5 {self.top5_percent:.2f} % ({self.top5}/{self.images}), "
            f"loss {self.loss:.6f}"
        )


class MetricSums:
    """Sums over the batches of one process; `total` sums over the processes."""

    def __init__(self):
        self.values = np.zeros(4, dtype="float64")  # images, top-1, top-5, loss

    def add(self, logits: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Count a batch: logits (N, classes), labels (N,) int64."""
        logits = logits.astype("float32")
        ranks = label_ranks(logits, labels).numpy()
        losses = F.cross_entropy(logits, labels, reduction="none").numpy()
        self.values += [
            len(ranks),
            (ranks < 1).sum(),
            (ranks < 5).sum(),
            losses.sum(dtype="float64"),
        ]

    def total(self) -> Metrics:
        """The metrics over all processes."""
        images, top1, top5, loss = sum_over_ranks(self.values).tolist()
        return Metrics(int(images), int(top1), int(top5), loss / images)


def top_classes(logits: paddle.Tensor, labels: paddle.Tensor, count: int) -> np.ndarray:
    """The `count` classes of each sample that rank first: (N, classes), (N,) -> (N, count) int64.

    In the order of `label_ranks`, so that the label stands where that says.
    """
    values, labels = logits.numpy(), labels.numpy()
    is_nan = np.isnan(values)
    is_broken_label = is_nan & (np.arange(values.shape[1]) == labels[:, None])
    # Sorted by the last key first; equal ones stay in the order of their numbers.
    order = np.lexsort((-values, ~is_nan, is_broken_label), axis=1)
    return order[:, :count]


def label_ranks(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """How many classes rank above each sample's label: (N, classes), (N,) -> (N,).

    Equal logits rank by class number, so that a network whose logits are all equal is not always
    right. A NaN logit ranks above the label, and a label whose logit is NaN ranks last.
    """
    label_logits = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1)
    classes = paddle.arange(logits.shape[1]).unsqueeze(0)
    before = paddle.logical_not(logits <= label_logits)
    tied = paddle.logical_and(logits == label_logits, classes < labels.unsqueeze(1))
    return paddle.logical_or(before, tied).astype("int64").sum(axis=1)
