"""The four ways to run a network, behind one interface: Paddle's eager mode, Paddle Inference, ONNX
Runtime, and OpenVINO."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import inference, nn

from replknet_paddle.deploy.export import PADDLE_WEIGHTS_FILE
from replknet_paddle.deploy.onnx_graph import INPUT
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.ops import frozen_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.cores import onednn_may_use_bfloat16, processor_has
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.extras import import_extra

logger = logging.getLogger(__name__)

# The largest batch that TensorRT prepares for.
TENSORRT_BATCH = 64


@runtime_checkable
class Backend(Protocol):
    """A network that is ready to run.

    Attributes:
        name: key of `PACKAGES`.
        sidecar: what the network is.
    """

    name: str
    sidecar: Sidecar

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images float32 (N, 3, H, W) -> logits float32 (N, num_classes), of a segmentation
        network (N, num_classes, H, W).

        Raises:
            InputError: another shape or type.
        """

    def close(self) -> None:
        """Give the memory back; `run` must not be called any more."""


def computes_in(name: str, precision: str) -> bool:
    """Whether an installed backend computes in this precision on this process's device.

    oneDNN, which Paddle Inference and OpenVINO run, emulates bfloat16 where AVX512-BF16 is missing
    or held back: several times slower than float32, or with an error while it runs. On a GPU
    without it Paddle only warns.
    """
    if precision != "bf16":
        return True
    if name == "paddle" and processes.on_gpu():
        return processes.gpu_computes_in_bfloat16()
    if not onednn_may_use_bfloat16():
        return False
    if name == "openvino":
        core = import_extra("openvino", "deploy").Core()
        return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return name == "paddle" and processor_has("avx512_bf16")


def no_bfloat16(name: str) -> str:
    """What to say where `computes_in` says no."""
    device = (
        "a GPU that does not compute in bfloat16 (compute capability below 8.0)"
        if processes.on_gpu()
        else "a processor that does not compute in bfloat16 (AVX512-BF16 or AMX)"
    )
    return (
        f"precision bf16 with backend {name} on {device}; allowed here: another precision; "
        "replknet export makes exports in others"
    )


def check_images(images: np.ndarray, sidecar: Sidecar) -> np.ndarray:
    """`images` as contiguous memory, if they are what `Backend.run` takes."""
    images = np.asarray(images)
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise InputError(
            f"images are {images.dtype} {images.shape}; allowed: float32 (N, 3, H, W), N >= 1"
        )
    if sidecar.input_size is not None and images.shape[2:] != tuple(sidecar.input_size):
        raise InputError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels; this export takes "
            f"{sidecar.input_size[0]} x {sidecar.input_size[1]} alone"
        )
    return np.ascontiguousarray(images)


@contextlib.contextmanager
def evaluation_mode(network: nn.Layer) -> Iterator[None]:
    """Evaluation mode for the block; afterwards each layer is in the mode it was in."""
    training = [layer for layer in network.sublayers(include_self=True) if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


class DygraphBackend:
    """Paddle's eager mode on the network as it is.

    Args:
        is_owner: nobody else changes the weights, so that layers may keep what they make of them.
    """

    name = "dygraph"

    def __init__(self, model: nn.Layer, sidecar: Sidecar, *, is_owner: bool = False):
        self.sidecar = sidecar
        self.model = model
        self.frozen = contextlib.ExitStack()
        if is_owner:
            self.frozen.enter_context(frozen_weights(model))

    def run(self, images: np.ndarray) -> np.ndarray:
        with paddle.no_grad(), evaluation_mode(self.model):
            return self.model(paddle.to_tensor(check_images(images, self.sidecar))).numpy()

    def close(self) -> None:
        self.frozen.close()
        self.model = None


class PaddleBackend:
    """Paddle Inference: oneDNN on CPU; on GPU with TensorRT where Paddle has it."""

    name = "paddle"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        if not computes_in(self.name, precision):
            raise InputError(no_bfloat16(self.name))
        self.sidecar = sidecar
        self.prepared = None  # largest batch and image side that TensorRT is prepared for

        def settings():
            config = inference.Config(str(path), str(path.with_name(PADDLE_WEIGHTS_FILE)))
            config.disable_glog_info()
            config.switch_ir_optim(True)
            return config

        try:
            if processes.on_gpu():
                self.predictor, self.prepared = gpu_predictor(settings, sidecar, precision)
            else:
                self.predictor = cpu_predictor(settings(), threads, precision)
        except (RuntimeError, ValueError, IndexError, OSError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise unreadable(path, "Paddle Inference", error) from None
        self.input = self.predictor.get_input_handle(self.predictor.get_input_names()[0])
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self.sidecar)
        if self.prepared is None:
            return self.run_batch(images)
        largest, side = self.prepared
        if images.shape[2:] != (side, side):
            raise InputError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels; TensorRT is prepared for "
                f"{side} x {side}, the size that the export's preprocessing makes"
            )
        parts = [images[i : i + largest] for i in range(0, len(images), largest)]
        return np.concatenate([self.run_batch(part) for part in parts])

    def run_batch(self, images: np.ndarray) -> np.ndarray:
        self.input.copy_from_cpu(images)
        self.predictor.run()
        return self.output.copy_to_cpu().astype(np.float32, copy=False)

    def close(self) -> None:
        self.input = self.output = self.predictor = None


