"""Checking a dataset: every line of its lists, and every image that they name."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from replknet_paddle.data.lists import (
    LIST_FILES,
    Line,
    describe,
    parse_labelled,
    parse_list,
    resolve,
    retry_io,
    shifted_folders,
)
from replknet_paddle.data.transforms.image import load, open_image, read_file, to_rgb
from replknet_paddle.runtime.errors import InputError

Finding = tuple[str | None, str, bytes]

KINDS = {
    "line": "lines that cannot be parsed",
    "label": "labels out of range",
    "outside": "paths that lead out of the data folder",
    "missing": "missing files",
    "undecodable": "files that are damaged or not images",
    "truncated": "files that end too early",
    "duplicate": "lines whose path is in the list already",
    "overlap": "validation images that training has as well, by path or by content",
    "conflict": "files with the same bytes as one of another class",
    "empty class": "classes without a training image",
    "no validation": "classes with training images and without a validation image",
    "shifted": "folders whose label is another one in training",
}


def check_data(
    root: str,
    *,
    num_classes: int | None = None,
    allow_outside: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda images, total: images,
) -> dict:
    """Read every image of the lists in `root` by `workers` processes; return all that is wrong.

    Labels must be below `num_classes`, by default the largest label of train_list.txt, plus one,
    but no more than it has lines. The report is ready for JSON: {"data_path", "num_classes",
    "lists": {name: {"images", "images_per_class"}}, "counts": {kind: problems}, "problems":
    [{"kind": one of `KINDS`, "list", "line": 0 for the whole list, "path", "message"}]}.
    """
    names = [name for name in LIST_FILES.values() if os.path.isfile(os.path.join(root, name))]
    if not names:
        raise FileNotFoundError(f"no {' or '.join(LIST_FILES.values())} in {root}")
    parse = partial(parse_labelled, num_classes=None, allow_outside=allow_outside)
    lines = {name: list(parse_list(os.path.join(root, name), parse)) for name in names}
    good = {name: [line for line in lines[name] if not line.problem] for name in names}
    if num_classes is None:
        labels = [line.label for line in good[names[0]]]
        # One slip of a key must not make millions of classes: each has an image at least.
        num_classes = min(1 + max(labels, default=0), max(1, len(labels)))
    paths = sorted({line.path for part in good.values() for line in part})
    check = partial(check_image, root, allow_outside=allow_outside)
    with ProcessPoolExecutor(max_workers=workers) as pool:
        findings = pool.map(check, map(os.fsdecode, paths), chunksize=16)
        found = dict(zip(paths, progress(findings, len(paths))))

    counts = {name: Counter(line.label for line in good[name]) for name in names}
    problems = [
        *_line_problems(lines, found, num_classes),
        *_class_problems(good, counts, num_classes),
    ]
    kinds = Counter(problem["kind"] for problem in problems)
    return {
        "data_path": root,
        "num_classes": num_classes,
        "lists": {
            name: {
                "images": len(lines[name]),
                "images_per_class": [counts[name][label] for label in range(num_classes)],
            }
            for name in names
        },
        "counts": {kind: kinds[kind] for kind in KINDS},
        "problems": problems,
    }


def check_image(root: str, path: str, *, allow_outside: bool = False) -> Finding:
    """Read one image as training does, and decode all of it.

    Return a kind of problem or None, its message, and a digest of the file if there is no problem.
    """
    bad_kind = "outside"
    try:
        full = retry_io(lambda: resolve(root, path, allow_outside=allow_outside), path)
        bad_kind = "undecodable"
        data = retry_io(lambda: read_file(full), path)
    except InputError as error:
        return bad_kind, str(error), b""
    except OSError as error:
        return "missing", describe(error), b""
    try:
        with open_image(data) as image:
            load(image)
            to_rgb(image)
    except (OSError, InputError) as error:
        # Pillow has no kind of exception for it; an empty file ends too early as well.
        truncated = not data or re.search("truncated|premature|not enough", str(error), re.I)
        return "truncated" if truncated else "undecodable", str(error), b""
    return None, "", hashlib.blake2b(data, digest_size=16).digest()


def _line_problems(
    lines: dict[str, list[Line]], found: dict[bytes, Finding], num_classes: int
) -> Iterator[dict]:
    """Yield the problems of single lines, list by list."""
    in_train: dict[bytes, int] = {}  # training line of each path and each content
    first: dict[bytes, tuple[str, Line]] = {}  # list and line in which each content comes first
    for name, part in lines.items():
        in_list: dict[bytes, int] = {}  # line in which each path comes first
        for line in part:
            path = line.path.decode("utf-8", "backslashreplace")
            problem = partial(_problem, name, line=line.number, path=path)
            if line.problem:
                yield problem(line.kind, line.problem)
                continue
            kind, message, digest = found[line.path]
            if line.label >= num_classes:
                yield problem("label", f"{line.label} is outside [0, {num_classes})")
            if line.path in in_list:
                yield problem("duplicate", f"also in line {in_list[line.path]}")
            in_list.setdefault(line.path, line.number)
            if kind:
                yield problem(kind, message)
            content = digest or line.path
            other, before = first.setdefault(content, (name, line))
            if digest and before.label != line.label:
                message = (
                    f"class {line.label}; the same bytes have class {before.label} in line "
                    f"{before.number} of {other}"
                )
                yield problem("conflict", message)
            if name == LIST_FILES[True]:
                in_train.setdefault(line.path, line.number)
                in_train.setdefault(content, line.number)
            elif number := in_train.get(line.path) or in_train.get(content):
                yield problem("overlap", f"also in line {number} of {LIST_FILES[True]}")


def _class_problems(
    good: dict[str, list[Line]], counts: dict[str, Counter], num_classes: int
) -> Iterator[dict]:
    """Yield the problems of whole classes."""
    train, val = LIST_FILES.values()
    for label in range(num_classes):
        if train in good and not counts[train][label]:
            yield _problem(train, "empty class", f"class {label} has no image")
    if len(good) < 2:
        return
    for label in range(num_classes):
        if counts[train][label] and not counts[val][label]:
            message = f"class {label} has no image, and {counts[train][label]} in training"
            yield _problem(val, "no validation", message)
    labels = ([(line.path, line.label) for line in good[name]] for name in (train, val))
    for folder, in_train, in_val in shifted_folders(*labels):
        message = f"label {in_val}, and {in_train} in {train}"
        yield _problem(val, "shifted", message, path=folder)


def _problem(name: str, kind: str, message: str, *, line: int = 0, path: str = "") -> dict:
    return {"kind": kind, "list": name, "line": line, "path": path, "message": message}
