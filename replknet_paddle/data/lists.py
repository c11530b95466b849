"""List files: the grammars of their lines, where the files lie that they name, and reading them.

    DATA_PATH/train_list.txt    one image a line
    DATA_PATH/val_list.txt

    train/cat/a photo.jpg 3                     classification: path, white space, label
    images/1.jpg annotations/1.png              segmentation: two paths, white space between
    images/a photo.jpg<TAB>annotations/1.png    or a tab, where they hold spaces

Paths are relative to DATA_PATH. A label is what follows the last white space of its line.
"""

import codecs
import errno
import functools
import os
import re
import stat
import sys
import time
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from replknet_paddle.runtime.errors import InputError, SystemFault
from replknet_paddle.runtime.terminal import printable


def list_files(fold: int | None = None) -> dict[bool, str]:
    """Return the names of the lists, {whether to train on it: name}, of a fold or of no folds."""
    end = "" if fold is None else f"_{fold}"
    return {True: f"train_list{end}.txt", False: f"val_list{end}.txt"}


LIST_FILES = list_files()
LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the "
    "path of an image below that folder, a space and the number of its class, e.g. "
    '"train/n01440764/n01440764_10026.JPEG 0"; replknet make-lists writes them'
)
PAIRS_LAYOUT = (
    "-data_path takes a folder with train_list.txt and val_list.txt, whose lines are the path of "
    "an image below that folder, a space and the path of its label image, e.g. "
    '"images/1.jpg annotations/1.png"; docs/segmentation.md says how to write them'
)
MAX_LISTED_PROBLEMS = 10
BLOCK_BYTES = 2**18  # of a list at a time; all that is made of them fits into a core's cache

UTF8_MARK = b"\xef\xbb\xbf"
MAX_SCANNED_DIGITS = 9
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r\v\f"))  # as bytes.strip and bytes.split have it

IGNORED = 255  # number in label images of pixels that neither the loss nor the metrics count

# Seconds between the attempts to read; after the last one the system has failed for good.
PAUSES_SECONDS = (1, 30)

# What a file system says of a path at which there is no file. Every other error number (EIO,
# ESTALE, EMFILE, ENFILE, ENOMEM, ETIMEDOUT, EACCES...) says nothing about the file's content, and
# Pillow's own OSErrors, about damaged content, have no error number.
_NO_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EILSEQ),
}

Result = TypeVar("Result")


def retry_io(read: Callable[[], Result], what: str, failures: list[str] | None = None) -> Result:
    """Return what `read()` returns, repeated after `PAUSES_SECONDS` while the system fails.

    The last failure is a SystemFault; the messages of those before are added to `failures`.
    Whatever else `read` raises is raised at once.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in {None, *_NO_FILE}:
                raise
            if pause is None:
                raise SystemFault(
                    f"cannot read {what}: {describe(error)}, in {len(PAUSES_SECONDS) + 1} attempts "
                    f"over {sum(PAUSES_SECONDS):g} s. This is a failure of the system, not of the "
                    "data: check the disk, the network share, the memory and the file limit"
                ) from error
            if failures is not None:
                failures.append(f"cannot read {what}: {describe(error)}")
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def describe(error: BaseException) -> str:
    """Return an exception's message without the path, which other parts of a message name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def get_list_path(config, is_train: bool) -> str:
    """Return the path of the training or the validation list that `config` names; FileNotFoundError
    where there is none of DATA.FOLD."""
    fold = config.DATA.FOLD
    path = os.path.join(config.DATA.DATA_PATH, list_files(fold)[is_train])
    if fold is not None and not os.path.isfile(path):
        raise FileNotFoundError(
            f"no list file {path} for DATA.FOLD {fold}; replknet make-lists -folds writes it, and "
            "-opts DATA.FOLD None reads train_list.txt and val_list.txt"
        )
    return path


class Line(NamedTuple):
    """A line of a list file; blank lines are none."""

    number: int  # counted from 1, blank lines included; 0 where only one line is parsed
    path: bytes  # relative to the data folder; of a pair, both with a tab between them
    label: int = 0  # 0 for a pair
    kind: str | None = None  # "line", "label" or "outside", of a line that cannot be used
    problem: str | None = None  # why it cannot be used


