"""Files of features of pictures, and how well features tell classes apart.

FILE.npy has the features (N, D), FILE.csv beside it the path and the label, a text, of each row.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file
from replknet_paddle.runtime.packages import import_extra

Features = tuple[np.ndarray, np.ndarray]  # float64 (N, D), labels (N,)


def save_features(path: str, values: np.ndarray, rows: Sequence[tuple]) -> None:
    """Write features (N, D), and the path and label of each, into both files or none."""
    _check(path, values)
    table_path = Path(path).with_suffix(".csv")
    with atomic_file(path, "wb") as file:
        np.save(file, values)
        file.flush()  # a full disk is found out before the other file is there
        with atomic_file(table_path, errors="surrogateescape", newline="") as table:
            # All quoted, for Python's csv lets a carriage return end a row that is not.
            writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerows([("path", "label"), *rows])
            table.flush()
            Path(path).unlink(missing_ok=True)  # or else it might stay with the labels of others


def load_features(path: str) -> Features:
    """Return the features and labels in both files; InputError: they are not there, or wrong."""
    options = dict(encoding="utf-8", errors="surrogateescape", newline="")
    try:
        with open(path, "rb") as file, open(Path(path).with_suffix(".csv"), **options) as table:
            values = np.lib.format.read_array(file, allow_pickle=False)
            labels = [row.get("label") for row in csv.DictReader(table)]
    except Exception as error:  # damaged files make NumPy's reader raise almost anything
        raise InputError(
            f"{path}: no .npy file of replknet embed with the .csv file beside it ({error})"
        ) from None
    _check(path, values)
    if len(labels) != len(values) or not all(labels):
        raise InputError(
            f"{path} has {len(values):,} rows, the .csv file beside it {len(labels):,}, of which "
            f"{sum(map(bool, labels)):,} have a label; allowed: a label for each row"
        )
    return values.astype(np.float64), np.array(labels)


def _check(path: str, values: np.ndarray) -> None:
    is_matrix = values.ndim == 2 and values.size and values.dtype.kind == "f"
    if not is_matrix or not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise InputError(
            f"{path}: features are {values.dtype} {values.shape}; allowed: a row for each picture, "
            "of floating-point numbers that are all finite"
        )


def probe(train: Features, val: Features, *, k: int) -> dict[str, tuple[float, float]]:
    """Return the accuracy and the balanced accuracy on `val`, from 0 to 1, by the name of each of
    two classifiers that learn from `train`.

    Logistic regression, with the penalty of C = 1, on features of mean 0 and variance 1 over
    `train`; and the vote of the `k` nearest pictures by the cosine, the first label if they tie.

    Raises:
        InputError: scikit-learn is missing, or the features cannot be compared so.
    """
    (features, labels), (val_features, val_labels) = train, val
    size, val_size = features.shape[1], val_features.shape[1]
    unknown = np.setdiff1d(val_labels, labels)[:5]
    for is_wrong, problem in (
        (
            size != val_size,
            f"{size} features to learn from, {val_size} to judge by; allowed: equal",
        ),
        (len(set(labels)) < 2, f"one label, {labels[0]}, to learn from; allowed: two or more"),
        (len(unknown), f"labels to judge by that none to learn from has: {', '.join(unknown)}"),
        (not 1 <= k <= len(labels), f"-k is {k}; allowed: 1 to {len(labels)}, all to learn from"),
    ):
        if is_wrong:
            raise InputError(problem)
    linear_model, metrics, neighbors, pipeline, preprocessing = (
        import_extra(f"sklearn.{name}", "demo")
        for name in ("linear_model", "metrics", "neighbors", "pipeline", "preprocessing")
    )
    classifiers = {
        "logistic regression": pipeline.make_pipeline(
            preprocessing.StandardScaler(), linear_model.LogisticRegression(C=1.0, max_iter=1000)
        ),
        f"{k} nearest neighbours": neighbors.KNeighborsClassifier(
            k, algorithm="brute", metric="cosine"
        ),
    }
    found = {}
    for name, classifier in classifiers.items():
        answers = val_labels, classifier.fit(features, labels).predict(val_features)
        balanced = metrics.balanced_accuracy_score(*answers)
        found[name] = float(metrics.accuracy_score(*answers)), float(balanced)
    return found