def cpu_predictor(config, threads: int, precision: str):
    """A predictor with oneDNN, of an `inference.Config`."""
    config.disable_gpu()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(threads)
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    elif precision != "fp32":
        raise InputError(f"precision {precision} with backend paddle on CPU; allowed: fp32, bf16")
    return inference.create_predictor(config)


def gpu_predictor(settings: Callable, sidecar: Sidecar, precision: str):
    """A predictor on the current GPU, with TensorRT if Paddle has it and it takes the network.

    Paddle 3 gives its `.json` programs to TensorRT by a conversion of its own, which is left out:
    they run on cuDNN.

    Returns:
        The predictor; and with TensorRT, the largest batch and the image side that it is prepared
        for, else None.
    """
    types = {
        "fp32": inference.PrecisionType.Float32,
        "fp16": inference.PrecisionType.Half,
        "bf16": inference.PrecisionType.Bfloat16,
    }
    if precision not in types:
        raise InputError(
            f"precision {precision} with backend paddle on GPU; allowed: {', '.join(types)}"
        )
    device = int(paddle.device.get_device().partition(":")[2] or 0)

    size = sidecar.preprocessing.image_size

    def predictor(*, tensorrt: bool):
        config = settings()
        config.enable_use_gpu(256, device, types[precision])
        # Paddle's depthwise kernel accumulates in half precision; the names of Paddle 2 and 3.
        config.exp_disable_mixed_precision_ops({"depthwise_conv2d", "pd_op.depthwise_conv2d"})
        if tensorrt:
            config.enable_tensorrt_engine(
                workspace_size=1 << 30,
                max_batch_size=TENSORRT_BATCH,
                min_subgraph_size=3,
                precision_mode=types[precision],
                use_static=False,
                use_calib_mode=False,
            )
            config.set_trt_dynamic_shape_info(
                {INPUT: [1, 3, size, size]},
                {INPUT: [TENSORRT_BATCH, 3, size, size]},
                {INPUT: [8, 3, size, size]},
            )
        return inference.create_predictor(config)

    # Images of a segmentation network have any size; TensorRT is prepared for one.
    if sidecar.segmentation is None and precision != "bf16" and has_tensorrt():
        try:
            return predictor(tensorrt=True), (TENSORRT_BATCH, size)
        except (RuntimeError, ValueError) as error:
            logger.warning("without TensorRT, which does not take this network: %s", error)
    return predictor(tensorrt=False), None


def has_tensorrt() -> bool:
    """Whether this Paddle gives `.pdmodel` programs to a TensorRT that is installed."""
    if not paddle.__version__.startswith("2."):
        return False
    try:
        versions = (inference.get_trt_compile_version(), inference.get_trt_runtime_version())
    except RuntimeError:  # PyPI's GPU wheel is built with TensorRT and does not bring it
        return False
    return all(any(version) for version in versions)


class OnnxRuntimeBackend:
    """ONNX Runtime on CPU."""

    name = "onnxruntime"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        onnxruntime = import_extra("onnxruntime", "deploy")
        self.sidecar = sidecar
        if precision == "bf16":
            raise InputError(
                "precision bf16 with backend onnxruntime, which does not compute in it on CPU; "
                "allowed: fp32, fp16, int8"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise unreadable(path, "ONNX Runtime", error) from None

    def run(self, images: np.ndarray) -> np.ndarray:
        images = check_images(images, self.sidecar)
        return self.session.run(None, {self.session.get_inputs()[0].name: images})[0]

    def close(self) -> None:
        self.session = None


class OpenVinoBackend:
    """OpenVINO on CPU."""

    name = "openvino"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        openvino = import_extra("openvino", "deploy")
        self.sidecar = sidecar
        core = openvino.Core()
        if not computes_in(self.name, precision):
            raise InputError(no_bfloat16(self.name))
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        }
        try:
            self.compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
        except Exception as error:
            raise unreadable(path, "OpenVINO", error) from None

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.compiled(check_images(images, self.sidecar))[0]

    def close(self) -> None:
        self.compiled = None


OPENERS = {
    "paddle": PaddleBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "openvino": OpenVinoBackend,
}


def unreadable(path: Path, program: str, error: Exception) -> InputError:
    """What to say of a model file that a program refuses."""
    reason = " ".join(str(error).split())[:300]
    return InputError(f"{program} cannot read {path}: {reason}; export it again")
