"""Convert a checkpoint to another format, or to the names of another framework."""

import argparse
import sys

from replknet_paddle.config import get_config, update_config
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.checkpoints.convert import LAYOUTS, WEIGHTS, convert_file
from replknet_paddle.checkpoints.run_folder import run_config_file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="replknet convert",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="example: replknet convert output/RUN/best replknet.safetensors "
        "-cfg configs/replknet_31b.yaml -to mmpretrain",
    )
    parser.add_argument(
        "source", metavar="SRC", help=".pth, .pdparams or .safetensors file, in any known layout"
    )
    parser.add_argument("destination", metavar="DST", help=".safetensors or .pdparams file")
    parser.add_argument(
        "-cfg",
        "--cfg",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file of the network; not needed for a checkpoint in its run folder",
    )
    parser.add_argument(
        "-opts",
        "--opts",
        nargs="+",
        metavar="KEY VALUE",
        default=argparse.SUPPRESS,
        help="other keys",
    )
    parser.add_argument(
        "-to", "--to", choices=LAYOUTS, default="native", help="whose parameter names to write"
    )
    parser.add_argument(
        "-weights",
        "--weights",
        choices=WEIGHTS,
        default="model",
        help="which weights to take from a training checkpoint",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        cfg_file = getattr(args, "cfg", None) or run_config_file(args.source)
        config = update_config(get_config(cfg_file), args)
        count = convert_file(
            args.source, args.destination, config, weights=args.weights, layout=args.to
        )
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.destination}: {count} tensors under {args.to} names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
