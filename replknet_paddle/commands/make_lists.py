"""Write the list files of a data set from its folders.

Classes are the folders of the training part, numbered in sorted order, as the published weights
have ImageNet's synsets.
"""

import argparse
import sys

from replknet_paddle.runtime.errors import InputError
from replknet_paddle.data.list_files import make_lists


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet make-lists",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet make-lists /dataset/imagenet "
        "-devkit /dataset/ILSVRC2012_devkit_t12",
    )
    parser.add_argument("data_path", metavar="DIR", help="folder of the data set")
    parser.add_argument(
        "-train",
        "--train",
        default="train",
        metavar="NAME",
        help="folder in DIR with a folder for each class; default train",
    )
    parser.add_argument(
        "-val",
        "--val",
        default="val",
        metavar="NAME",
        help="likewise, or the validation images that -devkit labels; default val",
    )
    parser.add_argument(
        "-devkit",
        "--devkit",
        metavar="DIR",
        help="ImageNet's development kit, with the validation ground truth",
    )
    parser.add_argument(
        "-overwrite", "--overwrite", action="store_true", help="replace lists that are there"
    )
    args = parser.parse_args(argv)
    try:
        written = make_lists(
            args.data_path,
            train=args.train,
            val=args.val,
            devkit=args.devkit,
            overwrite=args.overwrite,
        )
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, count in written.items():
        print(f"{name}: {count} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
