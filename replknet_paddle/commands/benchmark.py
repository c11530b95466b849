"""`replknet benchmark`: speed on this machine, medians with their spread, both sides of a
comparison in one run."""

from replknet_paddle.commands.flags import (
    WEIGHTS_FORMS,
    add_config_flags,
    add_flag,
    add_model,
    add_output_flags,
    config_from,
)
from replknet_paddle.config import override
from replknet_paddle.runtime.files import check_file_target
from replknet_paddle.zoo import is_published

NANO, BASE = "configs/replknet_nano.yaml", "configs/replknet_31b.yaml"


def add_count(parser, name: str, default: int, what: str, **options) -> None:
    options = {"type": int, "default": default, "metavar": "N", **options}
    add_flag(parser, name, f"{what} (%(default)s)", **options)


def add_benchmark_train_loop_flags(parser) -> None:
    add_model(parser, weights=False, default=NANO)
    add_count(parser, "steps", 10, "optimizer steps of one run")
    add_count(parser, "rounds", 9, "runs of each side")


def run_benchmark_train_loop(args) -> int:
    """Measure the cost of the training loop.

    example: replknet benchmark train_loop configs/replknet_nano.yaml -steps 2 -rounds 1
    """
    from replknet_paddle.bench.network import report_train_loop

    report_train_loop(config_from(args), steps=args.steps, rounds=args.rounds)
    return 0


def add_benchmark_data_flags(parser) -> None:
    parser.add_argument(
        "photographs", nargs="+", metavar="PHOTO", help="pictures of about 500x375 pixels"
    )
    add_config_flags(parser, f"{BASE} by default")
    add_count(parser, "rounds", 50, "rounds of 20 images")
    # Flags of other commands that set keys have the same names.
    text = "also compare a dataloader of N workers, on N free cores, with one"
    add_count(parser, "workers", 0, text, dest="compared_workers")
    add_count(parser, "epochs", 9, "epochs of each dataloader", dest="compared_epochs")


def run_benchmark_data(args) -> int:
    """Measure the input pipeline beside plain decoding.

    example: replknet benchmark data photo.jpg -rounds 1
    """
    from replknet_paddle.bench.data import report_data

    args.cfg = args.cfg or BASE
    report_data(
        config_from(args),
        args.photographs,
        rounds=args.rounds,
        workers=args.compared_workers,
        epochs=args.compared_epochs,
    )
    return 0


def add_benchmark_inference_flags(parser) -> None:
    # 0.2 had -cfg alone.
    add_model(parser, f"{WEIGHTS_FORMS}; of the first two, with random weights", is_optional=True)
    add_flag(parser, "backends", "by default all that are installed", nargs="+", metavar="NAME")
    add_flag(
        parser,
        "precisions",
        "by default fp32, fp16, bf16 and int8",
        nargs="+",
        default=["fp32", "fp16", "bf16", "int8"],
        metavar="NAME",
    )
    add_flag(
        parser,
        "batch_sizes",
        "by default 1 and 8",
        nargs="+",
        type=int,
        default=[1, 8],
        metavar="N",
    )
    add_flag(parser, "threads", "by default all cores", type=int, metavar="N")
    add_count(parser, "rounds", 9, "of each")
    add_output_flags(parser, ".json file for the figures", metavar="FILE")


def run_benchmark_inference(args) -> int:
    """Measure a network on every installed backend.

    example: replknet benchmark inference output/RUN -backends eager -precisions fp32 -rounds 1
    """
    if args.output is not None:
        check_file_target(args.output, [".json"], must_be_new=not args.overwrite)
    args.model = args.model or args.cfg
    config = config_from(args)
    if is_published(config.MODEL.PRETRAINED):  # no download for a measurement
        config = override(config, MODEL__PRETRAINED=None)

    from replknet_paddle.bench.inference import Plan, report_inference

    plan = Plan(
        backends=args.backends,
        precisions=args.precisions,
        batch_sizes=args.batch_sizes,
        threads=args.threads,
        rounds=args.rounds,
    )
    report_inference(config, plan, json_file=args.output)
    if args.output is not None:
        print(f"wrote {args.output}")
    return 0


def add_benchmark_conv_flags(parser) -> None:
    add_flag(
        parser,
        "shapes",
        "the stages of RepLKNet-31B at 224, the grid of the paper's Table 5, or both",
        choices=("stages", "grid", "all"),
        default="all",
    )
    add_count(parser, "batch", 1, "images")
    add_flag(
        parser,
        "dtype",
        "of the tensors; half precision on GPU only (%(default)s)",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
    )
    add_count(parser, "rounds", 5, "of each")


def run_benchmark_conv(args) -> int:
    """Measure depthwise convolutions beside Paddle's.

    example: replknet benchmark conv -shapes stages -batch 2 -rounds 1
    """
    from replknet_paddle.bench.conv import report_conv

    report_conv(shapes=args.shapes, batch=args.batch, rounds=args.rounds, dtype=args.dtype)
    return 0


def add_benchmark_network_flags(parser) -> None:
    add_model(parser, weights=False, default=BASE)
    add_count(parser, "rounds", 5, "of each")
    add_count(parser, "forward_batch", 1, "images")
    add_count(parser, "step_batch", 4, "images")


def run_benchmark_network(args) -> int:
    """Measure a network with and without fast operators.

    example: replknet benchmark network configs/replknet_nano.yaml -rounds 1
    """
    from replknet_paddle.bench.network import report_network

    report_network(
        config_from(args),
        forward_batch=args.forward_batch,
        step_batch=args.step_batch,
        rounds=args.rounds,
    )
    return 0
