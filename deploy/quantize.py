"""INT8 by post-training quantization, with ONNX Runtime's quantizer.

Weights become 8-bit integers with a scale per output channel, activations 8-bit integers with a
scale per tensor, from the smallest and largest values that calibration images give. The stem,
which reads pixels, and the head, which makes logits, stay in float32: they are a small part of the
work and much of the loss. The result is an ordinary ONNX file of QuantizeLinear and
DequantizeLinear operators, which OpenVINO and ONNX Runtime both compute in integers.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deploy.extras import import_extra
from deploy.onnx_graph import INPUT
from errors import InputError


def quantize(source: Path, target: Path, batches: Iterable[np.ndarray]) -> None:
    """Write the INT8 form of the ONNX file `source` to `target`.

    Args:
        source: of `deploy.onnx_graph`, float32.
        batches: float32 (N, 3, H, W), preprocessed as in evaluation.

    Raises:
        InputError: the packages are missing, or there is no batch.
    """
    onnx = import_extra("onnx")
    import_extra("onnxruntime")
    quantization = import_extra("onnxruntime.quantization")

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
