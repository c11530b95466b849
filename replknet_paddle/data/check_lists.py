"""Checking a dataset: every line of its lists, and every image that they name."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

from replknet_paddle.data.lists import LIST_FILES, Line, parse_list, resolve, shifted_folders
from replknet_paddle.data.storage import describe, read_patiently
from replknet_paddle.data.transforms.image import load, open_image, read_file, to_rgb
from replknet_paddle.runtime.errors import InputError


class Problem(NamedTuple):
    """Something wrong in a data set.

    kind: one of `KINDS`.
    list, line, path: where; a line of 0 stands for the whole list.
    """

    kind: str
    list: str
    line: int
    path: str
    message: str


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


class Finding(NamedTuple):
    """What reading one image found: a kind of problem and its message, or a digest of the file."""

    kind: str | None
    message: str
    digest: bytes


def check_data(
    root: str,
    *,
    num_classes: int | None = None,
    allow_outside: bool = False,
    workers: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda images, total: images,
) -> dict:
    """Read every image of a data set, and report all that is wrong.

    Args:
        root: folder of the lists that are there, train_list.txt, val_list.txt or both.
        num_classes: labels must be below; None: the largest label of train_list.txt, plus one, but
            no more than it has lines.
        allow_outside: as DATA.ALLOW_OUTSIDE.
        workers: processes that decode.
        progress: (findings, how many) -> the same findings, showing how far it is.

    Returns:
        {"data_path", "num_classes", "lists": {name: {"images", "images_per_class"}},
        "counts": {kind: problems}, "problems": [fields of `Problem`]}, ready for JSON.

    Raises:
        FileNotFoundError: no such folder, or no list in it.
        SystemFault: the system fails, time and again, so that nothing can be said of the data.
    """
    names = [name for name in LIST_FILES.values() if os.path.isfile(os.path.join(root, name))]
    if not names:
        raise FileNotFoundError(f"no {' or '.join(LIST_FILES.values())} in {root}")
    lines = {
        name: list(parse_list(os.path.join(root, name), None, allow_outside=allow_outside))
        for name in names
    }
    if num_classes is None:
        labels = [line.label for line in lines[names[0]] if line.problem is None]
        # One slip of a key must not make millions of classes: each has an image at least.
        num_classes = min(1 + max(labels, default=0), max(1, len(labels)))
    problems = []
    for name in names:
        problems += _line_problems(name, lines[name], num_classes)

    paths = sorted({line.path for part in lines.values() for line in part if not line.problem})
    check = partial(check_image, root, allow_outside=allow_outside)
    with ProcessPoolExecutor(max_workers=workers) as pool:
        findings = pool.map(check, map(os.fsdecode, paths), chunksize=16)
        found = dict(zip(paths, progress(findings, len(paths))))
    for name in names:
        for line in lines[name]:
            if not line.problem and found[line.path].kind:
                problems.append(
                    _problem(found[line.path].kind, name, line, found[line.path].message)
                )
    problems += _conflicts(lines, found)
    if len(names) == 2:
        problems += _overlap(lines, found)
        train, val = (_per_class(lines[name], num_classes) for name in names)
        for label in range(num_classes):
            if train[label] and not val[label]:
                message = f"class {label} has no image, and {train[label]} in training"
                problems.append(Problem("no validation", names[1], 0, "", message))
        labels = ([(n.path, n.label) for n in lines[name] if not n.problem] for name in names)
        for folder, in_train, in_val in shifted_folders(*labels):
            message = f"label {in_val}, and {in_train} in {names[0]}"
            problems.append(Problem("shifted", names[1], 0, folder, message))
    counts = Counter(problem.kind for problem in problems)
    return {
        "data_path": root,
        "num_classes": num_classes,
        "lists": {
            name: {
                "images": len(lines[name]),
                "images_per_class": _per_class(lines[name], num_classes),
            }
            for name in names
        },
        "counts": {kind: counts[kind] for kind in KINDS},
        "problems": [problem._asdict() for problem in problems],
    }


def check_image(root: str, path: str, *, allow_outside: bool = False) -> Finding:
    """Read one image as training does, and decode all of it.

    Raises:
        SystemFault: the system fails, time and again.
    """
    try:
        full = read_patiently(lambda: resolve(root, path, allow_outside=allow_outside), path)
    except InputError as error:
        return Finding("outside", str(error), b"")
    except OSError as error:
        return Finding("missing", describe(error), b"")
    try:
        data = read_patiently(lambda: read_file(full), path)
    except InputError as error:
        return Finding("undecodable", str(error), b"")
    except OSError as error:
        return Finding("missing", describe(error), b"")
    try:
        with open_image(data) as image:
            load(image)
            to_rgb(image)
    except (OSError, InputError) as error:
        # Pillow has no kind of exception for it; an empty file ends too early as well.
        truncated = not data or re.search("truncated|premature|not enough", str(error), re.I)
        return Finding("truncated" if truncated else "undecodable", str(error), b"")
    return Finding(None, "", hashlib.blake2b(data, digest_size=16).digest())


def _problem(kind: str, name: str, line: Line, message: str) -> Problem:
    path = line.path.decode("utf-8", "backslashreplace")
    return Problem(kind, name, line.number, path, message)


def _line_problems(name: str, lines: list[Line], num_classes: int) -> Iterator[Problem]:
    first = {}
    for line in lines:
        if line.problem:
            yield _problem(line.kind, name, line, line.problem)
            continue
        if line.label >= num_classes:
            yield _problem("label", name, line, f"{line.label} is outside [0, {num_classes})")
        if line.path in first:
            yield _problem("duplicate", name, line, f"also in line {first[line.path]}")
        first.setdefault(line.path, line.number)
    if name == LIST_FILES[True]:
        for label, count in enumerate(_per_class(lines, num_classes)):
            if not count:
                yield Problem("empty class", name, 0, "", f"class {label} has no image")


def _overlap(lines: dict[str, list[Line]], found: dict[bytes, Finding]) -> Iterator[Problem]:
    train = {}
    for line in lines[LIST_FILES[True]]:
        if not line.problem:
            train.setdefault(line.path, line.number)
            train.setdefault(found[line.path].digest or line.path, line.number)
    for line in lines[LIST_FILES[False]]:
        if not line.problem:
            number = train.get(line.path) or train.get(found[line.path].digest or line.path)
            if number:
                yield _problem(
                    "overlap",
                    LIST_FILES[False],
                    line,
                    f"also in line {number} of {LIST_FILES[True]}",
                )


def _conflicts(lines: dict[str, list[Line]], found: dict[bytes, Finding]) -> Iterator[Problem]:
    """Files whose bytes have occurred with another label before."""
    first: dict[bytes, tuple[str, Line]] = {}
    for name, part in lines.items():
        for line in part:
            digest = b"" if line.problem else found[line.path].digest
            if not digest:
                continue
            other, before = first.setdefault(digest, (name, line))
            if before.label != line.label:
                yield _problem(
                    "conflict",
                    name,
                    line,
                    f"class {line.label}; the same bytes have class {before.label} in line "
                    f"{before.number} of {other}",
                )


def _per_class(lines: list[Line], num_classes: int) -> list[int]:
    counts = defaultdict(int)
    for line in lines:
        if not line.problem:
            counts[line.label] += 1
    return [counts[label] for label in range(num_classes)]
