"""Write the list files of a dataset from its folders.

Classes are folders, numbered in the sorted order of their names, as the published weights have
ImageNet's synsets. Training and validation images are in folders of their own (`-val NAME`), or one
set of class folders is split (`-val 0.1`): a tenth of each class goes to validation, chosen by
-seed, and identical files never end up on both sides.
"""

import os

from replknet_paddle.commands.flags import add_flag
from replknet_paddle.runtime.errors import InputError

EXAMPLES = """\
examples:
  replknet make-lists photos --val 0.1        photos/CLASS/...: a tenth to validation
  replknet make-lists data/flowers            data/flowers/train/CLASS/..., val/CLASS/...
  replknet make-lists /dataset/imagenet -devkit /dataset/ILSVRC2012_devkit_t12
"""


def add_arguments(parser) -> None:
    parser.add_argument("data_path", metavar="DIR", help="folder of the dataset")
    add_flag(
        parser,
        "train",
        "folder in DIR with a folder for each class (train; with a share as -val: DIR itself)",
        metavar="NAME",
    )
    add_flag(
        parser,
        "val",
        "likewise, or the validation images that -devkit labels, or the share of each class that "
        "goes to validation, such as 0.1 (%(default)s)",
        default="val",
        metavar="NAME|SHARE",
    )
    add_flag(
        parser,
        "seed",
        "with a share: of the choice (%(default)s)",
        type=int,
        default=0,
        metavar="N",
    )
    add_flag(
        parser,
        "devkit",
        "ImageNet's development kit, with the validation ground truth",
        metavar="DIR",
    )
    add_flag(parser, "overwrite", "replace existing lists", action="store_true")


def run(args) -> int:
    from replknet_paddle.data.make_lists import make_lists, split_lists

    share = read_share(args)
    if share is None:
        written = make_lists(
            args.data_path,
            train=args.train or "train",
            val=args.val,
            devkit=args.devkit,
            overwrite=args.overwrite,
        )
    else:
        written = split_lists(
            args.data_path,
            folder=args.train or ".",
            share=share,
            seed=args.seed,
            overwrite=args.overwrite,
        )
    for name, count in written.items():
        print(f"{name}: {count} lines")
    return 0


def read_share(args) -> float | None:
    """The share that -val gives; None where it names a folder."""
    try:
        share = float(args.val)
    except ValueError:
        return None
    if os.path.isdir(os.path.join(args.data_path, args.val)):
        return None
    if not 0 < share < 1:
        raise InputError(
            f"-val {args.val}; allowed: a folder in {args.data_path}, or a share between 0 and 1"
        )
    if args.devkit is not None:
        raise InputError("-devkit goes with a folder of validation images; leave -val out")
    if args.seed < 0:
        raise InputError(f"-seed {args.seed}; allowed: an integer >= 0")
    return share
