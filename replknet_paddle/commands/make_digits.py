"""Write scikit-learn's handwritten digits as a data set in ImageNet's list-file layout.

1,797 grey scans of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0), which
scikit-learn carries, so nothing is downloaded. Every fifth goes to validation: 1,437 / 360.
"""

import argparse
import os
import sys

import numpy as np
from PIL import Image


def make_digits(folder: str) -> None:
    """Write train/, val/, train_list.txt and val_list.txt below `folder`.

    The lists are written last: a folder that has both is complete.
    """
    from sklearn.datasets import load_digits  # of the demo alone, not of requirements.txt

    digits = load_digits()
    lists = {"train": [], "val": []}
    for i, (scan, label) in enumerate(zip(digits.images, digits.target)):
        split = "val" if i % 5 == 0 else "train"
        path = os.path.join(split, str(label), f"{i:04d}.png")
        os.makedirs(os.path.join(folder, split, str(label)), exist_ok=True)
        grey = np.round(scan * (255 / 16)).astype("uint8")  # scans count 0 to 16
        Image.fromarray(grey).save(os.path.join(folder, path))
        lists[split].append(f"{path} {label}\n")
    for split, lines in lists.items():
        with open(os.path.join(folder, f"{split}_list.txt"), "w", encoding="utf-8") as file:
            file.writelines(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet make-digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet make-digits data/digits",
    )
    parser.add_argument("folder", help="where to write")
    args = parser.parse_args(argv)
    try:
        make_digits(args.folder)
    except ImportError as error:
        print(f"error: {error}; pip install -r requirements/demo.txt", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
