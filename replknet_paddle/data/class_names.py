"""The names of the classes of a dataset."""

import os
from collections.abc import Sequence

from replknet_paddle.config import CONFIG_FOLDER
from replknet_paddle.data.lists import refuse_utf16
from replknet_paddle.runtime.errors import InputError, counted, did_you_mean
from replknet_paddle.runtime.files import searched

CLASS_NAMES_FILE = "class_names.txt"
IMAGENET_NAMES = os.path.join(CONFIG_FOLDER, "imagenet1k_class_names.txt")
KNOWN_NAMES = {
    name: os.path.join(CONFIG_FOLDER, f"{name}_class_names.txt")
    for name in ("ade20k", "cityscapes")
}

LISTED_DIFFERENCES = 10


def get_class_names(config, stored: Sequence[str] | None = None) -> list[str] | None:
    """Return the names of the classes, or None where nothing names them.

    In this order: those `stored` in the checkpoint in use; what DATA.CLASS_NAMES says;
    class_names.txt beside the lists; with DATA.IMAGENET_NAMES and 1000 classes, ImageNet-1K's.
    """
    if config.MODEL.NUM_CLASSES == 0:
        return None
    if stored is not None:
        return list(stored)
    path = names_file(config)
    if path is None and config.DATA.IMAGENET_NAMES and config.MODEL.NUM_CLASSES == 1000:
        path = IMAGENET_NAMES
    return None if path is None else read_class_names(path, config.MODEL.NUM_CLASSES)


def names_file(config) -> str | None:
    """Return the file that names the classes of the data: DATA.CLASS_NAMES, or class_names.txt
    beside the lists; None where there is none."""
    beside = os.path.join(config.DATA.DATA_PATH, CLASS_NAMES_FILE)
    if config.DATA.CLASS_NAMES is None and os.path.isfile(beside):
        return beside
    return KNOWN_NAMES.get(config.DATA.CLASS_NAMES, config.DATA.CLASS_NAMES)


def read_class_names(path: str, num_classes: int | None = None) -> list[str]:
    """Return the lines of a text file, one name each, as many as `num_classes` if that is given."""
    if not os.path.isfile(path):
        near = did_you_mean(str(path), KNOWN_NAMES)
        raise FileNotFoundError(f"no file of class names {searched(path)}{near}")
    try:
        with open(path, "rb") as file:
            data = file.read()
        refuse_utf16(path, data[: 2**13])
        # At line feeds only: str.splitlines would also end a name at U+2028 or a form feed.
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n") if data else []
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    names = [line.strip() for line in lines]
    if not all(names) or not names or num_classes not in (None, len(names)):
        each = "each class" if num_classes is None else f"each of {counted(num_classes, 'class')}"
        raise InputError(
            f"{path} has {counted(len(names), 'line')}, {names.count('')} of them empty; "
            f"allowed: one name for {each}"
        )
    return names


def class_names_text(names: Sequence[str]) -> str:
    """Return the text of class_names.txt; InputError names what cannot be read back from it."""
    for name in names:
        read_back = name.encode("utf-8", "replace").decode().strip()
        if read_back != name or not name or "\n" in name:
            raise InputError(
                f"the class name {ascii(name)} cannot stand in {CLASS_NAMES_FILE}; allowed: one "
                "line of UTF-8 text without blanks around it"
            )
    return "".join(f"{name}\n" for name in names)


def name_differences(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """Return a line for each class whose names differ, at most `LISTED_DIFFERENCES` and one."""
    lines = []
    if len(ours) != len(theirs):
        lines.append(f"{counted(len(ours), 'class')} and {len(theirs)}")
    for label in range(max(len(ours), len(theirs))):
        pair = [repr(names[label]) if label < len(names) else "none" for names in (ours, theirs)]
        if pair[0] != pair[1]:
            lines.append(f"class {label}: {pair[0]} and {pair[1]}")
    if len(lines) > LISTED_DIFFERENCES:
        more = len(lines) - LISTED_DIFFERENCES
        lines[LISTED_DIFFERENCES:] = [f"and {more} more"]
    return lines
