"""The evaluation loop, and a classifier's figures as exact sums over batches and processes."""

from collections.abc import Callable

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.analysis.outcomes import Outcomes
from replknet_paddle.data.loader import Loader
from replknet_paddle.engine.precision import Precision
from replknet_paddle.ops import cache_weights
from replknet_paddle.runtime.processes import sum_over_ranks, world_size

KEPT_CLASSES = 5  # of each image, where the answers are kept


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
    """Sums over the batches of one process; `total` adds up the processes.

    With a `loader` over `EvalBatches`, each image's answer is kept as well: every rank fills its
    share of the rows.
    """

    def __init__(self, num_classes: int, loader: Loader | None = None):
        self.num_classes = num_classes
        self.values = np.zeros(4, dtype="float64")  # images, top-1, top-5, loss
        self.rows = None  # label, classes, scores
        if loader is not None:
            self.indices = iter(loader.batch_sampler.indices)
            self.kept = min(KEPT_CLASSES, num_classes)
            self.rows = np.zeros((len(loader.dataset), 1 + 2 * self.kept))

    def add(self, logits: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Count a batch: logits (N, classes), labels (N,) int64."""
        logits = logits.astype("float32")
        ranks = label_ranks(logits, labels).numpy()
        losses = F.cross_entropy(logits, labels, reduction="none").numpy()
        loss = losses.sum(dtype="float64")
        self.values += [len(ranks), (ranks < 1).sum(), (ranks < 5).sum(), loss]
        if self.rows is not None:
            classes = top_classes(logits, labels, self.kept)
            scores = np.take_along_axis(F.softmax(logits).numpy(), classes, axis=1)
            for row in np.concatenate([labels.numpy()[:, None], classes, scores], axis=1):
                self.rows[next(self.indices)] = row

    def total(self) -> Outcomes:
        """Return the outcome over all processes."""
        images, top1, top5, loss = sum_over_ranks(self.values).tolist()
        answers = ()
        if self.rows is not None:
            rows = sum_over_ranks(self.rows)
            labels, classes, scores = np.split(rows, [1, 1 + self.kept], axis=1)
            answers = labels[:, 0].astype("int64"), classes.astype("int64"), scores
        mean_loss = loss / images
        return Outcomes(int(images), int(top1), int(top5), mean_loss, self.num_classes, *answers)


def top_classes(logits: paddle.Tensor, labels: paddle.Tensor, count: int) -> np.ndarray:
    """Return the `count` classes of each sample that rank first, (N, count) int64, in the order of
    `label_ranks`, so that the label stands where that says."""
    values, labels = logits.numpy(), labels.numpy()
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
