"""Write the list files of a dataset from its folders.

Classes are the folders of the training part, numbered in sorted order, as the published weights
have ImageNet's synsets.
"""

from replknet_paddle.commands.flags import add_flag

EXAMPLES = """\
example: replknet make-lists /dataset/imagenet -devkit /dataset/ILSVRC2012_devkit_t12
"""


def add_arguments(parser) -> None:
    parser.add_argument("data_path", metavar="DIR", help="folder of the dataset")
    add_flag(
        parser,
        "train",
        "folder in DIR with a folder for each class (%(default)s)",
        default="train",
        metavar="NAME",
    )
    add_flag(
        parser,
        "val",
        "likewise, or the validation images that -devkit labels (%(default)s)",
        default="val",
        metavar="NAME",
    )
    add_flag(
        parser,
        "devkit",
        "ImageNet's development kit, with the validation ground truth",
        metavar="DIR",
    )
    add_flag(parser, "overwrite", "replace existing lists", action="store_true")


def run(args) -> int:
    from replknet_paddle.data.make_lists import make_lists

    written = make_lists(
        args.data_path,
        train=args.train,
        val=args.val,
        devkit=args.devkit,
        overwrite=args.overwrite,
    )
    for name, count in written.items():
        print(f"{name}: {count} lines")
    return 0
