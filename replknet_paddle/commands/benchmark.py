"""`replknet benchmark`."""

from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.runtime.errors import InputError

NANO, BASE = "configs/replknet_nano.yaml", "configs/replknet_31b.yaml"


def add_benchmark_flags(parser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    loop = what.add_parser(
        "train_loop",
        help="cost of the training loop over a bare forward-backward-step",
        epilog="example: replknet benchmark train_loop -cfg configs/replknet_nano.yaml",
    )
    add_config_flags(loop, default=NANO)
    loop.add_argument("--steps", type=int, default=10, help="of one run (%(default)s)")
    loop.add_argument("--rounds", type=int, default=9, help="runs of each side (%(default)s)")

    data = what.add_parser(
        "data",
        help="throughput of the input pipeline beside plain JPEG decoding",
        epilog="example: replknet benchmark data --workers 2 photos/*.jpg",
    )
    add_config_flags(data, default=BASE)
    data.add_argument(
        "photographs", nargs="+", metavar="PHOTO", help="pictures of about 500x375 pixels"
    )
    data.add_argument("--rounds", type=int, default=50, help="of 20 images (%(default)s)")
    data.add_argument(
        "--workers",
        type=int,
        default=0,
        help="also compare a dataloader of N workers with one of one; needs N free cores",
        metavar="N",
    )
    data.add_argument("--epochs", type=int, default=9, help="of each dataloader (%(default)s)")

    inference = what.add_parser(
        "inference",
        help="latency and throughput of every installed backend",
        epilog="example: replknet benchmark inference -cfg configs/replknet_31b.yaml "
        "--threads 2 --json inference.json",
    )
    add_config_flags(inference)
    add_flag(inference, "pretrained", "weights; default random ones", metavar="FILE")
    inference.add_argument(
        "--backends", nargs="+", metavar="NAME", help="default: all that are installed"
    )
    inference.add_argument(
        "--precisions",
        nargs="+",
        default=["fp32", "fp16", "bf16", "int8"],
        metavar="NAME",
        help="(%(default)s)",
    )
    inference.add_argument(
        "--batch_sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="(%(default)s)"
    )
    inference.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    inference.add_argument("--rounds", type=int, default=9, metavar="N", help="(%(default)s)")
    inference.add_argument("--json", metavar="FILE", help="write the figures to FILE")

    conv = what.add_parser(
        "conv",
        help="depthwise convolutions, by pass and implementation, beside Paddle's",
        epilog="example: replknet benchmark conv --shapes stages --batch 64 --dtype bfloat16",
    )
    conv.add_argument(
        "--shapes",
        choices=("stages", "grid", "all"),
        default="all",
        help="the stages of RepLKNet-31B at 224, the grid of the paper's Table 5, or both",
    )
    conv.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    conv.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the tensors; half precision on GPU only (%(default)s)",
    )
    conv.add_argument("--rounds", type=int, default=5, help="of each (%(default)s)")

    network = what.add_parser(
        "network",
        help="a network on CPU with and without the compiled operators, and where its time goes",
        epilog="example: replknet benchmark network -cfg configs/replknet_31b.yaml",
    )
    add_config_flags(network, default=BASE)
    network.add_argument("--rounds", type=int, default=5, help="of each (%(default)s)")
    network.add_argument("--forward_batch", type=int, default=1, help="images (%(default)s)")
    network.add_argument("--step_batch", type=int, default=4, help="images (%(default)s)")


def run_benchmark(args) -> int:
    """Measure speed on this machine.

    Medians with their spread, both sides of a comparison in one run.
    """
    {
        "train_loop": train_loop,
        "data": data,
        "inference": inference,
        "conv": conv,
        "network": network,
    }[args.what](args)
    return 0


def train_loop(args) -> None:
    from replknet_paddle.bench.network import report_train_loop

    report_train_loop(config_from(args), steps=args.steps, rounds=args.rounds)


def data(args) -> None:
    from replknet_paddle.bench.data import report_data

    report_data(
        config_from(args),
        args.photographs,
        rounds=args.rounds,
        workers=args.workers,
        epochs=args.epochs,
    )


def inference(args) -> None:
    if args.cfg is None and args.pretrained is None:
        raise InputError(
            "nothing to measure; name a network by -cfg or a checkpoint by -pretrained"
        )
    config = config_from(args, args.pretrained)

    from replknet_paddle.bench.inference import Plan, report_inference

    plan = Plan(
        backends=args.backends,
        precisions=args.precisions,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        rounds=args.rounds,
    )
    report_inference(config, args.pretrained, plan, json_file=args.json)


def conv(args) -> None:
    from replknet_paddle.bench.conv import report_conv

    report_conv(shapes=args.shapes, batch=args.batch, rounds=args.rounds, dtype=args.dtype)


def network(args) -> None:
    from replknet_paddle.bench.network import report_network

    report_network(
        config_from(args),
        forward_batch=args.forward_batch,
        step_batch=args.step_batch,
        rounds=args.rounds,
    )
