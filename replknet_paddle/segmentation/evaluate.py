"""The training loss of segmentation, its inference, and its metrics from a confusion matrix, which
adds up over images and processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn import functional as F

from replknet_paddle.data.lists import IGNORED
from replknet_paddle.data.loader import Loader
from replknet_paddle.runtime.errors import counted
from replknet_paddle.runtime.processes import sum_over_ranks
from replknet_paddle.segmentation.data import Box, resized_size
from replknet_paddle.segmentation.upernet import resize

AUXILIARY_WEIGHT = 0.4
STRIP_VALUES = 2**27  # probabilities at once, of all classes and pixels: 512 MiB


def segmentation_loss(
    logits: tuple[paddle.Tensor, paddle.Tensor], labels: paddle.Tensor, *, align_corners: bool
) -> paddle.Tensor:
    """Return the cross entropy, nats, of the decode head plus 0.4 times the auxiliary head's.

    Each is the sum over the pixels that count divided by the number of all pixels, ignored and
    padded ones among them: the mean of the official code (mmsegmentation's `avg_non_ignore` False).
    Logits (N, num_classes, h, w) of both heads are resized to labels (N, H, W).
    """
    size, labels = labels.shape[1:], labels.astype("int64")
    losses = []
    for x in logits:
        x = resize(x.astype("float32"), size, align_corners=align_corners)
        entropy = F.cross_entropy(x, labels, axis=1, ignore_index=IGNORED, reduction="none")
        losses.append(entropy.mean())
    decoded, auxiliary = losses
    return decoded + AUXILIARY_WEIGHT * auxiliary


# ---- inference


def build_inference(config, network: Callable) -> Callable:
    """Return the function of normalized images (N, 3, H, W) that gives the most probable class of
    each pixel, (N, H, W) uint8, by the probabilities of `build_strips`."""
    strips = build_strips(config, network)

    @paddle.no_grad()
    def classes(images: paddle.Tensor) -> paddle.Tensor:
        return paddle.concat([x.argmax(axis=1).astype("uint8") for x in strips(images)], axis=1)

    return classes


def build_strips(config, network: Callable) -> Callable:
    """Return the function of normalized images (N, 3, H, W) that yields the probabilities of their
    classes, (N, num_classes, rows, W) float32, from top to bottom, as `config` says: in one piece,
    or of a large image in pieces of `STRIP_VALUES`.

    Images of any size, whole or by sliding windows, at one scale or several, with or without mirror
    images: the official evaluation (mmsegmentation 0.x). Logits are resized to the image's own size
    before softmax, and probabilities of scales and mirror images are averaged.

    Args:
        network: images (N, 3, h, w) -> logits (N, num_classes, h, w).
    """
    settings, crop_size = config.SEGMENTATION, config.DATA.IMAGE_SIZE
    turns = (False, True) if settings.EVAL_FLIP else (False,)

    def logits_of(images: paddle.Tensor) -> Iterator[tuple[paddle.Tensor, bool]]:
        """Yield logits at each scale, of the images and of mirror images."""
        size = images.shape[2:]
        for ratio in settings.EVAL_RATIOS:
            new_size = resized_size(size, settings.RESIZE, ratio)
            resized = images
            if new_size != tuple(size):
                resized = resize(images, new_size, align_corners=False)
            for mirrored in turns:
                turned = resized.flip(3) if mirrored else resized
                yield image_logits(network, turned, crop_size, settings.SLIDE_STRIDE), mirrored

    def strips(images: paddle.Tensor) -> Iterator[paddle.Tensor]:
        count, _, height, width = images.shape
        rows = max(1, STRIP_VALUES // (count * config.MODEL.NUM_CLASSES * width))
        found = logits_of(images)
        if rows < height:
            found = list(found)  # small beside the image, which all of its strips need
        for top in range(0, height, rows):
            strip, total = range(top, min(top + rows, height)), 0
            for logits, mirrored in found:
                logits = resized_rows(
                    logits, (height, width), strip, align_corners=settings.ALIGN_CORNERS
                )
                shares = F.softmax(logits, axis=1)
                total = total + (shares.flip(3) if mirrored else shares)
            yield total / (len(settings.EVAL_RATIOS) * len(turns))

    return strips


def resized_rows(
    x: paddle.Tensor, size: tuple[int, int], rows: range, *, align_corners: bool
) -> paddle.Tensor:
    """Return rows of what `resize` makes of `x`: all of them to the bit, others to rounding."""
    if len(rows) == size[0]:
        same = tuple(x.shape[2:]) == size
        return x if same else resize(x, size, align_corners=align_corners)
    height = x.shape[2]
    if align_corners:
        places = np.array(rows) * ((height - 1) / (size[0] - 1))
    else:
        places = np.maximum((np.array(rows) + 0.5) * (height / size[0]) - 0.5, 0)
    first = np.minimum(places.astype(np.int64), height - 1)
    north, south = (
        x.gather(paddle.to_tensor(np.minimum(row, height - 1)), axis=2)
        for row in (first, first + 1)
    )
    share = paddle.to_tensor((places - first).astype("float32")).reshape([-1, 1])
    mixed = north + (south - north) * share
    return resize(mixed, (len(rows), size[1]), align_corners=align_corners)


def image_logits(
    network: Callable, images: paddle.Tensor, crop_size: int, stride: int | None
) -> paddle.Tensor:
    """Return logits at the size of the images, float32; where windows overlap, their average."""
    if stride is None:
        return network(images).astype("float32")
    height, width = images.shape[2:]
    counts = np.zeros((1, 1, height, width), np.float32)
    total = None
    for top, left, bottom, right in windows(height, width, crop_size, stride):
        logits = network(images[:, :, top:bottom, left:right]).astype("float32")
        if total is None:
            total = paddle.zeros([*logits.shape[:2], height, width])
        total[:, :, top:bottom, left:right] += logits
        counts[:, :, top:bottom, left:right] += 1
    return total / paddle.to_tensor(counts)


def windows(height: int, width: int, side: int, stride: int) -> Iterator[Box]:
    """Yield boxes (top, left, bottom, right) that cover an image, row by row: `side` x `side`
    pixels, less where the image is smaller; the last of a row or column ends with the image."""
    for bottom in _ends(height, side, stride):
        for right in _ends(width, side, stride):
            yield max(bottom - side, 0), max(right - side, 0), bottom, right


def _ends(length: int, side: int, stride: int) -> Sequence[int]:
    steps = -(-max(length - side, 0) // stride)
    return [min(side + i * stride, length) for i in range(steps + 1)]


# ---- metrics


@dataclass(frozen=True)
class SegmentationMetrics:
    """The result of one evaluation."""

    images: int  # how many were evaluated
    confusion: np.ndarray  # (num_classes, num_classes) pixels by label (row) and prediction
    class_names: tuple[str, ...] | None = None  # None: numbers
    # Where they were asked for: `image_iou_percent` of each image, (images,) in the list's order.
    image_ious: np.ndarray | None = None

    @property
    def class_iou_percent(self) -> np.ndarray:
        """Intersection over union of each class; NaN for one that no label or prediction has."""
        return iou_percent(self.confusion)

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

    def confusions(self, limit: int | None = None) -> list[tuple[int, int, int]]:
        """Return the most frequent mistakes: (label, prediction, pixels), the most first."""
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        pairs = np.argwhere(wrong)
        order = np.argsort(-wrong[tuple(pairs.T)], kind="stable")[:limit]
        return [(*pair, int(wrong[tuple(pair)])) for pair in pairs[order].tolist()]

    def worst_images(self, limit: int) -> list[int]:
        """Return the indices of images that are not all right, the one of the lowest IoU first."""
        order = np.argsort(self.image_ious, kind="stable")[:limit]
        return [i for i in order.tolist() if self.image_ious[i] < 100]  # which NaN is not

    def record(self, prefix: str) -> dict:
        """Return the entries of metrics.jsonl, each key beginning with `prefix`."""
        return {
            f"{prefix}_miou_percent": self.miou_percent,
            f"{prefix}_pixel_accuracy_percent": self.pixel_accuracy_percent,
            f"{prefix}_class_iou_percent": [
                None if np.isnan(iou) else float(iou) for iou in self.class_iou_percent
            ],
        }

    @property
    def summary(self) -> str:
        """The figures over all classes, on one line."""
        ious = self.class_iou_percent
        return (
            f"mIoU {self.miou_percent:.2f} % ({(~np.isnan(ious)).sum()} of {len(ious)} classes), "
            f"pixel accuracy {self.pixel_accuracy_percent:.2f} %, {counted(self.images, 'image')}"
        )

    def __str__(self) -> str:
        ious, accuracies = self.class_iou_percent, self.class_accuracy_percent
        names = self.class_names or [str(i) for i in range(len(ious))]
        width = max(5, *map(len, names))
        lines = [self.summary, f"{'class':{width}}  IoU %  accuracy %"]
        for name, *figures in zip(names, ious, accuracies):
            iou, accuracy = ("-" if np.isnan(x) else f"{x:.2f}" for x in figures)
            lines.append(f"{name:{width}}  {iou:>5}  {accuracy:>10}")
        return "\n".join(lines)


class ConfusionSums:
    """Sums over the images of one process; `total` adds up the processes."""

    def __init__(
        self,
        num_classes: int,
        class_names: tuple[str, ...] | None = None,
        loader: Loader | None = None,
    ):
        self.num_classes = num_classes
        self.class_names = class_names
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.images = 0
        self.image_ious = None
        if loader is not None:
            self.indices = iter(loader.batch_sampler.indices)
            self.image_ious = np.zeros(len(loader.dataset))

    def add(self, predicted: paddle.Tensor, labels: paddle.Tensor) -> None:
        """Count a batch: classes (N, H, W), and labels (N, H, W) with `IGNORED`."""
        for found, wanted in zip(predicted.numpy(), labels.numpy().astype(np.int64)):
            counted = wanted != IGNORED
            pairs = wanted[counted] * self.num_classes + found[counted]
            counts = np.bincount(pairs, minlength=self.num_classes**2)
            counts = counts.reshape(self.confusion.shape)
            self.confusion += counts
            self.images += 1
            if self.image_ious is not None:
                self.image_ious[next(self.indices)] = image_iou_percent(counts)

    def total(self) -> SegmentationMetrics:
        """Return the metrics over all processes. Counts are exact up to 2**53 pixels."""
        sums = sum_over_ranks(np.append(self.confusion.ravel(), self.images).astype("float64"))
        *confusion, images = sums.astype(np.int64)
        return SegmentationMetrics(
            int(images),
            np.array(confusion).reshape(self.confusion.shape),
            self.class_names,
            None if self.image_ious is None else sum_over_ranks(self.image_ious),
        )


def iou_percent(confusion: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class of a confusion matrix; NaN for a class of
    which there is nothing."""
    hits = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return np.where(union > 0, 100.0 * hits / np.maximum(union, 1), np.nan)


def image_iou_percent(confusion: np.ndarray) -> float:
    """Return the mean IoU of the classes that one image's label has; NaN where no pixel counts.

    Classes that are only predicted have no IoU here: one stray pixel would weigh as much as all of
    the image. It counts against the class whose pixel it is.
    """
    ious = iou_percent(confusion)[confusion.any(axis=1)]
    return float(ious.mean()) if ious.size else np.nan
