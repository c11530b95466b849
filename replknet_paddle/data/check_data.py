"""Checking a dataset: its lists, its class names, and every sample, as training reads them."""

import hashlib
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice

import numpy as np

from replknet_paddle.config import override
from replknet_paddle.data.class_names import CLASS_NAMES_FILE, get_class_names
from replknet_paddle.data.dataset import ListDataset, ListedFiles, get_dataloader
from replknet_paddle.data.lists import (
    Line,
    list_files,
    parse_labelled,
    parse_list,
    parse_pair,
    resolve,
    retry_io,
    shifted_folders,
)
from replknet_paddle.data.transforms.image import read_file
from replknet_paddle.runtime.errors import InputError, SampleError
from replknet_paddle.runtime.terminal import printable

Finding = tuple[str | None, str, bytes]

KINDS = {
    "list": "lists that training or evaluation refuses",
    "names": "files of class names that training refuses",
    "line": "lines that cannot be parsed",
    "label": "labels out of range",
    "outside": "paths that lead out of the data folder",
    "missing": "missing files",
    "undecodable": "files that are damaged, not images, or not of a kind or size that is used",
    "truncated": "files that end too early",
    "duplicate": "lines whose path is in the list already",
    "overlap": "validation images that training has as well, by path or by content",
    "conflict": "files with the same bytes as one of another class",
    "empty class": "classes without a training image",
    "no validation": "classes with training images and without a validation image",
    "shifted": "folders whose label is another one in training",
}


DETECTION_LINES = 10  # whose grammar tells lists of pairs from those of labels
_datasets: list[ListedFiles] = []  # of this process, which workers share by being forked


def lists_pairs(config) -> bool:
    """Return whether the first lines of the lists in DATA.DATA_PATH are images and label images."""
    for name in list_files(config.DATA.FOLD).values():
        path, kinds = os.path.join(config.DATA.DATA_PATH, name), []
        if not os.path.isfile(path):
            continue
        for parse in (partial(parse_labelled, num_classes=None), parse_pair):
            lines = parse_list(path, partial(parse, allow_outside=True))
            kinds.append({line.kind for line in islice(lines, DETECTION_LINES)})
        return kinds == [{"line"}, {None}]
    return False


def check_data(
    config,
    get_dataset: Callable,
    *,
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda samples, total: samples,
) -> dict:
    """Read every sample of DATA.DATA_PATH by `workers` processes; return all that is wrong.

    `get_dataset(config, is_train, problems=)` is that of training. Where MODEL.NUM_CLASSES is None,
    the names of classes are counted or, for labels, the largest in train_list.txt plus one, but no
    more than it has lines. The report is ready for JSON: {"data_path", "num_classes", "lists":
    {name: {"images", and of labelled images "images_per_class"}}, "counts": {kind: problems},
    "problems": [{"kind": one of `KINDS`, "list", "line": 0 for the whole list, "path",
    "message"}]}.
    """
    root, files = config.DATA.DATA_PATH, list_files(config.DATA.FOLD)
    if not any(os.path.isfile(os.path.join(root, name)) for name in files.values()):
        raise FileNotFoundError(f"no {' or '.join(files.values())} in {root}")
    problems = []
    num_classes = config.MODEL.NUM_CLASSES
    try:
        names = get_class_names(config)
        num_classes = num_classes or (names and len(names))
    except (InputError, FileNotFoundError) as error:
        problems.append(_problem(CLASS_NAMES_FILE, "names", str(error)))
    num_classes = num_classes or _count_labels(config, get_dataset)
    config = override(config, MODEL__NUM_CLASSES=num_classes)

    datasets: dict[str, ListedFiles] = {}
    bad: dict[str, list[Line]] = {name: [] for name in files.values()}
    for is_train, name in files.items():
        try:
            datasets[name] = get_dataset(config, is_train, problems=bad[name])
            if is_train and not bad[name] and isinstance(datasets[name], ListDataset):
                get_dataloader(config, datasets[name], is_train)  # is there one global batch?
        except (InputError, FileNotFoundError) as error:
            problems.append(_problem(name, "list", str(error)))
    findings = dict(zip(datasets, _check_all(list(datasets.values()), workers, progress)))
    problems += _line_problems(datasets, bad, findings, files[True])
    problems += _class_problems(datasets, num_classes, *files.values())
    kinds = Counter(problem["kind"] for problem in problems)
    lists: dict[str, dict] = {name: {"images": len(data)} for name, data in datasets.items()}
    for name, data in datasets.items():
        if isinstance(data, ListDataset):
            counts = np.bincount(data.labels, minlength=num_classes)
            lists[name]["images_per_class"] = counts.tolist()
    return {
        "data_path": root,
        "num_classes": num_classes,
        "lists": lists,
        "counts": {kind: kinds[kind] for kind in KINDS},
        "problems": problems,
    }


def _count_labels(config, get_dataset: Callable) -> int:
    """Return the number of classes that the labels of the training list, or else the validation
    list, stand for."""
    is_train = os.path.isfile(
        os.path.join(config.DATA.DATA_PATH, list_files(config.DATA.FOLD)[True])
    )
    dataset = get_dataset(config, is_train, problems=[])
    if not isinstance(dataset, ListDataset):
        raise InputError(
            "label images do not say how many classes there are; give -num_classes or -cfg, or "
            f"their names in {CLASS_NAMES_FILE}"
        )
    # One slip of a key must not make millions of classes: each has an image at least.
    return min(1 + int(dataset.labels.max(initial=0)), max(1, len(dataset)))


