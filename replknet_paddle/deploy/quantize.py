"""INT8 by post-training quantization, with ONNX Runtime's quantizer.

Weights become 8-bit integers with a scale per output channel, activations 8-bit integers with a
scale per tensor, from the smallest and largest values that calibration images give. The stem,
which reads pixels, and the head, which makes logits, stay in float32: they are a small part of the
work and much of the loss. The result is an ordinary ONNX file of QuantizeLinear and
DequantizeLinear operators, which OpenVINO and ONNX Runtime both compute in integers.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replknet_paddle.data.dataset import ListDataset, get_dataset
from replknet_paddle.data.lists import get_list_path
from replknet_paddle.data.transforms import build_eval_transform
from replknet_paddle.deploy.onnx_graph import INPUT
from replknet_paddle.runtime.errors import InputError, SampleError
from replknet_paddle.runtime.packages import import_extra

logger = logging.getLogger(__name__)


def quantize(source: Path, target: Path, batches: Iterable[np.ndarray]) -> None:
    """Write the INT8 form of the float32 ONNX file `source` to `target`, with the ranges that
    `batches` of preprocessed images give, float32 (N, 3, H, W)."""
    onnx = import_extra("onnx", "deploy")
    import_extra("onnxruntime", "deploy")
    quantization = import_extra("onnxruntime.quantization", "deploy")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(batches)
            self.count = 0

        def get_next(self):
            batch = next(self.batches, None)
            if batch is None:
                return None
            self.count += len(batch)
            return {INPUT: batch}

    reader = Reader()
    nodes = onnx.load(str(source), load_external_data=False).graph.node
    root = logging.getLogger()
    level = root.level
    try:
        root.setLevel(logging.ERROR)  # its advice is about graphs with shapes left to infer
        quantization.quantize_static(
            str(source),
            str(target),
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=[
                node.name for node in nodes if node.name.startswith(("stem.", "head"))
            ],
        )
    except ValueError as error:
        if reader.count:
            raise
        raise InputError(f"no image to calibrate INT8 with ({error})") from None
    finally:
        root.setLevel(level)


def calibration_set(config, list_file: str | None = None) -> ListDataset:
    """Return the images of the training list or another one, preprocessed as in evaluation."""
    return ListDataset(
        list_file or get_list_path(config, is_train=True),
        config.DATA.DATA_PATH,
        build_eval_transform(config),
        num_classes=config.MODEL.NUM_CLASSES or None,  # without a head, any
        allow_outside=config.DATA.ALLOW_OUTSIDE,
    )


def validation_set(config) -> ListDataset | None:
    """Return the validation images, if there is a list of them."""
    try:
        return get_dataset(config, is_train=False)
    except FileNotFoundError:
        return None


def spread_batches(
    dataset: ListDataset, count: int, batch_size: int = 8, *, max_bad_images: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield at most `count` images of a dataset, evenly spread over its list, as it may be sorted:
    float32 (N, 3, H, W) and labels int64 (N,), N at most `batch_size`. Of `max_bad_images`
    unreadable ones each is left out with a warning; one more raises SampleError."""
    count = min(count, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    bad, samples = 0, []
    for index in indices:
        try:
            samples.append(dataset[0, int(index)])
        except SampleError as error:
            bad += 1
            if bad > max_bad_images:
                raise SampleError(
                    f"{error}. This is unreadable image number {bad}; DATA.MAX_BAD_IMAGES allows "
                    f"{max_bad_images}"
                ) from None
            logger.warning(
                "%s; it is left out (%d of DATA.MAX_BAD_IMAGES %d)", error, bad, max_bad_images
            )
        if len(samples) == batch_size or (samples and index == indices[-1]):
            yield (
                np.stack([np.asarray(image) for image, _ in samples]),
                np.array([label for _, label in samples]),
            )
            samples = []


@dataclass(frozen=True)
class Agreement:
    """How many labels of the same images two networks hit each, and how many they share."""

    images: int
    before: int
    after: int
    same: int

    def __str__(self) -> str:
        if not self.images:
            return "not compared, since no image is readable"
        before, after = (100 * hits / self.images for hits in (self.before, self.after))
        return (
            f"top-1 {before:.2f} % ({self.before}/{self.images}) before, "
            f"{after:.2f} % ({self.after}/{self.images}) after; "
            f"{self.same} of {self.images} get the same label"
        )


def compare(before, after, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Agreement:
    """Return the top-1 of two backends on labelled batches."""
    sums = np.zeros(4, dtype=int)
    for images, labels in batches:
        first, second = (backend.run(images).argmax(axis=1) for backend in (before, after))
        hits = (first == labels).sum(), (second == labels).sum(), (first == second).sum()
        sums += [len(labels), *hits]
    return Agreement(*map(int, sums))
