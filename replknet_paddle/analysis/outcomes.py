"""The outcome of a classifier's evaluation, from which log, metrics.jsonl and report come."""

from dataclasses import dataclass

import numpy as np

CONFIDENCE_BINS = 15  # as in the paper


@dataclass(frozen=True)
class Outcomes:
    """Counts of one evaluation and, where they were asked for, the answers image by image."""

    images: int
    top1: int  # images whose label is the largest logit
    top5: int  # images whose label is among the 5 largest
    loss: float  # mean cross entropy, in nats
    num_classes: int  # that the network tells apart
    labels: np.ndarray | None = None  # (N,) int64, the true classes in the list's order
    classes: np.ndarray | None = None  # (N, k) int64, the most probable classes, best first
    scores: np.ndarray | None = None  # (N, k) float64, their probabilities

    @property
    def top1_percent(self) -> float:
        return 100.0 * self.top1 / self.images

    @property
    def top5_percent(self) -> float:
        return 100.0 * self.top5 / self.images

    @property
    def score(self) -> float:
        """The figure by which RUN/best is chosen: top-1, or -1 for a loss that is not finite."""
        return self.top1_percent if np.isfinite(self.loss) else -1.0

    def record(self, prefix: str) -> dict[str, float]:
        """Return the figures for metrics.jsonl; each key begins with `prefix`."""
        return {
            f"{prefix}_top1_percent": self.top1_percent,
            f"{prefix}_top5_percent": self.top5_percent,
            f"{prefix}_loss": self.loss,
        }

    def __str__(self) -> str:
        figures = [f"top-1 {self.top1_percent:.2f} % ({self.top1}/{self.images})"]
        if self.num_classes > 5:  # else every image is right
            figures.append(f"top-5 {self.top5_percent:.2f} % ({self.top5}/{self.images})")
        return ", ".join([*figures, f"loss {self.loss:.6f}"])

    @property
    def is_right(self) -> np.ndarray:
        """(N,) bool: whether the first class is the label."""
        return self.classes[:, 0] == self.labels

    def images_per_class(self) -> np.ndarray:
        """Return (num_classes,) int64: how many images have each label."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def right_per_class(self) -> np.ndarray:
        """Return (num_classes,) int64: how many of these images are right."""
        return np.bincount(self.labels[self.is_right], minlength=self.num_classes)

    def confusion_matrix(self) -> np.ndarray:
        """Return (num_classes, num_classes) int64: images by label (row) and first class."""
        cells = self.labels * self.num_classes + self.classes[:, 0]
        counts = np.bincount(cells, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)

    def confusions(self, limit: int) -> list[tuple[int, int, int]]:
        """Return the most frequent mistakes: (label, first class, images), the most first."""
        wrong = ~self.is_right
        pairs = np.stack([self.labels[wrong], self.classes[wrong, 0]], axis=1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]

    def confidence_bins(self) -> np.ndarray:
        """Return (15, 3) float64 for bins of the first class's probability, ]0, 1/15], ]1/15, 2/15]
        and so on, 0 in the first: images, and the sums of their probabilities and of right ones. A
        NaN is in the last."""
        confidences = self.scores[:, 0]
        bins = np.searchsorted(np.arange(1, CONFIDENCE_BINS) / CONFIDENCE_BINS, confidences)
        columns = np.ones(len(bins)), confidences, self.is_right
        return np.stack([np.bincount(bins, each, CONFIDENCE_BINS) for each in columns], axis=1)

    @property
    def calibration_error(self) -> float:
        """The expected calibration error, 0 to 1 (Guo et al., arXiv 1706.04599, equation 3): the
        distance of a bin's accuracy from its mean probability, on average over the images; NaN
        where a probability is NaN."""
        images, confidences, right = self.confidence_bins().T
        return float(np.abs(right - confidences).sum() / images.sum())

    def confident_mistakes(self, limit: int) -> list[int]:
        """Return the indices of wrong images, the one with the largest probability first."""
        wrong = np.flatnonzero(~self.is_right)
        order = np.argsort(-self.scores[wrong, 0], kind="stable")[:limit]
        return wrong[order].tolist()