def parse_labelled(line: bytes, num_classes: int | None, *, allow_outside: bool) -> Line:
    """Return the path and label of a line `path label`, or its problem.

    Labels must be below `num_classes`, unless it is None.
    """
    shown = _shortened(line)
    path, *rest = line.strip().rsplit(None, 1)
    if not rest:
        return Line(0, b"", 0, "line", f"expected a path and a label, got '{shown}'")
    [text] = rest
    if not re.fullmatch(rb"-?[0-9]+", text):  # int() alone would also take 1_000
        reason = f"no label after the path: '{shown}' ends with '{_shortened(text)}'"
        return Line(0, path, 0, "line", reason)
    label = min(int(text[:4000]), sys.maxsize)  # int() takes at most 4,300 digits
    if label < 0 or (num_classes is not None and label >= num_classes):
        reason = (
            "negative"
            if num_classes is None
            else f"outside [0, {num_classes}); MODEL.NUM_CLASSES sets the number of classes"
        )
        return Line(0, path, label, "label", f"label {_shortened(text)} is {reason}")
    if b"\0" in path:
        return Line(0, path, label, "line", f"a path cannot hold a NUL byte: '{shown}'")
    if not allow_outside and _leads_outside(path):
        reason = (
            f"path '{shown}' must be relative and stay inside the data folder; "
            "DATA.ALLOW_OUTSIDE True allows others"
        )
        return Line(0, path, label, "outside", reason)
    return Line(0, path, label)


def parse_pair(line: bytes, *, allow_outside: bool) -> Line:
    """Return the two paths of a line `image labels`, or its problem."""
    paths = [path.strip() for path in line.split(b"\t" if b"\t" in line else None)]
    kind, problem = "line", None
    if len(paths) != 2 or not all(paths):
        problem = (
            "expected the paths of an image and of its labels, with a tab between them where they "
            "hold spaces"
        )
    elif b"\0" in line:
        problem = "a path cannot hold a NUL byte"
    elif not allow_outside and any(map(_leads_outside, paths)):
        kind = "outside"
        problem = (
            "paths must be relative and stay inside the data folder (DATA.ALLOW_OUTSIDE True "
            "allows others)"
        )
    if problem:
        return Line(0, line, 0, kind, f"{problem}, got '{_shortened(line)}'")
    return Line(0, b"\t".join(paths))


def _leads_outside(path: bytes) -> bool:
    return path.startswith(b"/") or b".." in path.split(b"/")


def _shortened(text: bytes) -> str:
    """Return the beginning and end of a line or a part of it, for a message."""
    text = text.strip().decode("utf-8", "replace")
    return printable(text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}")


def parse_list(list_file: str, parse: Callable[[bytes], Line]) -> Iterator[Line]:
    """Yield the lines of a list file, good and bad, by the grammar `parse`."""
    for first, block in _blocks(list_file):
        yield from _parse_block(first, block, parse)


def _parse_block(first: int, block: bytes, parse: Callable[[bytes], Line]) -> Iterator[Line]:
    for number, line in enumerate(block.split(b"\n"), first):
        if line.strip():
            yield parse(line)._replace(number=number)


