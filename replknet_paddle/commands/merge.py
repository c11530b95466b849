"""Merge the small kernels of a checkpoint into its large ones, for inference.

The result loads with MODEL.SMALL_KERNEL_MERGED: True. What folding every batch norm besides would
give, as replknet export does, is reported too: sizes, and the largest deviation of the
outputs on random images.
"""

import argparse
import os
import sys

from replknet_paddle.config import get_config, update_config
from replknet_paddle.deploy.backends import load_network
from replknet_paddle.deploy.fold import Form, compare_forms, random_images
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.checkpoints.run_folder import run_config_file, weights_of
from replknet_paddle.checkpoints.writers import write_safetensors

# Two images of at most this size tell: convolutions do not depend on it.
CHECKED_PIXELS = 224


def check_target(source: str, target: str) -> None:
    """Check that the merged form of `source` can become the file `target`.

    Raises:
        InputError: another kind of file, a folder, or the source itself.
        FileNotFoundError: no folder to write it into.
    """
    folder = os.path.dirname(target) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder {folder} to write {target} into")
    if os.path.isdir(target):
        raise InputError(f"{target} is a folder; name a file")
    if not target.endswith(".safetensors"):
        raise InputError(f"{target}: allowed: a name that ends in .safetensors")
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"{target} is the checkpoint to merge; name another file")


def reparameterize(config, source: str, target: str) -> list[Form]:
    """Write the merged form of the weights in `source` to the safetensors file `target`.

    Returns:
        The forms of the network, compared on random images.
    """
    model, _ = load_network(source, config)
    size = min(config.DATA.IMAGE_SIZE, CHECKED_PIXELS)
    images = random_images(2, size)
    forms = compare_forms(model, images)
    model.structural_reparam()
    write_safetensors(
        target, {name: value.numpy() for name, value in model.state_dict().items()}, metadata={}
    )
    return forms


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet merge -cfg configs/replknet_31b.yaml "
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
    parser.add_argument("target", metavar="DST", help=".safetensors file to write")
    args = parser.parse_args(argv)
    try:
        config = update_config(get_config(args.cfg or run_config_file(args.pretrained)), args)
        source = weights_of(args.pretrained)
        check_target(source, args.target)
        forms = reparameterize(config, source, args.target)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for form in forms:
        print(form)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, args.target)]
    print(f"merged {source} ({sizes[0]:.1f} MB) into {args.target} ({sizes[1]:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
