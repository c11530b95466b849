"""Merge the small kernels of a checkpoint into its large ones, for inference.

The result loads with MODEL.SMALL_KERNEL_MERGED: True.
"""

import argparse
import sys

from config import get_config, update_config
from errors import InputError
from replknet import build_replknet
from zoo.convert import load_pretrained
from zoo.run_folder import run_config_file
from zoo.writers import write_safetensors


def reparameterize(config, source: str, target: str) -> None:
    """Write the merged form of the weights in `source` to the safetensors file `target`."""
    model = build_replknet(config)
    load_pretrained(model, source)
    model.structural_reparam()
    write_safetensors(
        target, {name: value.numpy() for name, value in model.state_dict().items()}, metadata={}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.reparameterize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m tools.reparameterize -cfg configs/replknet_31b.yaml "
        "-pretrained replknet_31b.pdparams merged.safetensors",
    )
    parser.add_argument(
        "-cfg",
        "--cfg",
        metavar="FILE",
        help="YAML file; not needed for a checkpoint in its run folder",
    )
    parser.add_argument(
        "-pretrained", "--pretrained", required=True, metavar="FILE", help="weights to merge"
    )
    parser.add_argument("-opts", "--opts", nargs="+", metavar="KEY VALUE", help="other keys")
    parser.add_argument("target", metavar="DST", help="safetensors file to write")
    args = parser.parse_args(argv)
    try:
        config = update_config(get_config(args.cfg or run_config_file(args.pretrained)), args)
        reparameterize(config, args.pretrained, args.target)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"merged {args.pretrained} into {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