def _check_all(
    datasets: list[ListedFiles], workers: int, progress: Callable
) -> list[list[Finding]]:
    """Return what `check_sample` finds of all samples, a list for each dataset."""
    _datasets[:] = datasets
    total = sum(map(len, datasets))
    samples = ((place, i) for place, dataset in enumerate(datasets) for i in range(len(dataset)))
    if workers == 1 or not hasattr(os, "fork"):
        findings = list(progress(map(_check, samples), total))
    else:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context) as pool:
            chunk = 16 + total // 10_000
            findings = list(progress(pool.map(_check, samples, chunksize=chunk), total))
    places = np.cumsum([0, *map(len, datasets)])
    return [findings[start:end] for start, end in zip(places, places[1:])]


def _check(sample: tuple[int, int]) -> Finding:
    place, index = sample
    return check_sample(_datasets[place], index)


def check_sample(dataset: ListedFiles, index: int) -> Finding:
    """Read a sample as training or evaluation does.

    Return a kind of problem or None, its message, and a digest of the image's file if there is no
    problem.
    """
    path = dataset.files(index)[0]
    try:
        dataset.read_sample(0, index)
    except SampleError as error:
        reason = str(error.__cause__)
        if getattr(error.__cause__, "errno", None):
            kind = "missing"
        elif "outside the data folder" in reason:
            kind = "outside"
        # Pillow has no kind of exception for it; an empty file ends too early as well.
        elif re.search("truncated|premature|not enough", reason, re.I) or not os.path.getsize(
            os.path.join(dataset.root, path)
        ):
            kind = "truncated"
        else:
            kind = "undecodable"
        place = f"{dataset.list_file}, line {dataset.line(index).number}: "
        return kind, str(error).removeprefix(place), b""
    full = resolve(dataset.root, path, allow_outside=dataset.allow_outside)
    data = retry_io(lambda: read_file(full), path)
    return None, "", hashlib.blake2b(data, digest_size=16).digest()


def _line_problems(
    datasets: dict[str, ListedFiles],
    bad: dict[str, list[Line]],
    findings: dict[str, list[Finding]],
    train_name: str,
) -> Iterator[dict]:
    """Yield the problems of single lines, list by list."""
    in_train: dict[bytes, int] = {}  # training line of each path and each content
    first: dict[bytes, tuple[str, Line]] = {}  # list and line in which each content comes first
    for name, dataset in datasets.items():
        in_list: dict[bytes, int] = {}  # line in which each path comes first
        for line in bad[name]:
            yield _problem(name, line.kind, line.problem, line=line.number, path=line.path)
        for index, (kind, message, digest) in enumerate(findings[name]):
            line, path = dataset.line(index), dataset.files(index)[0]
            problem = partial(_problem, name, line=line.number, path=os.fsencode(path))
            path = printable(path)
            if line.path in in_list:
                yield problem("duplicate", f"{path} is also in line {in_list[line.path]}")
            in_list.setdefault(line.path, line.number)
            if kind:
                yield problem(kind, message)
            content = digest or line.path
            other, before = first.setdefault(content, (name, line))
            if digest and before.label != line.label:
                message = (
                    f"{path} has class {line.label}; the same bytes have class {before.label} in "
                    f"line {before.number} of {other}"
                )
                yield problem("conflict", message)
            if name == train_name:
                in_train.setdefault(line.path, line.number)
                in_train.setdefault(content, line.number)
            elif number := in_train.get(line.path) or in_train.get(content):
                message = f"{path} is also in line {number} of {train_name}"
                yield problem("overlap", message)


def _class_problems(
    datasets: dict[str, ListedFiles], num_classes: int, train_name: str, val_name: str
) -> Iterator[dict]:
    """Yield the problems of whole classes."""
    train, val = map(datasets.get, (train_name, val_name))
    in_train = set(range(num_classes))
    if train is not None:
        absent = train.absent_classes(num_classes)
        in_train.difference_update(absent)
        for label in absent:
            yield _problem(train_name, "empty class", f"class {label} has no training image")
    if train is None or val is None:
        return
    for label in sorted(in_train.intersection(val.absent_classes(num_classes))):
        message = f"class {label} has training images and no validation image"
        yield _problem(val_name, "no validation", message)
    if not isinstance(train, ListDataset):
        return
    labels = (dataset.paths_and_labels() for dataset in (train, val))
    for folder, train_label, val_label in shifted_folders(*labels):
        message = (
            f"the folder {printable(folder)} has label {val_label}, and {train_label} in "
            f"{train_name}"
        )
        yield _problem(val_name, "shifted", message, path=os.fsencode(folder))


def _problem(name: str, kind: str, message: str, *, line: int = 0, path: bytes = b"") -> dict:
    shown = path.decode("utf-8", "backslashreplace")
    return {"kind": kind, "list": name, "line": line, "path": shown, "message": message}
