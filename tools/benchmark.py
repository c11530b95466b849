"""Measure, on this machine: medians with spread, both sides of a comparison in one run."""

import argparse
import sys

from analysis.timing import describe_machine, median_ratio, summarize
from config import get_config, update_config
from engine.loop_benchmark import time_train_loop
from errors import InputError


def train_loop(args) -> None:
    """Print what the training loop adds to forward, backward and optimizer step."""
    config = update_config(get_config(args.cfg), args)
    seconds = time_train_loop(config, steps=args.steps, rounds=args.rounds)
    print(describe_machine())
    print(f"{config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE}, {args.steps} steps a run")
    for name, values in seconds.items():
        print(f"{name}: {summarize(values)} per step")
    ratio = median_ratio(seconds["loop"], seconds["bare"])
    print(f"the loop takes {ratio:.4f} of the bare step's time")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    loop = what.add_parser(
        "train_loop",
        help="cost of the training loop over a bare forward-backward-step",
        epilog="example: python -m tools.benchmark train_loop -cfg configs/replknet_nano.yaml",
    )
    loop.add_argument("-cfg", "--cfg", default="configs/replknet_nano.yaml", metavar="FILE")
    loop.add_argument("--steps", type=int, default=10, help="of one run (%(default)s)")
    loop.add_argument("--rounds", type=int, default=9, help="runs of each side (%(default)s)")
    loop.add_argument("-opts", "--opts", nargs="+", metavar="KEY VALUE", help="other keys")
    loop.set_defaults(run=train_loop)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
