"""The grammar of list files, and where the images they name lie.

    DATA_PATH/train_list.txt    one image a line: path relative to DATA_PATH, white space, label
    DATA_PATH/val_list.txt

The label is what follows the last white space, so paths may hold spaces.
"""

import functools
import os
import stat
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from replknet_paddle.data.storage import describe
from replknet_paddle.runtime.errors import InputError, SampleError
from replknet_paddle.runtime.files import searched

LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the "
    "path of an image below that folder, a space and the number of its class, e.g. "
    '"train/n01440764/n01440764_10026.JPEG 0"; replknet make-lists writes them'
)
LIST_FILES = {True: "train_list.txt", False: "val_list.txt"}


def check_list(list_file: str, root: str, layout: str = LAYOUT) -> None:
    """Check that there are such a data folder and list.

    Args:
        layout: what to give instead.

    Raises:
        FileNotFoundError, InputError: there are not, or the list may not be read.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"no data folder {searched(root)}; {layout}")
    if not os.path.isfile(list_file):
        raise FileNotFoundError(f"no list file {list_file}; {layout}")
    if not os.access(list_file, os.R_OK):
        raise InputError(f"no permission to read {list_file}")


def unreadable(list_file: str, line: int, path: str, error: Exception) -> SampleError:
    """What to raise for a file of a list that cannot be read.

    Args:
        line: that has the path, counted from 1.
        path: with what it is, e.g. `image a.jpg`.
    """
    return SampleError(
        f"{list_file}, line {line}: cannot read {printable(path)}: {printable(describe(error))}"
    )


class Line(NamedTuple):
    """A line of a list file; blank lines are none.

    number: counted from 1, blank lines included.
    path: relative to the data folder.
    kind: of problem that the line cannot be used for: "line", "label", "outside", or None.
    problem: what it is.
    """

    number: int
    path: bytes
    label: int
    kind: str | None = None
    problem: str | None = None


def parse_list(
    list_file: str, num_classes: int | None, *, allow_outside: bool = False
) -> Iterator[Line]:
    """The lines of a list file, good and bad.

    Args:
        num_classes: labels must be below; None: they need not.
        allow_outside: accept paths that are absolute or hold `..`.
    """
    with open(list_file, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Line(number, *_parse_line(line, num_classes, allow_outside))


def shifted_folders(
    train: Iterable[tuple[bytes, int]], val: Iterable[tuple[bytes, int]]
) -> list[tuple[str, int, int]]:
    """Folders with another label in the one list than in the other: name, and the two labels.

    Folders are the same by their own name, `train/cat` and `val/cat`, and count where each list
    gives one label to all that lies in them. Somebody has numbered the classes twice.

    Args:
        train, val: paths and labels.
    """
    in_train, in_val = (_labels_of_folders(lines) for lines in (train, val))
    return sorted(
        (name, label, in_val[name])
        for name, label in in_train.items()
        if in_val.get(name, label) != label
    )


def _labels_of_folders(lines: Iterable[tuple[bytes, int]]) -> dict[str, int]:
    """The one label of each folder that has only one, by the folder's name."""
    labels: dict[bytes, set[int]] = defaultdict(set)
    for path, label in lines:
        labels[path.rpartition(b"/")[0].rpartition(b"/")[2]].add(label)
    return {
        unicodedata.normalize("NFC", os.fsdecode(name)): next(iter(found))
        for name, found in labels.items()
        if name and len(found) == 1
    }


def read_list(list_file: str, num_classes: int | None, *, allow_outside: bool = False):
    """Read a list file of which every line must be good.

    Args:
        num_classes, allow_outside: as for `parse_list`.

    Returns:
        All paths as one bytes object, the end of each path in it, the line number of each image,
        and the labels: int64 arrays (number of images,).

    Raises:
        InputError: the first lines that cannot be right, up to ten, with their numbers.
    """
    paths, ends, lines, labels, problems = [], [], [], [], []
    end = 0
    for line in parse_list(list_file, num_classes, allow_outside=allow_outside):
        if line.problem:
            problems.append(f"{list_file}, line {line.number}: {line.problem}")
            if len(problems) == 10:
                break
            continue
        paths.append(line.path)
        end += len(line.path)
        ends.append(end)
        lines.append(line.number)
        labels.append(line.label)
    if problems:
        raise InputError("\n".join(problems))
    if not paths:
        raise InputError(f"{list_file} lists no image")
    return (
        b"".join(paths),
        np.array(ends, dtype="int64"),
        np.array(lines, dtype="int64"),
        np.array(labels, dtype="int64"),
    )


def _parse_line(line: bytes, num_classes: int | None, allow_outside: bool) -> tuple:
    """Path, label and, if anything is wrong with the line, the kind of problem and what it is."""
    shown = _shortened(line.strip())
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2:
        return b"", 0, "line", f"expected a path and a label, got '{shown}'"
    path, text = parts
    # int() alone would also take 1_000, and digits of other scripts.
    digits = text.removeprefix(b"-")
    if not digits.isdigit():
        reason = f"no label after the path: '{shown}' ends with '{_shortened(text)}'"
        return path, 0, "line", reason
    label = int(digits) if len(digits) < 18 else sys.maxsize
    if digits != text:
        label = -label
    if label < 0 or (num_classes is not None and label >= num_classes):
        reason = (
            "negative"
            if num_classes is None
            else f"outside [0, {num_classes}); MODEL.NUM_CLASSES sets the number of classes"
        )
        return path, label, "label", f"label {_shortened(text)} is {reason}"
    if b"\0" in path:
        return path, label, "line", f"a path cannot hold a NUL byte: '{shown}'"
    if not allow_outside and (path.startswith(b"/") or b".." in path.split(b"/")):
        reason = (
            f"path '{shown}' must be relative and stay inside the data folder; "
            "DATA.ALLOW_OUTSIDE True allows others"
        )
        return path, label, "outside", reason
    return path, label


def _shortened(text: bytes) -> str:
    """The beginning and end of `text`, for a message."""
    text = text.decode("utf-8", "replace")
    return printable(text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}")


def resolve(root: str, path: str, *, allow_outside: bool) -> str:
    """Where the image `path` of the data folder `root` lies.

    Raises:
        OSError: there is no such file, or the file system fails.
        InputError: it leads out of the data folder, which `allow_outside` does not allow.
    """
    if allow_outside:
        return os.path.join(root, path)
    folder, name = os.path.split(path)
    full = os.path.join(_real_folder(root, folder), name)
    # Unlike os.path.islink and a realpath that is not strict, which take any error for "no link".
    if stat.S_ISLNK(os.lstat(full).st_mode):
        full = os.path.realpath(full, strict=True)
        _check_inside(full, root)
    return full


def printable(text: str) -> str:
    """`text` on one line, whatever bytes a file's name was made of."""
    return text if text.isprintable() else ascii(text)[1:-1]


@functools.lru_cache(maxsize=65536)  # ImageNet-22K has 21,841 folders
def _real_folder(root: str, folder: str) -> str:
    real = os.path.realpath(os.path.join(root, folder), strict=True)
    _check_inside(real, root)
    return real


def _check_inside(real: str, root: str) -> None:
    real_root = os.path.realpath(root, strict=True)
    if os.path.commonpath([real, real_root]) != real_root:
        raise InputError(
            f"it leads to {printable(real)}, outside the data folder; "
            "DATA.ALLOW_OUTSIDE True allows that"
        )
