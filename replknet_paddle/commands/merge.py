"""Merge the small kernels of a checkpoint into its large ones, for inference.

The result loads with MODEL.SMALL_KERNEL_MERGED: True. What folding every batch norm besides would
give, as replknet export does, is reported too: sizes, and the largest deviation of the outputs on
random images.
"""

import os

from replknet_paddle.commands.console import log_to_stderr
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target

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

    from replknet_paddle.checkpoints.record import class_names_metadata
    from replknet_paddle.checkpoints.run_folder import weights_of
    from replknet_paddle.checkpoints.writers import write_safetensors
    from replknet_paddle.deploy.backends import load_network
    from replknet_paddle.deploy.fold import compare_forms, random_images

    source, target = weights_of(args.pretrained), args.target
    check_file_target(target, [".safetensors"])
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InputError(f"{target} is the checkpoint to merge; name another file")
    model, _ = load_network(source, config)
    # Two images of at most 224 pixels tell: convolutions do not depend on the size.
    forms = compare_forms(model, random_images(2, min(config.DATA.IMAGE_SIZE, 224)))
    model.structural_reparam()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    write_safetensors(target, state, class_names_metadata(source))
    for form in forms:
        print(form)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, target)]
    print(f"merged {source} ({sizes[0]:.1f} MB) into {target} ({sizes[1]:.1f} MB)")
    return 0
