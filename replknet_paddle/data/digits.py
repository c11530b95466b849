"""scikit-learn's handwritten digits as a dataset, for the demo."""

import os

import numpy as np
from PIL import Image

from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.runtime.files import write_text
from replknet_paddle.runtime.packages import import_extra


def make_digits(folder: str) -> None:
    """Write train/, val/, train_list.txt and val_list.txt below `folder`.

    The lists are written last: a folder that has both is complete.

    Raises:
        InputError: scikit-learn is not installed.
    """
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    lists = {True: [], False: []}
    for i, (scan, label) in enumerate(zip(digits.images, digits.target)):
        is_train = i % 5 != 0
        path = os.path.join("train" if is_train else "val", str(label), f"{i:04d}.png")
        os.makedirs(os.path.join(folder, os.path.dirname(path)), exist_ok=True)
        grey = np.round(scan * (255 / 16)).astype("uint8")  # scans count 0 to 16
        Image.fromarray(grey).save(os.path.join(folder, path))
        lists[is_train].append(f"{path} {label}\n")
    for is_train, lines in lists.items():
        write_text(os.path.join(folder, LIST_FILES[is_train]), "".join(lines))
