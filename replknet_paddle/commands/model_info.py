"""Print the parameters and multiply-adds of the network that a config describes."""

import argparse
import sys

from replknet_paddle.analysis.complexity import count_macs, count_parameters
from replknet_paddle.config import get_config, update_config
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.model import build_replknet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet model-info",
        description=__doc__,
        epilog="example: replknet model-info -cfg configs/replknet_xl.yaml",
    )
    parser.add_argument("-cfg", "--cfg", required=True, metavar="FILE", help="YAML file")
    parser.add_argument("-opts", "--opts", nargs="+", metavar="KEY VALUE", help="other keys")
    args = parser.parse_args(argv)
    try:
        config = update_config(get_config(args.cfg), args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = config.DATA.IMAGE_SIZE
    model = build_replknet(config)
    print(f"{config.MODEL.NAME}: {size}x{size}, {config.MODEL.NUM_CLASSES} classes")
    print(f"{'form':8}{'parameters':>16}{'multiply-adds':>20}")
    forms = [] if config.MODEL.SMALL_KERNEL_MERGED else ["train"]
    for form in [*forms, "merged"]:
        if form == "merged":
            model.structural_reparam()
        print(f"{form:8}{count_parameters(model):16,}{count_macs(model, size):20,}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
