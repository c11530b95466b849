"""The outcome of a classifier's evaluation, from which log, metrics.jsonl and report come."""

from dataclasses import dataclass

import numpy as np

CONFIDENCE_BINS = 15  # as in the paper


@dataclass(frozen=True)
class Outcomes:
    """The answers of one evaluation image by image, in the list's order, and the figures that they
    give: the same ones however many processes have found the answers."""

    num_classes: int  # that the network tells apart
    labels: np.ndarray  # (N,) int64, the true classes
    ranks: np.ndarray  # (N,) int64, how many classes have a larger logit than the true one
    losses: np.ndarray  # (N,) float64, cross entropy in nats
    classes: np.ndarray  # (N, k) int64, the most probable classes, best first
    scores: np.ndarray  # (N, k) float64, their probabilities
    margins: np.ndarray | None = None  # (N,) float64, of two classes: logit of 1 less that of 0
    best_by: str = "top1"  # TRAIN.BEST_BY

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross entropy, in nats."""
        return float(self.losses.mean())

    @property
    def top1(self) -> int:
        """Images whose label is the largest logit."""
        return int((self.ranks < 1).sum())

    @property
    def top5(self) -> int:
        """Images whose label is among the 5 largest."""
        return int((self.ranks < 5).sum())

    @property
    def top1_percent(self) -> float:
        return 100.0 * self.top1 / self.images

    @property
    def top5_percent(self) -> float:
        return 100.0 * self.top5 / self.images

    @property
    def score(self) -> float:
        """The figure by which RUN/best is chosen, percent; -1: it or the loss is not finite."""
        by_top1 = self.best_by == "top1"
        percent = self.top1_percent if by_top1 else 100.0 * self.figures()[self.best_by]
        return percent if np.isfinite([self.loss, percent]).all() else -1.0

    def figures(self) -> dict[str, float]:
        """Return `CLASS_FIGURES` and, of two classes, `TWO_CLASS_FIGURES`, as fractions.

        They are scikit-learn's, with its defaults and zero_division=0: macro means are over the
        classes that are some image's label or answer, balanced accuracy is the mean recall of those
        that are a label, and class 1 is the positive one.
        """
        of_class, images = self.per_class(), self.images_per_class()
        figures = {"balanced_accuracy": of_class["recall"][images > 0].mean()}
        for mean, weights in (("macro", self.is_known), ("weighted", images)):
            for name, values in of_class.items():
                figures[f"{mean}_{name}"] = np.average(values, weights=weights)
        if self.margins is not None:
            figures |= two_class_figures(self.labels == 1, self.margins)
        return {name: float(figure) for name, figure in figures.items()}

    def record(self, prefix: str) -> dict[str, float]:
        """Return the figures for metrics.jsonl; each key begins with `prefix`."""
        return {
            f"{prefix}_top1_percent": self.top1_percent,
            f"{prefix}_top5_percent": self.top5_percent,
            f"{prefix}_loss": self.loss,
            **{f"{prefix}_{name}": figure for name, figure in self.figures().items()},
        }

    def __str__(self) -> str:
        figures = [f"top-1 {self.top1_percent:.2f} % ({self.top1}/{self.images})"]
        if self.num_classes > 5:  # else every image is right
            figures.append(f"top-5 {self.top5_percent:.2f} % ({self.top5}/{self.images})")
        if self.best_by != "top1":
            figures.append(f"{self.best_by} {100 * self.figures()[self.best_by]:.2f} %")
        return ", ".join([*figures, f"loss {self.loss:.6f}"])

    @property
    def is_right(self) -> np.ndarray:
        """(N,) bool: whether the first class is the label."""
        return self.classes[:, 0] == self.labels

    def images_per_class(self) -> np.ndarray:
        """Return (num_classes,) int64: how many images have each label."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def answers_per_class(self) -> np.ndarray:
        """Return (num_classes,) int64: of how many images each class is the first."""
        return np.bincount(self.classes[:, 0], minlength=self.num_classes)

    @property
    def is_known(self) -> np.ndarray:
        """(num_classes,) bool: whether a class is the label or the first class of any image."""
        return self.images_per_class() + self.answers_per_class() > 0

    def right_per_class(self) -> np.ndarray:
        """Return (num_classes,) int64: how many of the images with each label are right."""
        return np.bincount(self.labels[self.is_right], minlength=self.num_classes)

    def per_class(self) -> dict[str, np.ndarray]:
        """Return precision, recall and F1 of each class, (num_classes,) float64; 0 where there is
        nothing to divide by."""
        images, answers = self.images_per_class(), self.answers_per_class()
        right = self.right_per_class()
        return {
            "precision": right / np.maximum(answers, 1),
            "recall": right / np.maximum(images, 1),
            "f1": 2 * right / np.maximum(images + answers, 1),
        }

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


def two_class_figures(is_positive: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return the area under the ROC curve and the average precision of (N,) scores, by which the
    positive images should be the first; both NaN where all images are of one class, or a score is
    NaN. Equal scores are one threshold."""
    all_positive, all_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not all_positive or not all_negative or np.isnan(scores).any():
        return {"roc_auc": np.nan, "average_precision": np.nan}
    thresholds, places = np.unique(-scores, return_inverse=True)  # the highest score first
    positive, negative = (
        np.bincount(places[chosen], minlength=len(thresholds))
        for chosen in (is_positive, ~is_positive)
    )
    found, wrong = positive.cumsum(), negative.cumsum()
    # Pairs of a positive image and a negative one below it, and half of those that are equal.
    twice_pairs = (positive * (2 * (all_negative - wrong) + negative)).sum()
    return {
        "roc_auc": twice_pairs / (2 * all_positive * all_negative),
        "average_precision": (positive * (found / (found + wrong))).sum() / all_positive,
    }
