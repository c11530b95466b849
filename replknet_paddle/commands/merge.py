"""Merge the small kernels of a checkpoint into its large ones, for inference.

The result loads with MODEL.SMALL_KERNEL_MERGED: True. What folding every batch norm besides would
give, as replknet export does, is reported too: sizes, and the largest deviation of the outputs on
random images.
"""

import os

from replknet_paddle.commands.console import log_to_stderr
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from

EXAMPLES = """\
example: replknet merge -cfg configs/replknet_31b.yaml -pretrained replknet_31b.pdparams \\
             merged.safetensors
"""


def add_arguments(parser) -> None:
    add_config_flags(parser)
    add_flag(parser, "pretrained", "weights to merge", required=True, metavar="FILE")
    parser.add_argument("target", metavar="DST", help=".safetensors file to write")


def run(args) -> int:
    log_to_stderr()
    config = config_from(args, args.pretrained)

    from replknet_paddle.checkpoints.run_folder import checkpoint_path
    from replknet_paddle.deploy.merge import merge_checkpoint

    source = checkpoint_path(args.pretrained)
    for form in merge_checkpoint(config, source, args.target):
        print(form)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, args.target)]
    print(f"merged {source} ({sizes[0]:.1f} MB) into {args.target} ({sizes[1]:.1f} MB)")
    return 0
