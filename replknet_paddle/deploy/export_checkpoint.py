"""From a checkpoint to an export folder, and how far its outputs are from the checkpoint's.

INT8 is calibrated on images of the training list, and its accuracy is compared on images of the
validation list.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import paddle

from replknet_paddle.checkpoints.run_folder import checkpoint_path
from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import LIST_FILES
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.backends import FORMAT, candidates, load_network, open_backend
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


@dataclass(frozen=True)
class Int8Images:
    """The images that INT8 needs.

    Attributes:
        calibration_list: list file; None for the training list.
        calibration: how many of it to calibrate with.
        validation: how many of the validation list to compare accuracies on.
    """

    calibration_list: str | None = None
    calibration: int = 128
    validation: int = 1000

    def check(self) -> None:
        """Raise InputError for a number below 1."""
        for what in ("calibration", "validation"):
            if getattr(self, what) < 1:
                raise InputError(f"-{what}_images {getattr(self, what)}; allowed: an integer >= 1")


def export_checkpoint(
    config,
    *,
    build: Callable,
    source: str,
    target: str,
    format: str,
    precision: str,
    conv_impl: str = "paddle",
    int8_images: Int8Images = Int8Images(),  # frozen
) -> None:
    """Write an export folder, and print how large and how exact it is.

    Args:
        config: of the network.
        build: config -> the network.
        source: checkpoint or run folder.
        target: as of `export_model`.
        format, precision: of the export.
        conv_impl: `matmul` for large kernels as matrix products, for GPUs and one image size.

    Raises:
        FileNotFoundError, InputError: something is missing, or does not fit.
        OSError: the folder cannot be written.
    """
    source = checkpoint_path(source)
    check_combination(format, precision, conv_impl)
    target = check_target(target)
    int8_images.check()
    is_int8 = precision == "int8"
    if is_int8 and config.MODEL.TYPE != "RepLKNet":
        raise InputError(CLASSIFIERS_ONLY)
    calibration = calibration_set(config, int8_images.calibration_list) if is_int8 else None
    validation = validation_set(config) if is_int8 else None
    model, _ = load_network(source, config, build)
    sidecar = Sidecar.build(
        config,
        format=format,
        precision=precision,
        fixed_size=conv_impl == "matmul",
        class_names=model.class_names,
        source_sha256=file_sha256(source),
        paddle_version=paddle.__version__,
    )
    batches = ()
    if is_int8:
        limit = config.DATA.MAX_BAD_IMAGES
        batches = spread_batches(calibration, int8_images.calibration, max_bad_images=limit)
    export_model(model, target, sidecar, calibration=(images for images, _ in batches))
    size = sum(path.stat().st_size for path in target.iterdir())
    print(
        f"exported {source} ({os.path.getsize(source) / 1e6:.1f} MB) to {target} "
        f"({format}, {precision}, {size / 1e6:.1f} MB)"
    )
    check(model, config, target, validation, int8_images.validation)


def check(model, config, target: Path, validation: ListDataset | None, count: int) -> None:
    """Print how far the export's outputs are from the network's in Paddle's eager mode."""
    try:
        sidecar = Sidecar.read(target)
        readers = [name for name, format in FORMAT.items() if format == sidecar.format]
        backend = open_backend(target, candidates(readers, sidecar.precision)[0])
    except InputError as error:
        print(f"not compared with the checkpoint, since it does not run here: {error}")
        return
    images = random_images(2, config.DATA.IMAGE_SIZE)
    eager = DygraphBackend(model, backend.sidecar)
    deviation = largest_deviation(backend.run(images), eager.run(images))
    print(
        f"logits on 2 random images are within {deviation:.2g} of the largest one of the "
        f"checkpoint's (backend {backend.name} against Paddle's eager mode)"
    )
    if validation is not None:
        before = open_backend(model, "paddle", config=config)
        limit = config.DATA.MAX_BAD_IMAGES
        result = compare(before, backend, spread_batches(validation, count, max_bad_images=limit))
        print(f"INT8 on images of {validation.list_file}: {result}")


def calibration_set(config, list_file: str | None) -> ListDataset:
    """The images of the calibration list, preprocessed as in evaluation."""
    return ListDataset(
        list_file or os.path.join(config.DATA.DATA_PATH, LIST_FILES[True]),
        config.DATA.DATA_PATH,
        build_eval_transform(config),
        num_classes=config.MODEL.NUM_CLASSES,
        allow_outside=config.DATA.ALLOW_OUTSIDE,
    )


def validation_set(config) -> ListDataset | None:
    """The validation images, if there is a list of them."""
    try:
        return get_dataset(config, is_train=False)
    except FileNotFoundError:
        return None
