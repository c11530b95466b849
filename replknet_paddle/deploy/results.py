"""Files of predictions: JSON lines or CSV, written line by line and named when they are whole."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from replknet_paddle.deploy.predictor import Prediction
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file, check_file_target

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


@contextlib.contextmanager
def results_file(path: str, class_names: Sequence[str], topk: int) -> Iterator[Results]:
    """Results as they come, in a file that gets the name `path` when the block is left.

    If an exception leaves the block, `path` stays as it was, and what was written until then is in
    `path`.unfinished; not so if nothing was, or if the exception is an InputError.

    Raises:
        InputError: as `check_file_target`.
    """
    check_file_target(path, SUFFIXES)
    started = 0

    def is_worth_keeping(error: BaseException) -> bool:
        return os.path.getsize(partial) > started and not isinstance(error, InputError)

    # Names of files are bytes: those that are not UTF-8 are written as the bytes that they are.
    with atomic_file(
        path, keep_partial=is_worth_keeping, errors="surrogateescape", newline=""
    ) as file:
        partial = file.name
        is_csv = path.lower().endswith(".csv")
        results = Csv(file, class_names, topk) if is_csv else JsonLines(file, class_names)
        started = file.tell()
        yield results
