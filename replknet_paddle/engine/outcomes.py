"""The answers of an evaluation image by image, for its report."""

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.data.dataset import ListDataset
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.metrics import Metrics, MetricSums, top_classes
from replknet_paddle.runtime.processes import sum_over_ranks

KEPT_CLASSES = 5


@dataclass(frozen=True)
class Evaluation:
    """What there is to say of a finished evaluation.

    Attributes:
        config: with MODEL.NUM_CLASSES a number.
        class_names: one for each class, or None.
        metrics, outcomes: over all images, and for each.
        dataset: the images, in the order of `outcomes`.
    """

    config: object
    class_names: list[str] | None
    metrics: Metrics
    outcomes: Outcomes
    dataset: ListDataset


class OutcomeSums:
    """`MetricSums` that also notes each image's answer; every rank fills its share of the rows.

    Args:
        sums: of the metrics.
        loader: of this process's images, over `EvalBatches`.
        num_classes: length of the logits.
    """

    def __init__(self, sums: MetricSums, loader: Loader, num_classes: int):
        self.sums = sums
        self.indices = iter(loader.batch_sampler.indices)
        self.kept = min(KEPT_CLASSES, num_classes)
        self.values = np.zeros((len(loader.dataset), 1 + 2 * self.kept))

    def add(self, logits: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Count a batch: logits (N, classes), labels (N,) int64."""
        self.sums.add(logits, labels)
        logits = logits.astype("float32")
        classes = top_classes(logits, labels, self.kept)
        scores = np.take_along_axis(F.softmax(logits).numpy(), classes, axis=1)
        for row in np.concatenate([labels.numpy()[:, None], classes, scores], axis=1):
            self.values[next(self.indices)] = row

    def total(self) -> Metrics:
        """The metrics over all processes."""
        return self.sums.total()

    def outcomes(self) -> Outcomes:
        """The answers of all processes."""
        values = sum_over_ranks(self.values)
        labels, classes, scores = np.split(values, [1, 1 + self.kept], axis=1)
        return Outcomes(labels[:, 0].astype("int64"), classes.astype("int64"), scores)
