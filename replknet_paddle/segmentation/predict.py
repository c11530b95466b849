"""From pictures to label maps, by any backend, and the files that show them."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from PIL import Image

from replknet_paddle.data.transforms.image import normalize, to_rgb
from replknet_paddle.deploy.backends import BackendLayer, open_backend
from replknet_paddle.deploy.images import decode
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import atomic_file
from replknet_paddle.runtime.terminal import printable
from replknet_paddle.segmentation.evaluate import build_inference
from replknet_paddle.segmentation.pictures import (
    class_shares,
    label_picture,
    largest_first,
    legend_rows,
    palette_of,
    tinted,
    with_legend,
)
from replknet_paddle.segmentation.upernet import build_upernet

NAMED_CLASSES = 5  # of a picture's, in `SegmentedFile.__str__`


class SegmentationPredictor:
    """An open segmentation network with what goes before and after it.

    Args:
        model: a run folder, a checkpoint in one, an export folder, or a `UPerNet` of
            `build_upernet(config)`.
        backend: name of one, or `auto` for the fastest that is installed.
        config: of a checkpoint, instead of that of its run folder.

    Attributes:
        backend: the open one.
        class_names: text for each class; their numbers where the model brings no names.
        palette: uint8 (num_classes, 3).

    Raises:
        FileNotFoundError: there is no such model.
        InputError: it cannot be opened, or is not a segmentation network.
    """

    def __init__(self, model, *, backend: str = "auto", config=None):
        if not isinstance(model, nn.Layer) and not os.path.exists(model):
            raise FileNotFoundError(
                f"no model {model}; allowed: a run folder, a checkpoint in one, or an export"
            )
        self.backend = open_backend(model, backend, config=config, build=build_upernet_only)
        config = self.backend.info.config
        if config.MODEL.TYPE != "UPerNet":
            raise InputError(f"{model} is a classifier; `replknet predict` runs it")
        self.classes = build_inference(config, BackendLayer(self.backend))
        self.normalize = partial(
            normalize, mean=config.DATA.IMAGENET_MEAN, std=config.DATA.IMAGENET_STD
        )
        num_classes = config.MODEL.NUM_CLASSES
        self.class_names = self.backend.info.class_names or [str(i) for i in range(num_classes)]
        self.palette = palette_of(config.SEGMENTATION.PALETTE, num_classes)

    def labels(self, image) -> np.ndarray:
        """A path, an array (H, W, 3) uint8 or a Pillow image -> the class of each pixel, (H, W).

        Raises:
            InputError: it cannot be decoded.
        """
        pixels = np.array(to_rgb(decode(image)))
        images = paddle.to_tensor(self.normalize(pixels)[None])
        return self.classes(images)[0].numpy()


def build_upernet_only(config):
    """Return `build_upernet(config)`; raise InputError for the configuration of a classifier."""
    if config.MODEL.TYPE != "UPerNet":
        raise InputError(f"{config.MODEL.NAME} is a classifier; `replknet predict` runs it")
    return build_upernet(config)


@dataclass(frozen=True)
class SegmentedFile:
    """The classes that the network finds in one file, or why it finds none."""

    path: str  # the file; or a folder that could not be listed
    shares: tuple[tuple[str, float], ...] = ()  # name and share of each class, the largest first
    problem: str | None = None  # why there is no prediction

    def __str__(self) -> str:
        said = self.problem or ", ".join(
            f"{printable(name)} {100 * share:.1f} %" for name, share in self.shares[:NAMED_CLASSES]
        )
        return f"{printable(self.path)}: {said}"


def predict_files(
    predictor: SegmentationPredictor, files: Iterable[tuple[str, str | None]], folder: str
) -> Iterator[SegmentedFile]:
    """Write an overlay and a label image of each of `ImageFiles` into `folder`.

    NUMBER_NAME.png is the picture tinted by its classes, with a legend on the right, and
    NUMBER_NAME_labels.png a palette image whose numbers are the classes.
    """
    names, palette = predictor.class_names, predictor.palette
    os.makedirs(folder, exist_ok=True)
    for number, (path, problem) in enumerate(files, start=1):
        if problem is not None:
            yield SegmentedFile(path, problem=problem)
            continue
        # The number keeps apart what has one name in several folders.
        name = f"{number:06d}_{Path(path).stem[:50]}"
        try:
            image = to_rgb(decode(path))
            labels = predictor.labels(image)
            shares = class_shares(labels, len(names))
            rows = legend_rows(shares[:, None], names, palette)
            overlay = with_legend(tinted(np.array(image), labels, palette), rows)
            save_png(overlay, Path(folder, f"{name}.png"))
            save_png(label_picture(labels, palette), Path(folder, f"{name}_labels.png"))
        except InputError as error:
            yield SegmentedFile(path, problem=str(error))
        except MemoryError:  # Paddle's comes with pages of C++ calls
            yield SegmentedFile(path, problem="out of memory")
        else:
            found = tuple((names[i], shares[i]) for i in largest_first(shares))
            yield SegmentedFile(path, shares=found)


def save_png(picture: Image.Image, path: Path) -> None:
    with atomic_file(path, "wb") as file:
        picture.save(file, "PNG")
