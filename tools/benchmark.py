"""Measure, on this machine: medians with spread, both sides of a comparison in one run."""

import argparse
import sys

import paddle

from analysis.timing import describe_machine, median_ratio, summarize
from config import get_config, update_config
from deploy.backends import PACKAGES, installed_backends, load_network
from deploy.inference_benchmark import (
    draw_chart,
    machine,
    random_images,
    set_statistics,
    table,
    time_backends,
    write_json,
)
from engine.loop_benchmark import time_train_loop
from errors import InputError
from replknet import build_replknet
from zoo.run_folder import run_config_file


def train_loop(args) -> None:
    """Print what the training loop adds to forward, backward and optimizer step."""
    config = update_config(get_config(args.cfg), args)
    if min(args.steps, args.rounds) < 1:
        raise InputError(f"--steps {args.steps} --rounds {args.rounds}; allowed: integers >= 1")
    seconds = time_train_loop(config, steps=args.steps, rounds=args.rounds)
    print(describe_machine())
    print(f"{config.MODEL.NAME}, batch {config.DATA.BATCH_SIZE}, {args.steps} steps a run")
    for name, values in seconds.items():
        print(f"{name}: {summarize(values)} per step")
    ratio = median_ratio(seconds["loop"], seconds["bare"])
    print(f"the loop takes {ratio:.4f} of the bare step's time")


def inference(args) -> None:
    """Print how fast each installed backend runs a network, in each precision and batch size."""
    if args.cfg is None and args.pretrained is None:
        raise InputError(
            "nothing to measure; name a network by -cfg or a checkpoint by -pretrained"
        )
    config = update_config(get_config(args.cfg or run_config_file(args.pretrained)), args)
    if config.MODEL.OUT_INDICES is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone without a "
            "head; allowed: None"
        )
    if min(args.rounds, *args.batch_sizes) < 1 or (args.threads is not None and args.threads < 1):
        raise InputError("--rounds, --batch_sizes, --threads; allowed: integers >= 1")
    unknown = sorted(set(args.backends) - set(PACKAGES))
    if unknown:
        raise InputError(f"--backends {' '.join(unknown)}; allowed: {' '.join(PACKAGES)}")
    size = config.DATA.IMAGE_SIZE
    if args.pretrained:
        model, _ = load_network(args.pretrained, config)
    else:
        paddle.seed(config.SEED)
        model = build_replknet(config)
        set_statistics(model, random_images(max(4, 2 * (256 // size) ** 2), size))
    print(machine())
    weights = args.pretrained or "random weights"
    title = f"{config.MODEL.NAME}, {size} x {size} pixels, {weights}"
    print(f"{title}, {args.threads or 'all'} threads")
    rows = time_backends(
        model,
        config,
        backends=args.backends,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        rounds=args.rounds,
        report=print,
    )
    print(table(rows))
    if args.json:
        write_json(args.json, rows, machine=machine(), network=title, threads=args.threads)
    if args.chart:
        draw_chart(args.chart, rows, f"{title}\n{machine()}")


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
    infer = what.add_parser(
        "inference",
        help="latency and throughput of every installed backend",
        epilog="example: python -m tools.benchmark inference -cfg configs/replknet_31b.yaml "
        "--threads 2 --json inference.json --chart inference.png",
    )
    infer.add_argument("-cfg", "--cfg", metavar="FILE", help="YAML file of the network")
    infer.add_argument(
        "-pretrained", "--pretrained", metavar="FILE", help="weights; default random ones"
    )
    infer.add_argument(
        "--backends", nargs="+", metavar="NAME", default=installed_backends(), help="(%(default)s)"
    )
    infer.add_argument(
        "--batch_sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="(%(default)s)"
    )
    infer.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    infer.add_argument("--rounds", type=int, default=9, metavar="N", help="(%(default)s)")
    infer.add_argument("--json", metavar="FILE", help="write the figures there")
    infer.add_argument("--chart", metavar="FILE", help="draw them there, e.g. inference.png")
    infer.add_argument("-opts", "--opts", nargs="+", metavar="KEY VALUE", help="other keys")
    infer.set_defaults(run=inference)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
