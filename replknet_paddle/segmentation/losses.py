"""The training loss: cross entropy of both heads at the size of the labels."""

import paddle
from paddle.nn import functional as F

from replknet_paddle.segmentation.heads import resize
from replknet_paddle.segmentation.transforms import IGNORED

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
