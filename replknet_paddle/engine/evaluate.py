"""The evaluation loop, and a classifier's answers image by image from all processes."""

from collections.abc import Callable
from itertools import islice

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.precision import Precision
from replknet_paddle.ops import cache_weights
from replknet_paddle.runtime.processes import sum_over_ranks, world_size

KEPT_CLASSES = 5  # of each image


@paddle.no_grad()
def evaluate(
    *,
    model: paddle.nn.Layer,
    inference: Callable,
    loader: Loader,
    precision: Precision,
    sums,
    progress: Callable,
):
    """Return the total of `sums`, such as `OutcomeSums`, over the loaders of all processes, whose
    lengths may differ.

    `model` is left in evaluation mode; `inference` is `model` itself, or a way to use it, which
    gives what `sums` takes. `progress` (title, total=, unit=) gives the `Bar` that shows how far it
    is.
    """
    model.eval()
    total, done = len(loader.dataset), 0
    with cache_weights(model), progress("evaluation", total=total, unit="images") as bar:
        for images, labels in loader:
            with precision.autocast():
                outputs = inference(images)
            sums.add(outputs, labels)
            done += len(images) * world_size()
            bar.show(min(done, total))
    return sums.total()


class OutcomeSums:
    """The answers to the images of one process, by its `loader` over `EvalBatches`; `total` has
    those of all processes.

    Every rank fills its share of the rows, one for each image, and leaves zeros in the others, so
    that the sum over the ranks is exact.
    """

    def __init__(self, num_classes: int, loader: Loader, best_by: str = "top1"):
        self.num_classes, self.best_by = num_classes, best_by
        self.indices = iter(loader.batch_sampler.indices)
        self.kept = min(KEPT_CLASSES, num_classes)
        # Label, rank, loss, margin, classes, scores.
        self.rows = np.zeros((len(loader.dataset), 4 + 2 * self.kept))

    def add(self, logits: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Keep the answers of a batch: logits (N, classes), labels (N,) int64."""
        logits = logits.astype("float32")
        ranks = label_ranks(logits, labels).numpy()
        losses = F.cross_entropy(logits, labels, reduction="none").numpy()
        margins = np.zeros(len(ranks))
        if self.num_classes == 2:
            # Unlike the probability of class 1, it has no ties where the network is nearly sure.
            with np.errstate(invalid="ignore"):  # infinity less infinity
                margins = np.diff(logits.numpy().astype("float64"))
        classes = top_classes(logits, labels, self.kept)
        scores = np.take_along_axis(F.softmax(logits).numpy(), classes, axis=1)
        columns = [labels.numpy(), ranks, losses, margins, classes, scores]
        self.rows[list(islice(self.indices, len(ranks)))] = np.column_stack(columns)

    def total(self) -> Outcomes:
        """Return the outcome over all processes."""
        rows = sum_over_ranks(self.rows)
        labels, ranks, losses, margins = rows[:, :4].T
        classes, scores = np.split(rows[:, 4:], 2, axis=1)
        return Outcomes(
            self.num_classes,
            labels.astype("int64"),
            ranks.astype("int64"),
            losses,
            classes.astype("int64"),
            scores,
            margins if self.num_classes == 2 else None,
            self.best_by,
        )


def top_classes(logits: paddle.Tensor, labels: paddle.Tensor, count: int) -> np.ndarray:
    """Return the `count` classes of each sample that rank first, (N, count) int64, in the order of
    `label_ranks`, so that the label stands where that says."""
    values, labels = logits.numpy(), labels.numpy()
    if np.isfinite(values).all():  # almost always, in a tenth of the time of sorting 1,000 classes
        order = np.empty((len(values), min(count, values.shape[1])), "int64")
        for place in range(order.shape[1]):
            order[:, place] = values.argmax(axis=1)  # of equal ones, the first
            np.put_along_axis(values, order[:, place, None], -np.inf, axis=1)
        return order
    is_nan = np.isnan(values)
    is_broken_label = is_nan & (np.arange(values.shape[1]) == labels[:, None])
    # Sorted by the last key first; equal ones stay in the order of their numbers.
    order = np.lexsort((-values, ~is_nan, is_broken_label), axis=1)
    return order[:, :count]


def label_ranks(logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
    """Return how many classes rank above each sample's label: (N, classes), (N,) -> (N,).

    Equal logits rank by class number, so that a network whose logits are all equal is not always
    right. A NaN logit ranks above the label, and a label whose logit is NaN ranks last.
    """
    label_logits = paddle.take_along_axis(logits, labels.unsqueeze(1), axis=1)
    classes = paddle.arange(logits.shape[1]).unsqueeze(0)
    before = paddle.logical_not(logits <= label_logits)
    tied = paddle.logical_and(logits == label_logits, classes < labels.unsqueeze(1))
    return paddle.logical_or(before, tied).astype("int64").sum(axis=1)
