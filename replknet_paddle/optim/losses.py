"""Classification losses: cross entropy against smoothed labels, against soft targets, and with
weights of the classes.

All average over the batch, and all compute in float32 with AMP switched off, whatever the logits'
type: half precision is too coarse for the logarithm of 1000 small probabilities.
"""

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from replknet_paddle.runtime.errors import InputError, counted


class LabelSmoothingCrossEntropy(nn.Layer):
    """Cross entropy against the label with `1 - smoothing` and all classes sharing `smoothing`.

    The label's class has its share of the smoothing too: its target is
    1 - smoothing + smoothing / C (arXiv 1512.00567, section 7). 0 is plain cross entropy.
    """

    def __init__(self, smoothing: float):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: paddle.Tensor, labels: paddle.Tensor) -> paddle.Tensor:
        """Return the loss of logits (N, C) of any float type and integer labels (N,)."""
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"expected logits (N, C) and labels (N,); got {logits.shape} and {labels.shape}"
            )
        with paddle.amp.auto_cast(enable=False):
            log_probs = F.log_softmax(logits.astype("float32"), axis=-1)
            of_label = paddle.take_along_axis(log_probs, labels.unsqueeze(1), axis=1)  # (N, 1)
            return -((1.0 - self.smoothing) * of_label.mean() + self.smoothing * log_probs.mean())


class SoftTargetCrossEntropy(nn.Layer):
    """Cross entropy against a distribution over the classes, as mixup and cutmix produce."""

    def forward(self, logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        """Return the loss of logits and targets (N, C) of any float types."""
        if logits.ndim != 2 or targets.shape != logits.shape:  # which would broadcast
            raise ValueError(
                f"expected logits and targets of one shape (N, C); "
                f"got {logits.shape} and {targets.shape}"
            )
        with paddle.amp.auto_cast(enable=False):
            log_probs = F.log_softmax(logits.astype("float32"), axis=-1)
            return -(targets.astype("float32") * log_probs).sum(axis=-1).mean()


class WeightedCrossEntropy(nn.Layer):
    """Cross entropy in which an image counts as much as its class weighs.

    The loss of an image of class y is weights[y] times that of `LabelSmoothingCrossEntropy`, and of
    a mixed image the mean of those of its two labels, by their shares. The sum is divided by the
    number of images, not by that of the weights, so that the gradients of processes and accumulated
    batches average to that of the global batch. PyTorch's weights multiply the classes of a
    smoothed target instead, which draws each image towards rare classes; without smoothing the
    terms are the same.
    """

    def __init__(self, weights: np.ndarray, smoothing: float):
        super().__init__()
        self.weights = paddle.to_tensor(weights, dtype="float32")  # (C,)
        self.smoothing = smoothing

    def forward(self, logits: paddle.Tensor, targets: paddle.Tensor) -> paddle.Tensor:
        """Return the loss of logits (N, C) and integer labels (N,), or what mixup makes of them:
        soft targets (N, C), smoothed by `smoothing`."""
        with paddle.amp.auto_cast(enable=False):
            log_probs = F.log_softmax(logits.astype("float32"), axis=-1)
            smoothed = self.smoothing * log_probs.mean(axis=-1, keepdim=True)
            # What the image would add as one of each class, (N, C).
            losses = -self.weights * ((1.0 - self.smoothing) * log_probs + smoothed)
            if targets.ndim == 1:
                shares = F.one_hot(targets, logits.shape[1])
            else:
                evenly = self.smoothing / logits.shape[1]
                shares = (targets.astype("float32") - evenly) / (1.0 - self.smoothing)
            return (shares * losses).sum(axis=-1).mean()


def class_weights(wanted: str | Sequence[float], labels: np.ndarray, count: int) -> np.ndarray:
    """Return the weights of `count` classes, float64, whose mean over `labels` is 1.

    'balanced' is scikit-learn's: images / (classes that have images * images of the class), and 0
    for a class without images, which the loss never asks for. InputError: a list of another length,
    or of zeros for all images.
    """
    sizes = np.bincount(labels, minlength=count)
    if wanted == "balanced":
        weights = np.divide(1.0, sizes, out=np.zeros(count), where=sizes > 0)
    elif len(wanted) != count:
        raise InputError(
            f"TRAIN.CLASS_WEIGHTS has {counted(len(wanted), 'number')}; allowed: balanced, or one "
            f"for each of the {count} classes"
        )
    else:
        weights = np.array(wanted, "float64")
    total = weights @ sizes
    if not 0 < total < np.inf:
        raise InputError(
            f"TRAIN.CLASS_WEIGHTS is {wanted}, {total:g} in all over the training images; allowed: "
            "numbers above 0 for classes that have images"
        )
    return weights * (sizes.sum() / total)
