"""Write synthetic shapes with their labels, a dataset to try segmentation on.

Images of 64 x 64 pixels with circles, squares and triangles; every fifth goes to validation.
"""

from replknet_paddle.commands.flags import add_flag

EXAMPLES = "example: replknet make-shapes data/shapes"


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where to write")
    add_flag(parser, "count", "images (%(default)s)", type=int, default=200, metavar="N")


def run(args) -> int:
    from replknet_paddle.data.make_lists import VAL_EVERY, make_shapes
    from replknet_paddle.runtime.errors import InputError

    if args.count < VAL_EVERY:
        raise InputError(f"-count is {args.count}; allowed: an integer >= {VAL_EVERY}")
    make_shapes(args.folder, count=args.count)
    return 0
