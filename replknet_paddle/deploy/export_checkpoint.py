"""From a checkpoint to an export folder, and how far its outputs are from the checkpoint's.

INT8 is calibrated on images of the training list, and its accuracy is compared on images of the
validation list.
"""

import os
from collections.abc import Callable
from pathlib import Path

import paddle

from replknet_paddle.checkpoints.run_folder import weights_of
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.backends import load_network, open_backend
from replknet_paddle.deploy.export import (
    CLASSIFIERS_ONLY,
    check_combination,
    check_target,
    export_model,
)
from replknet_paddle.deploy.fold import largest_deviation, random_images
from replknet_paddle.deploy.quantize import compare, spread_batches
from replknet_paddle.deploy.runtimes import DygraphBackend
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import file_sha256


def export_checkpoint(config, args, build: Callable) -> None:
    """Do what the flags say, and print what came of it.

    Args:
        build: config -> the network.
    """
    source = weights_of(args.pretrained)
    check_combination(args.format, args.precision)
    target = check_target(args.target)
    for flag in ("calibration_images", "validation_images"):
        if getattr(args, flag) < 1:
            raise InputError(f"-{flag} {getattr(args, flag)}; allowed: an integer >= 1")
    is_int8 = args.precision == "int8"
    if is_int8 and config.MODEL.TYPE != "RepLKNet":
        raise InputError(CLASSIFIERS_ONLY)
    calibration = calibration_set(config, args) if is_int8 else None
    validation = validation_set(config) if is_int8 else None
    model, _ = load_network(source, config, build)
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
