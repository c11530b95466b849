"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, with timm's meaning.

Sample i is mixed with sample N - 1 - i, the whole batch with one draw ("batch" mode). In a
batch of odd size the middle sample meets itself and stays as it is, and so does a batch of
one: nothing needs to be refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F

Box = tuple[int, int, int, int]


class Mix(NamedTuple):
    """The mixing of one batch."""

    lam: float  # weight of a sample's own label, [0, 1]
    box: Box | None  # top, left, bottom, right, taken from the partner (CutMix); None: mixup


def cutmix_box(height: int, width: int, lam: float, rng: np.random.Generator) -> Box:
    """Return a box of the image's shape and (1 - lam) of its area, around a uniform centre, cut."""
    side = np.sqrt(1 - lam)
    box_height, box_width = int(height * side), int(width * side)
    top = int(rng.integers(height)) - box_height // 2
    left = int(rng.integers(width)) - box_width // 2
    return max(top, 0), max(left, 0), min(top + box_height, height), min(left + box_width, width)


def cutmix_box_minmax(
    height: int, width: int, minmax: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Return a box inside the image whose sides are uniform shares of the image's, in `minmax`."""
    least, most = minmax

    def side(length: int) -> int:
        shortest = int(length * least)
        return int(rng.integers(shortest, max(int(length * most), shortest + 1)))

    box_height, box_width = side(height), side(width)
    top = int(rng.integers(0, height - box_height, endpoint=True))
    left = int(rng.integers(0, width - box_width, endpoint=True))
    return top, left, top + box_height, left + box_width


@dataclass(kw_only=True)
class Mixup:
    """Mix a batch of images and turn its labels into soft targets."""

    mixup_alpha: float  # lam ~ Beta(alpha, alpha); 0 switches mixup off
    cutmix_alpha: float  # the same for CutMix
    # (least, most) share of the image's sides for those of the CutMix box; switches CutMix on and
    # takes the place of `cutmix_alpha`.
    cutmix_minmax: Sequence[float] | None
    prob: float  # chance that a batch is mixed at all
    switch_prob: float  # chance of CutMix where both are on
    label_smoothing: float  # share of the label spread evenly over all classes, [0, 1)
    num_classes: int  # length of a soft target

    def __call__(
        self, images: paddle.Tensor, labels: paddle.Tensor, rng: np.random.Generator
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Mix one batch on the device it is on; what is passed in is left unchanged.

        Images (N, C, H, W) float32, or half precision on a GPU, and labels (N,) -> images of the
        same type, and soft targets (N, num_classes) float32.
        """
        mix = self.draw(*images.shape[-2:], rng)
        targets = mix_labels(
            labels, mix.lam, num_classes=self.num_classes, label_smoothing=self.label_smoothing
        )
        return mix_images(images, mix), targets

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Mix:
        """Draw the mixing of a batch of images of this size."""
        if rng.random() >= self.prob:
            return Mix(1.0, None)
        cuts = self.cutmix_alpha > 0 or self.cutmix_minmax is not None
        if not cuts or (self.mixup_alpha > 0 and rng.random() >= self.switch_prob):
            return Mix(float(rng.beta(self.mixup_alpha, self.mixup_alpha)), None)
        if self.cutmix_minmax is not None:
            box = cutmix_box_minmax(height, width, self.cutmix_minmax, rng)
        else:
            lam = rng.beta(self.cutmix_alpha, self.cutmix_alpha)
            box = cutmix_box(height, width, lam, rng)
        top, left, bottom, right = box
        # The area pasted, not the area drawn: the image's border may have clipped the box.
        return Mix(1 - (bottom - top) * (right - left) / (height * width), box)


def mix_images(images: paddle.Tensor, mix: Mix) -> paddle.Tensor:
    """Mix each image of (N, C, H, W) with its partner; `images` is left unchanged."""
    if mix.lam == 1:
        return images
    # [::-1] rather than flip(0): twice as fast on CPU.
    if mix.box is None:
        return images * mix.lam + images[::-1] * (1 - mix.lam)
    top, left, bottom, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right]
    return mixed


def mix_labels(
    labels: paddle.Tensor, lam: float, *, num_classes: int, label_smoothing: float
) -> paddle.Tensor:
    """Labels (N,) -> soft targets (N, num_classes) float32 of sum 1, smoothed, then mixed."""
    own = F.one_hot(labels, num_classes)
    mixed = own if lam == 1 else own * lam + own[::-1] * (1 - lam)
    return mixed * (1 - label_smoothing) + label_smoothing / num_classes
