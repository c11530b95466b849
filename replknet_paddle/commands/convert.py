"""Convert a checkpoint to another format, or to the parameter names of another framework."""

from replknet_paddle.commands.console import log_to_stderr
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.commands.train import task_of
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target

EXAMPLES = """\
example: replknet convert output/RUN/best replknet.safetensors -to mmpretrain
"""


def add_arguments(parser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="run folder, or .pth, .pdparams or .safetensors file in any known layout",
    )
    parser.add_argument("destination", metavar="DST", help=".safetensors or .pdparams file")
    add_config_flags(parser)
    add_flag(
        parser,
        "to",
        "whose parameter names to write (%(default)s)",
        choices=("native", "official", "mmpretrain"),
        default="native",
    )
    add_flag(
        parser,
        "weights",
        "which weights to take from a training checkpoint; auto: those that its run found better "
        "(%(default)s)",
        choices=("auto", "model", "model_ema"),
        default="auto",
    )


def run(args) -> int:
    log_to_stderr()
    check_file_target(args.destination)
    config = config_from(args, args.source)
    is_segmentation = config.MODEL.TYPE == "UPerNet"
    if is_segmentation and args.to == "mmpretrain":
        raise InputError("-to mmpretrain of a segmentation network; allowed: native, official")

    from replknet_paddle.checkpoints.load import convert_file
    from replknet_paddle.checkpoints.run_folder import checkpoint_path

    count = convert_file(
        checkpoint_path(args.source),
        args.destination,
        config,
        weights=args.weights,
        layout={"native": "upernet", "official": "mmseg"}[args.to] if is_segmentation else args.to,
        build=task_of(config).network,
    )
    print(f"{args.destination}: {count} tensors under {args.to} names")
    return 0
