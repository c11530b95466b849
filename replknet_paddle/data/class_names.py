"""The names of the classes of a dataset."""

import os

from replknet_paddle.config import CONFIG_FOLDER
from replknet_paddle.runtime.errors import InputError

CLASS_NAMES_FILE = "class_names.txt"
IMAGENET_NAMES = os.path.join(CONFIG_FOLDER, "imagenet1k_class_names.txt")
KNOWN_NAMES = {
    name: os.path.join(CONFIG_FOLDER, f"{name}_class_names.txt")
    for name in ("ade20k", "cityscapes")
}


def get_class_names(config) -> list[str] | None:
    """The names of the classes, or None where nothing names them.

    In this order: what DATA.CLASS_NAMES says; class_names.txt beside the lists; with
    DATA.IMAGENET_NAMES and 1000 classes, ImageNet-1K's.

    Raises:
        FileNotFoundError: no file DATA.CLASS_NAMES.
        InputError: a file that does not have one name per class.
    """
    beside = os.path.join(config.DATA.DATA_PATH, CLASS_NAMES_FILE)
    path = KNOWN_NAMES.get(config.DATA.CLASS_NAMES, config.DATA.CLASS_NAMES)
    if path is None and os.path.isfile(beside):
        path = beside
    if path is None and config.DATA.IMAGENET_NAMES and config.MODEL.NUM_CLASSES == 1000:
        path = IMAGENET_NAMES
    return None if path is None else read_class_names(path, config.MODEL.NUM_CLASSES)


def read_class_names(path: str, num_classes: int) -> list[str]:
    """The lines of a text file, one name each."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file of class names {path}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
    if len(names) != num_classes or not all(names):
        raise InputError(
            f"{path} has {len(names)} lines, {names.count('')} of them empty; "
            f"allowed: one name for each of the {num_classes} classes"
        )
    return names