def _blocks(list_file: str) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines of a list file, about `BLOCK_BYTES` at a time, each with its line feed, and
    the number of the first one."""
    with open(list_file, "rb") as file:
        refuse_utf16(list_file, file.peek())
        file.seek(len(UTF8_MARK) if file.peek().startswith(UTF8_MARK) else 0)
        number = 1
        while block := file.read(BLOCK_BYTES) + file.readline():
            block += b"" if block.endswith(b"\n") else b"\n"
            yield number, block
            number += block.count(b"\n")


def refuse_utf16(path: str, head: bytes) -> None:
    """Raise InputError where a text file begins as UTF-16 does: with its mark, or with NUL bytes in
    place of every second byte of ASCII."""
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or 16 * head.count(0) > len(head):
        raise InputError(f"{path} seems to be text in UTF-16; save it as UTF-8")


def scan_labelled(
    block: bytes, num_classes: int | None, *, allow_outside: bool
) -> tuple[bytes, np.ndarray, np.ndarray] | None:
    """Return what `parse_labelled` finds in a block of lines, in a tenth of its time: the paths in
    one piece, the end of each in it, and the labels.

    None where any line is not plainly good: a path, one space or tab, a label of a few digits.
    """
    if b"\0" in block or (b".." in block and not allow_outside):
        return None
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.append(0, ends[:-1] + 1)
    ends -= data[ends - 1] == ord("\r")
    path_ends, labels = ends - 1, np.zeros(len(ends), np.int64)
    for power in range(MAX_SCANNED_DIGITS):  # from the last one; the line feed before stops all
        digits = data[path_ends] - np.uint8(ord("0"))  # other characters wrap around
        is_digit = digits < 10
        labels += (digits * is_digit).astype(np.int64) * 10**power
        path_ends -= is_digit
    is_plain = (
        (path_ends < ends - 1)
        & np.isin(data[path_ends], (ord(" "), ord("\t")))
        & ~_IS_SPACE[data.take(path_ends - 1, mode="wrap")]
        & ~_IS_SPACE[data[starts]]
    )
    if not allow_outside:
        is_plain &= data[starts] != ord("/")
    if num_classes is not None:
        is_plain &= labels < num_classes
    if not is_plain.all():
        return None
    changes = np.zeros(len(data), np.int8)
    changes[starts], changes[path_ends] = 1, -1
    is_path = changes.cumsum(dtype=np.int8).view(bool)
    return data[is_path].tobytes(), np.cumsum(path_ends - starts), labels


def read_list(
    list_file: str,
    parse: Callable[[bytes], Line],
    scan: Callable[[bytes], tuple[bytes, np.ndarray, np.ndarray] | None] = lambda block: None,
    *,
    problems: list[Line] | None = None,
) -> tuple[bytearray, np.ndarray, np.ndarray, np.ndarray]:
    """Read a list file of which every line must be good; the first ten that are not are an error.

    `scan` may read a whole block of lines as `parse` reads them, or give None. Bad lines are left
    out and added to `problems` where that is given.

    Returns:
        All paths in one piece, and arrays (number of images,): the end of each path in it, the line
        number of each image, and the labels, which are int64.
    """
    # They grow in place; ImageNet-22K's 14 million lines take 0.7 GB.
    paths, numbers, labels = bytearray(), array("i"), array("q")
    ends = array("I" if os.path.getsize(list_file) < 2**32 else "q")
    bad = [] if problems is None else problems
    for first, block in _blocks(list_file):
        scanned = scan(block)
        if scanned is not None:
            found, block_ends, block_labels = scanned
            block_numbers = np.arange(first, first + len(block_labels))
        else:
            lines = list(_parse_block(first, block, parse))
            bad += [line for line in lines if line.problem]
            if len(bad) >= MAX_LISTED_PROBLEMS and problems is None:
                break
            lines = [line for line in lines if not line.problem]
            found = b"".join(line.path for line in lines)
            block_ends = np.cumsum([len(line.path) for line in lines], dtype=np.int64)
            block_labels = [line.label for line in lines]
            block_numbers = [line.number for line in lines]
        for part, values in (
            (ends, len(paths) + block_ends),
            (numbers, block_numbers),
            (labels, block_labels),
        ):
            part.frombytes(np.array(values, part.typecode).tobytes())
        paths += found
    if bad and problems is None:
        listed = [f"{list_file}, line {line.number}: {line.problem}" for line in bad]
        raise InputError("\n".join(listed[:MAX_LISTED_PROBLEMS]))
    if not ends and not bad:
        raise InputError(f"{list_file} lists no image")
    parts = (np.frombuffer(part, np.dtype(part.typecode).str) for part in (ends, numbers, labels))
    return paths, *parts


def shifted_folders(
    train: Iterable[tuple[bytes, int]], val: Iterable[tuple[bytes, int]]
) -> list[tuple[str, int, int]]:
    """Return the folders with another label in the one list than in the other: name, two labels.

    Folders are the same by their own name, `train/cat` and `val/cat`, and count where each list
    gives one label to all that lies in them. Somebody has numbered the classes twice.
    """
    in_train, in_val = (_labels_of_folders(lines) for lines in (train, val))
    return sorted(
        (name, label, in_val[name])
        for name, label in in_train.items()
        if in_val.get(name, label) != label
    )


def _labels_of_folders(lines: Iterable[tuple[bytes, int]]) -> dict[str, int]:
    """Return the one label of each folder that has only one, by the folder's name."""
    labels: dict[bytes, set[int]] = defaultdict(set)
    prefix, known = b"", None
    for path, label in lines:
        # Most lines lie in the folder of the line before.
        if label != known or not path.startswith(prefix) or b"/" in path[len(prefix) :]:
            prefix, known = path[: path.rfind(b"/") + 1], label
            labels[prefix[:-1].rpartition(b"/")[2]].add(label)
    return {
        unicodedata.normalize("NFC", os.fsdecode(name)): next(iter(found))
        for name, found in labels.items()
        if name and len(found) == 1
    }


def resolve(root: str, path: str, *, allow_outside: bool) -> str:
    """Return where the file `path` lies, which must not lead out of the data folder `root`."""
    if allow_outside:
        return os.path.join(root, path)
    folder, name = os.path.split(path)
    # By the absolute path: a notebook may go from folder to folder.
    full = os.path.join(_real_folder(os.path.abspath(root), folder), name)
    # Unlike os.path.islink and a realpath that is not strict, which take any error for "no link".
    if stat.S_ISLNK(os.lstat(full).st_mode):
        full = os.path.realpath(full, strict=True)
        _check_inside(full, root)
    return full


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
