"""Write a checkpoint for fast inference: a folder with the model and what it takes to use it.

The folder is enough to predict with, and docs/deployment.md says what runs it. INT8 is calibrated
on images of the training list, and its accuracy is compared on images of the validation list.
"""

import os

from replknet_paddle.commands.console import log_to_stderr
from replknet_paddle.commands.flags import add_config_flags, add_flag, config_from
from replknet_paddle.commands.train import task_of
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import file_sha256

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

    from replknet_paddle.checkpoints.run_folder import weights_of
    from replknet_paddle.deploy.backends import load_network
    from replknet_paddle.deploy.export import (
        ModelInfo,
        check_combination,
        check_target,
        export_model,
    )
    from replknet_paddle.deploy.quantize import calibration_set, spread_batches, validation_set

    source = weights_of(args.pretrained)
    is_classifier = config.MODEL.TYPE == "RepLKNet"
    check_combination(args.format, args.precision, args.conv_impl, is_classifier=is_classifier)
    target = check_target(args.target)
    for name in ("calibration_images", "validation_images"):
        if getattr(args, name) < 1:
            raise InputError(f"-{name} {getattr(args, name)}; allowed: an integer >= 1")
    calibration, validation = (), None
    if args.precision == "int8":
        calibration = spread_batches(
            calibration_set(config, args.calibration),
            args.calibration_images,
            max_bad_images=config.DATA.MAX_BAD_IMAGES,
        )
        validation = validation_set(config)
    model, _ = load_network(source, config, task_of(config).network)
    info = ModelInfo(
        config,
        args.format,
        args.precision,
        fixed_size=args.conv_impl == "matmul",
        class_names=None if model.class_names is None else tuple(model.class_names),
        source_sha256=file_sha256(source),
    )
    export_model(model, target, info, calibration=(images for images, _ in calibration))
    size = sum(path.stat().st_size for path in target.iterdir())
    print(
        f"exported {source} ({os.path.getsize(source) / 1e6:.1f} MB) to {target} "
        f"({args.format}, {args.precision}, {size / 1e6:.1f} MB)"
    )
    compare_with_checkpoint(model, info, target, validation, args.validation_images)
    return 0


def compare_with_checkpoint(model, info, target, validation, count: int) -> None:
    """Print how far an export's outputs are from those of the network in Paddle's eager mode.

    Args:
        validation: a dataset to compare accuracies on, at most `count` images of it; or None.
    """
    from replknet_paddle.deploy.backends import candidates, open_backend, open_eager
    from replknet_paddle.deploy.fold import largest_deviation, random_images
    from replknet_paddle.deploy.quantize import compare, spread_batches

    try:
        backend = open_backend(target, candidates([info.format], info.precision)[0])
    except InputError as error:
        print(f"not compared with the checkpoint, since it does not run here: {error}")
        return
    images = random_images(2, info.config.DATA.IMAGE_SIZE)
    deviation = largest_deviation(backend.run(images), open_eager(model, info).run(images))
    print(
        f"logits on 2 random images are within {deviation:.2g} of the largest one of the "
        f"checkpoint's (backend {backend.name} against Paddle's eager mode)"
    )
    if validation is not None:
        before = open_backend(model, "paddle", config=info.config)
        limit = info.config.DATA.MAX_BAD_IMAGES
        result = compare(before, backend, spread_batches(validation, count, max_bad_images=limit))
        print(f"INT8 on images of {validation.list_file}: {result}")
