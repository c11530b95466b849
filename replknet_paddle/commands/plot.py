"""Draw the loss and accuracy curves of one or several training runs to a picture."""

import argparse
import sys

from replknet_paddle.analysis.curves import plot_metrics
from replknet_paddle.runtime.errors import InputError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet plot",
        description=__doc__,
        epilog="example: replknet plot output/a output/b --out curves.png",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", default="metrics.png", metavar="FILE", help="picture to write (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        plot_metrics(args.runs, args.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
