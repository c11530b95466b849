"""Write a checkpoint for fast inference: a folder with the model and what it takes to use it.

The folder is enough to predict with, and docs/deployment.md says what runs it. INT8 is calibrated
on images of the training list, and its accuracy is compared on images of the validation list.
"""

import argparse
import os
import sys
from pathlib import Path

import paddle

from replknet_paddle.config import get_config, update_config
from replknet_paddle.data.dataset import LIST_FILES, ListDataset, get_class_names, get_dataset
from replknet_paddle.deploy.backends import DygraphBackend, load_network, open_backend
from replknet_paddle.deploy.export import check_combination, check_target, export_model
from replknet_paddle.deploy.fold import largest_deviation, random_images
from replknet_paddle.deploy.quantize import compare, spread_batches
from replknet_paddle.deploy.sidecar import FORMATS, PRECISIONS, Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.zoo.download import file_sha256
from replknet_paddle.checkpoints.run_folder import run_config_file, weights_of


def export(config, args) -> None:
    """Do what the flags say, and print what came of it."""
    source = weights_of(args.pretrained)
    check_combination(args.format, args.precision)
    target = check_target(args.target)
    for flag in ("calibration_images", "validation_images"):
        if getattr(args, flag) < 1:
            raise InputError(f"-{flag} {getattr(args, flag)}; allowed: an integer >= 1")
    is_int8 = args.precision == "int8"
    calibration = calibration_set(config, args) if is_int8 else None
    validation = validation_set(config) if is_int8 else None
    model, _ = load_network(source, config)
    sidecar = Sidecar.build(
        config,
        format=args.format,
        precision=args.precision,
        class_names=get_class_names(config),
        source_sha256=file_sha256(source),
        paddle_version=paddle.__version__,
    )
    export_model(
        model,
        target,
        sidecar,
        calibration=(images for images, _ in spread_batches(calibration, args.calibration_images))
        if is_int8
        else (),
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    print(
        f"exported {source} ({os.path.getsize(source) / 1e6:.1f} MB) to {target} "
        f"({args.format}, {args.precision}, {size / 1e6:.1f} MB)"
    )
    check(model, config, target, validation, args.validation_images)


def check(model, config, target: Path, validation: ListDataset | None, count: int) -> None:
    """Print how far the export's outputs are from the network's in Paddle's eager mode."""
    try:
        backend = open_backend(target)
    except InputError as error:
        print(f"not compared with the checkpoint, since it does not run here: {error}")
        return
    size = config.DATA.IMAGE_SIZE
    images = random_images(2, size)
    eager = DygraphBackend(model, backend.sidecar)
    deviation = largest_deviation(backend.run(images), eager.run(images))
    print(
        f"logits on 2 random images are within {deviation:.2g} of the largest one of the "
        f"checkpoint's (backend {backend.name} against Paddle's eager mode)"
    )
    if validation is not None:
        before = open_backend(model, config=config)
        result = compare(before, backend, spread_batches(validation, count))
        print(f"INT8 on images of {validation.list_file}: {result}")


def calibration_set(config, args) -> ListDataset:
    """The images of the calibration list, preprocessed as in evaluation."""
    return ListDataset(
        args.calibration or os.path.join(config.DATA.DATA_PATH, LIST_FILES[True]),
        config.DATA.DATA_PATH,
        build_eval_transform(config),
        num_classes=config.MODEL.NUM_CLASSES,
    )


def validation_set(config) -> ListDataset | None:
    """The validation images, if there is a list of them."""
    try:
        return get_dataset(config, is_train=False)
    except FileNotFoundError:
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="replknet export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: replknet export -pretrained output/RUN/best -format onnx exported\n"
        "         replknet export -pretrained output/RUN/best -format onnx -precision int8 "
        "-data_path data/digits exported_int8",
    )

    def flag(name, help_text, **options):
        parser.add_argument(f"-{name}", f"--{name}", help=help_text, **options)

    flag("cfg", "YAML file; not needed for a checkpoint in its run folder", metavar="FILE")
    flag("pretrained", "checkpoint or run folder to export", required=True, metavar="FILE")
    flag("format", f"{' or '.join(FORMATS)} (%(default)s)", default="paddle", metavar="NAME")
    flag("precision", f"{', '.join(PRECISIONS)} (%(default)s)", default="fp32", metavar="NAME")
    flag(
        "class_names",
        "file of one class name a line, as DATA.CLASS_NAMES",
        metavar="FILE",
    )
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
    flag("opts", "other keys", nargs="+", metavar="KEY VALUE")
    parser.add_argument("target", metavar="DST", help="folder to write; an earlier export goes")
    args = parser.parse_args(argv)
    if args.class_names is not None:
        args.opts = [*(args.opts or ()), "DATA.CLASS_NAMES", args.class_names]
    try:
        config = update_config(get_config(args.cfg or run_config_file(args.pretrained)), args)
        export(config, args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
