"""Files of predictions: JSON lines or CSV, written line by line and named when they are whole."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from replknet_paddle.deploy.predictor import Prediction
from replknet_paddle.runtime.errors import InputError

SUFFIXES = (".jsonl", ".csv")


class Results(Protocol):
    """Takes one prediction after the other."""

    def write(self, prediction: Prediction) -> None: ...


class JsonLines:
    """An object a line: path, pred_label, pred_class, pred_score, and topk, a list of objects with
    label, class and score; or path and problem."""

    def __init__(self, file, class_names: Sequence[str]):
        self.file = file
        self.class_names = class_names

    def write(self, prediction: Prediction) -> None:
        record = {"path": prediction.path}
        if prediction.problem is not None:
            record["problem"] = prediction.problem
        else:
            topk = [
                {"label": label, "class": self.class_names[label], "score": score}
                for label, score in zip(prediction.labels, prediction.scores)
            ]
            record |= {f"pred_{key}": value for key, value in topk[0].items()} | {"topk": topk}
        self.file.write(json.dumps(record) + "\n")


class Csv:
    """A row a file: path, label_1, class_1, score_1, and so on to the k-th; and problem."""

    def __init__(self, file, class_names: Sequence[str], topk: int):
        self.rows = csv.writer(file, lineterminator="\n")
        self.class_names = class_names
        self.topk = topk
        columns = [
            f"{what}_{i}" for i in range(1, topk + 1) for what in ("label", "class", "score")
        ]
        self.rows.writerow(["path", *columns, "problem"])

    def write(self, prediction: Prediction) -> None:
        values = [""] * (3 * self.topk)
        if prediction.problem is None:
            values = [
                value
                for label, score in zip(prediction.labels, prediction.scores)
                for value in (label, self.class_names[label], score)
            ]
        self.rows.writerow([prediction.path, *values, prediction.problem or ""])


def check_results_file(path: str) -> None:
    """Raise InputError if `path` cannot become a file of results."""
    if os.path.splitext(path)[1].lower() not in SUFFIXES:
        raise InputError(
            f"{path}: ends in neither of {' and '.join(SUFFIXES)}, which set the format"
        )
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name a file")
    if not os.path.isdir(folder):
        raise InputError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: the folder {folder} cannot be written to")


@contextlib.contextmanager
def results_file(path: str, class_names: Sequence[str], topk: int) -> Iterator[Results]:
    """Results as they come, in a file that gets the name `path` when the block is left.

    If an exception leaves the block, `path` stays as it was, and what was written until then is in
    `path`.unfinished; not so if nothing was, or if the exception is an InputError.

    Raises:
        InputError: as `check_results_file`.
    """
    check_results_file(path)
    unfinished = f"{path}.unfinished"
    # Names of files are bytes: those that are no UTF-8 are written as the bytes that they are.
    with open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        is_csv = path.lower().endswith(".csv")
        results = Csv(file, class_names, topk) if is_csv else JsonLines(file, class_names)
        start = file.tell()
        try:
            yield results
        except BaseException as error:
            if file.tell() == start or isinstance(error, InputError):
                os.unlink(unfinished)
            raise
    os.replace(unfinished, path)
