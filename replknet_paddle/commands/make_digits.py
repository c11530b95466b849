"""Write scikit-learn's handwritten digits as a dataset in ImageNet's list-file layout.

1,797 grey scans of 8x8 pixels (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0), which
scikit-learn carries, so nothing is downloaded. Every fifth goes to validation: 1,437 / 360.
"""

EXAMPLES = "example: replknet make-digits data/digits"


def add_arguments(parser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where to write")


def run(args) -> int:
    from replknet_paddle.data.make_lists import make_digits

    make_digits(args.folder)
    return 0
