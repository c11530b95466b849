"""What an evaluation found image by image: accuracy per class, confusion matrix, mistakes."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcomes:
    """The network's answers for the images of a list, in the order of the list.

    Attributes:
        labels: (N,) int64, the true classes.
        classes: (N, k) int64, the k classes of the largest probabilities, the largest first.
        scores: (N, k) float64, these probabilities.
    """

    labels: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @property
    def is_right(self) -> np.ndarray:
        """(N,) bool: the first class is the label."""
        return self.classes[:, 0] == self.labels

    def images_per_class(self, num_classes: int) -> np.ndarray:
        """(num_classes,) int64: how many images have each label."""
        return np.bincount(self.labels, minlength=num_classes)

    def right_per_class(self, num_classes: int) -> np.ndarray:
        """(num_classes,) int64: how many of these are right."""
        return np.bincount(self.labels[self.is_right], minlength=num_classes)

    def confusion_matrix(self, num_classes: int) -> np.ndarray:
        """(num_classes, num_classes) int64: images by label (row) and first class (column)."""
        cells = self.labels * num_classes + self.classes[:, 0]
        counts = np.bincount(cells, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes)

    def confusions(self, limit: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: label, first class, how many images; the most frequent
        first."""
        wrong = ~self.is_right
        pairs = np.stack([self.labels[wrong], self.classes[wrong, 0]], axis=1)
        pairs, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:limit]
        return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]

    def confident_mistakes(self, limit: int) -> list[int]:
        """Indices of the wrong images, the one with the largest probability first."""
        wrong = np.flatnonzero(~self.is_right)
        order = np.argsort(-self.scores[wrong, 0], kind="stable")[:limit]
        return wrong[order].tolist()
