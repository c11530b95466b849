"""Draw the loss and accuracy curves of one or several training runs."""

EXAMPLES = "example: replknet plot output/a output/b --out curves.png"


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out", default="metrics.png", metavar="FILE", help="picture to write (%(default)s)"
    )


def run(args) -> int:
    from replknet_paddle.analysis.plots import plot_metrics

    plot_metrics(args.runs, args.out)
    print(f"wrote {args.out}")
    return 0
