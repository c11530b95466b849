"""Classification losses: cross entropy against smoothed labels, and against soft targets.

Both average over the batch, and both compute in float32 with AMP switched off, whatever the
logits' type: half precision is too coarse for the logarithm of 1000 small probabilities.
"""

import paddle
from paddle import nn
from paddle.nn import functional as F


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
