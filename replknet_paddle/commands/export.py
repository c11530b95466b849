"""Write a checkpoint for fast inference: a folder with the model and what it takes to use it.

The folder is enough to predict with, and docs/deployment.md says what runs it. INT8 is calibrated
on images of the training list, and its accuracy is compared on images of the validation list.
"""

from replknet_paddle.commands.console import log_to_stderr
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.commands.train import task_of

EXAMPLES = """\
examples: replknet export -pretrained output/RUN/best -format onnx exported
          replknet export -pretrained output/RUN/best -format onnx -precision int8 \\
              -data_path data/digits exported_int8
"""


def add_arguments(parser) -> None:
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


def run(args) -> int:
    log_to_stderr()
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
