"""Convert a checkpoint to another format, or to the names of another framework."""

import argparse
import sys

from config import get_config
from errors import InputError
from zoo.convert import LAYOUTS, WEIGHTS, convert_file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m tools.convert_weights', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog='example: python -m tools.convert_weights output/RUN/best replknet.safetensors '
               '-cfg configs/replknet_31b.yaml -to mmpretrain')
    parser.add_argument('source', metavar='SRC',
                        help='.pth, .pdparams or .safetensors file, in any known layout')
    parser.add_argument('destination', metavar='DST', help='.safetensors or .pdparams file')
    parser.add_argument('-cfg', '--cfg', required=True, metavar='FILE',
                        help='YAML file of the network')
    parser.add_argument('-to', '--to', choices=LAYOUTS, default='native',
                        help='whose parameter names to write')
    parser.add_argument('-weights', '--weights', choices=WEIGHTS, default='model',
                        help='which weights to take from a training checkpoint')
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        count = convert_file(args.source, args.destination, get_config(args.cfg),
                             weights=args.weights, layout=args.to)
    except (InputError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{args.destination}: {count} tensors under {args.to} names')
    return 0


if __name__ == '__main__':
    sys.exit(main())
