"""The four ways to run a network, behind one interface: Paddle's eager mode, Paddle Inference, ONNX
Runtime, and OpenVINO."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import inference, nn

from replknet_paddle.deploy.export import PADDLE_WEIGHTS_FILE
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.ops import cache_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.packages import import_extra


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
    """Return whether an installed backend computes in this precision on this process's device."""
    if precision != "bf16":
        return True
    if name == "paddle":
        return processes.supports_bfloat16("gpu" if processes.on_gpu() else "cpu")
    if name == "openvino" and processes.onednn_may_use_bfloat16():
        core = import_extra("openvino", "deploy").Core()
        return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return False


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
            self.frozen.enter_context(cache_weights(model))

    def run(self, images: np.ndarray) -> np.ndarray:
        with paddle.no_grad(), evaluation_mode(self.model):
            return self.model(paddle.to_tensor(check_images(images, self.sidecar))).numpy()

    def close(self) -> None:
        self.frozen.close()
        self.model = None


class PaddleBackend:
    """Paddle Inference: oneDNN on CPU, cuDNN on GPU."""

    name = "paddle"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        if not computes_in(self.name, precision):
            raise InputError(no_bfloat16(self.name))
        self.sidecar = sidecar
        try:
            config = inference.Config(str(path), str(path.with_name(PADDLE_WEIGHTS_FILE)))
            config.disable_glog_info()
            config.switch_ir_optim(True)
            if processes.on_gpu():
                self.predictor = gpu_predictor(config, precision)
            else:
                self.predictor = cpu_predictor(config, threads, precision)
        except (RuntimeError, ValueError, IndexError, OSError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise unreadable(path, "Paddle Inference", error) from None
        self.input = self.predictor.get_input_handle(self.predictor.get_input_names()[0])
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])

    def run(self, images: np.ndarray) -> np.ndarray:
        self.input.copy_from_cpu(check_images(images, self.sidecar))
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


def gpu_predictor(config, precision: str):
    """A predictor with cuDNN on the current GPU, of an `inference.Config`."""
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
    config.enable_use_gpu(256, device, types[precision])
    # Paddle's depthwise kernel accumulates in half precision; the names in both kinds of program.
    config.exp_disable_mixed_precision_ops({"depthwise_conv2d", "pd_op.depthwise_conv2d"})
    return inference.create_predictor(config)


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
