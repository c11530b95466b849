"""Files for others: exports, merged and converted checkpoints, compiled operators."""

import os
import sys

from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.commands.train import task_of
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target


def add_export_flags(parser) -> None:
    def flag(name, help_text, **options):
        add_flag(parser, name, help_text, **options)

    add_config_flags(parser)
    flag("pretrained", "checkpoint or run folder to export", required=True, metavar="FILE")
    flag("format", "paddle or onnx (%(default)s)", default="paddle", metavar="NAME")
    flag("precision", "fp32, fp16, bf16 or int8 (%(default)s)", default="fp32", metavar="NAME")
    flag(
        "conv_impl",
        "large kernels as paddle's convolution or, for GPUs, as matmul, matrix products, which fix "
        "the image size (%(default)s)",
        default="paddle",
        metavar="NAME",
    )
    flag("class_names", "file of one class name a line, as DATA.CLASS_NAMES", metavar="FILE")
    flag("data_path", "INT8: folder of the images and their lists", metavar="DIR")
    flag("calibration", "INT8: list file; by default train_list.txt", metavar="FILE")
    flag(
        "calibration_images",
        "INT8: how many of the list, evenly spread (%(default)s)",
        type=int,
        default=128,
        metavar="N",
    )
    flag(
        "validation_images",
        "INT8: how many of val_list.txt to compare accuracies on (%(default)s)",
        type=int,
        default=1000,
        metavar="N",
    )
    parser.add_argument(
        "target", metavar="DST", help="folder to write; replaces an earlier export there"
    )


def run_export(args) -> int:
    r"""Write a checkpoint for fast inference: a folder with the model and what it takes to use it.

    The folder is enough to predict with, and docs/deployment.md says what runs it. INT8 is
    calibrated on images of the training list, and its accuracy is compared on images of the
    validation list.

    examples: replknet export -pretrained output/RUN/best -format onnx exported
              replknet export -pretrained output/RUN/best -format onnx -precision int8 \
                  -data_path data/digits exported_int8
    """
    if args.class_names is not None:
        args.opts = [*(args.opts or ()), "DATA.CLASS_NAMES", args.class_names]
    config = config_from(args, args.pretrained)

    from replknet_paddle.deploy.export_checkpoint import Int8Images, export_checkpoint

    export_checkpoint(
        config,
        build=task_of(config).network,
        source=args.pretrained,
        target=args.target,
        format=args.format,
        precision=args.precision,
        conv_impl=args.conv_impl,
        int8_images=Int8Images(args.calibration, args.calibration_images, args.validation_images),
    )
    return 0


def add_merge_flags(parser) -> None:
    add_config_flags(parser)
    add_flag(parser, "pretrained", "weights to merge", required=True, metavar="FILE")
    parser.add_argument("target", metavar="DST", help=".safetensors file to write")


def run_merge(args) -> int:
    r"""Merge the small kernels of a checkpoint into its large ones, for inference.

    The result loads with MODEL.SMALL_KERNEL_MERGED: True. What folding every batch norm besides
    would give, as replknet export does, is reported too: sizes, and the largest deviation of the
    outputs on random images.

    example: replknet merge -cfg configs/replknet_31b.yaml -pretrained replknet_31b.pdparams \
                 merged.safetensors
    """
    config = config_from(args, args.pretrained)

    from replknet_paddle.checkpoints.run_folder import checkpoint_path
    from replknet_paddle.deploy.merge import merge_checkpoint

    source = checkpoint_path(args.pretrained)
    for form in merge_checkpoint(config, source, args.target):
        print(form)
    sizes = [os.path.getsize(path) / 1e6 for path in (source, args.target)]
    print(f"merged {source} ({sizes[0]:.1f} MB) into {args.target} ({sizes[1]:.1f} MB)")
    return 0


def add_convert_flags(parser) -> None:
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


def run_convert(args) -> int:
    """Convert a checkpoint to another format, or to the parameter names of another framework.

    example: replknet convert output/RUN/best replknet.safetensors -to mmpretrain
    """
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


def add_build_flags(parser) -> None:
    pass


def run_build(args) -> int:
    """Compile the operators and image operations, which otherwise happens on first use.

    They go into the user's cache: ~/.cache/replknet_paddle, or the folder that
    REPLKNET_PADDLE_CACHE names. Nothing happens where they are up to date.
    """
    from replknet_paddle.data.transforms.pixels import pixels_library
    from replknet_paddle.ops.library import operators_library
    from replknet_paddle.runtime.compiler import BuildError

    status = 0
    for what, library in (
        ("convolution operators", operators_library),
        ("image operations", pixels_library),
    ):
        try:
            path, seconds = library().build()
        except BuildError as error:
            try:
                kept = library().find()
            except BuildError:
                kept = None
            if kept is None:
                status = 1
                print(f"no compiled {what}, so Paddle's or Pillow's are used: {error}")
            else:
                print(f"the {what} built before stay in use: {error}")
        else:
            if seconds:
                print(f"{what} built in {seconds:.0f} s: {path}", file=sys.stderr)
    return status
