"""Ways to run a network: one interface, and a rule that chooses among those installed.

    backend = open_backend("exported")       # a folder that replknet export wrote
    logits = backend.run(images)             # float32 (N, 3, H, W) -> float32 (N, num_classes)

Each backend opens one format of export, or a network in memory, which it then exports to a
temporary place. docs/deployment.md has the measurements behind `CPU_ORDER`.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import paddle
from paddle import inference, nn

from replknet_paddle.config import get_config
from replknet_paddle.data.dataset import get_class_names
from replknet_paddle.deploy.export import (
    ONNX_MODEL_FILE,
    PADDLE_MODEL_FILES,
    PADDLE_WEIGHTS_FILE,
    write_model,
)
from replknet_paddle.deploy.extras import REQUIREMENTS, import_extra, is_installed
from replknet_paddle.deploy.onnx_graph import INPUT
from replknet_paddle.deploy.sidecar import AGAIN, FILE, PRECISIONS, Sidecar
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.ops import core_share, use_fast_depthwise_conv, use_fast_pointwise_conv
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.checkpoints.convert import load_pretrained
from replknet_paddle.checkpoints.run_folder import run_config_file, weights_of

logger = logging.getLogger(__name__)

# Which packages each backend needs, the network being in memory.
PACKAGES = {
    "dygraph": (),
    "paddle": (),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
}
# What each opens besides a network in memory.
FORMAT = {"paddle": "paddle", "onnxruntime": "onnx", "openvino": "onnx"}
# `auto`: the fastest first, as measured; dygraph is some ten times slower than the last of them.
CPU_ORDER = {
    "fp32": ("openvino", "paddle", "onnxruntime"),
    "fp16": ("openvino", "onnxruntime"),
    "bf16": ("openvino", "paddle"),
    "int8": ("openvino", "onnxruntime"),
}
GPU_ORDER = {"fp32": ("paddle",), "fp16": ("paddle",), "bf16": ("paddle",), "int8": ()}

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
        """Images float32 (N, 3, H, W) -> logits float32 (N, num_classes).

        Raises:
            InputError: another shape or type.
        """

    def close(self) -> None:
        """Give the memory back; `run` must not be called any more."""


def installed_backends() -> list[str]:
    """Names of the backends that can run here."""
    return [name for name, needs in PACKAGES.items() if all(map(is_installed, needs))]


def open_backend(
    source,
    name: str = "auto",
    *,
    config=None,
    threads: int | None = None,
    precision: str | None = None,
    class_names: list[str] | None = None,
) -> Backend:
    """Get a network ready to run.

    Args:
        source: an export folder; or a checkpoint or run folder; or a `RepLKNet`, which keeps its
            mode and its numbers. `dygraph` runs this very network: its convolutions become the
            compiled operators where MODEL.CONV_IMPL says so.
        name: a backend, or `auto` for the fastest installed one that can run `source`.
        config: of a network, or of a checkpoint that does not lie in its run folder.
        threads: that compute, on CPU; None for the cores that this process may use, divided among
            the processes of the run on this machine. Without effect on `dygraph`, whose compiled
            operators take their number from LARGE_KERNEL_THREADS, and Paddle's own from
            OMP_NUM_THREADS, when they start.
        precision: to compute in; None for what the export was made for, or fp32. An export made
            for fp32 also runs in `bf16`.
        class_names: of a network or checkpoint; None for those that its config names.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        InputError: it cannot be run so; the message says what can be done.
    """
    if name not in ("auto", *PACKAGES):
        raise InputError(f"backend {name!r}; allowed: auto, {', '.join(PACKAGES)}")
    if threads is None:
        threads = core_share()
    if threads < 1:
        raise InputError(f"threads is {threads}; allowed: an integer >= 1")
    if isinstance(source, RepLKNet):
        if config is None:
            raise ValueError("a network needs its config")
        model = source
    elif is_export(source):
        return _open_export(Path(source), name, threads, precision)
    else:
        model, config = load_network(source, config)
    return _open_network(model, config, name, threads, precision or "fp32", class_names)


def is_export(source) -> bool:
    """Whether a path is an export folder: any folder that is no run folder is meant as one."""
    folder = Path(source)
    return folder.is_dir() and ((folder / FILE).exists() or not (folder / "config.yaml").exists())


def load_network(source, config=None) -> tuple[RepLKNet, object]:
    """The network of a checkpoint or run folder with its weights, and its configuration.

    Args:
        config: instead of that of the run folder.

    Raises:
        FileNotFoundError, InputError: there is none, or it does not fit.
    """
    config = get_config(run_config_file(source)) if config is None else config
    model = build_replknet(config)
    load_pretrained(model, weights_of(source), weights=config.MODEL.PRETRAINED_WEIGHTS)
    model.eval()
    return model, config


def _open_export(folder: Path, name: str, threads: int, precision: str | None) -> Backend:
    sidecar = Sidecar.read(folder)
    if precision not in (None, sidecar.precision) and (sidecar.precision, precision) != (
        "fp32",
        "bf16",
    ):
        raise InputError(
            f"precision {precision} of {folder}, an export made for {sidecar.precision}; allowed: "
            f"{sidecar.precision}{' or bf16' if sidecar.precision == 'fp32' else ''}; "
            "replknet export makes others"
        )
    sidecar.verify(folder)
    readers = [reader for reader, format in FORMAT.items() if format == sidecar.format]
    if name == "auto":
        name = choose(readers, precision or sidecar.precision)
    elif name not in readers:
        raise InputError(
            f"{folder} is an export of format {sidecar.format}, which backend {name} does not "
            f"open; allowed: auto, {', '.join(readers)}"
        )
    path = model_path(folder, sidecar, sidecar.files)
    return _OPENERS[name](path, sidecar, threads, precision or sidecar.precision)


def _open_network(model, config, name, threads, precision, class_names) -> Backend:
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision}; allowed: {', '.join(PRECISIONS)}")
    if precision == "int8":
        raise InputError(
            "precision int8 needs images to calibrate it with; replknet export "
            "-format onnx -precision int8 makes an export that runs in it"
        )
    if name == "auto":
        name = choose(list(PACKAGES), precision)
    format = FORMAT.get(name, "paddle")
    if class_names is None:
        class_names = get_class_names(config)
    sidecar = Sidecar.build(config, format=format, precision=precision, class_names=class_names)
    if name == "dygraph":
        if precision != "fp32":
            raise InputError(f"precision {precision} with backend dygraph; allowed: fp32")
        use_fast_convolutions(model, config)
        return DygraphBackend(model, sidecar)
    for package in PACKAGES[name]:
        import_extra(package)
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder:
        write_model(model, Path(folder), format=format, precision=precision)
        path = model_path(Path(folder), sidecar, os.listdir(folder))
        return _OPENERS[name](path, sidecar, threads, precision)


def use_fast_convolutions(model: RepLKNet, config) -> None:
    """Let a network compute in eager mode as MODEL.CONV_IMPL says, in place."""
    use_fast_depthwise_conv(model, config.MODEL.CONV_IMPL)
    use_fast_pointwise_conv(model, config.MODEL.CONV_IMPL)


def choose(candidates: list[str], precision: str) -> str:
    """The first one of the order for this device and precision that is a candidate and installed.

    Raises:
        InputError: there is none; the message has the pip command.
    """
    on_gpu = paddle.device.get_device().startswith("gpu")
    order = [name for name in GPU_ORDER[precision] if on_gpu and name in candidates]
    device = "GPU" if order else "CPU"
    order = order or [name for name in CPU_ORDER[precision] if name in candidates]
    installed = installed_backends()
    unable = [name for name in order if name in installed and not computes_in(name, precision)]
    for name in order:
        if name in installed and name not in unable:
            logger.info(
                "backend %s: the first installed one of %s for %s on %s",
                name,
                ", ".join(order),
                precision,
                device,
            )
            return name
    if not order:
        raise InputError(
            f"precision {precision} in this format runs on a GPU alone, and Paddle uses none here; "
            "replknet export makes other exports"
        )
    if unable:
        raise InputError(no_bfloat16(unable[0]))
    raise InputError(
        f"no backend for this is installed ({' or '.join(order)}); pip install -r {REQUIREMENTS}"
    )


def computes_in(name: str, precision: str) -> bool:
    """Whether an installed backend of `CPU_ORDER` computes in this precision on this processor.

    Paddle itself computes in float32 where the processor has no bfloat16.
    """
    if (name, precision) != ("openvino", "bf16"):
        return True
    capabilities = import_extra("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities


def no_bfloat16(name: str) -> str:
    """What to say where `computes_in` says no."""
    return (
        f"precision bf16 with backend {name} on a processor that does not compute in bfloat16 "
        "(AVX512-BF16 or AMX); allowed here: another precision; replknet export makes "
        "exports in others"
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
    """Paddle's eager mode on the network as it is."""

    name = "dygraph"

    def __init__(self, model: RepLKNet, sidecar: Sidecar):
        self.sidecar = sidecar
        self.model = model

    def run(self, images: np.ndarray) -> np.ndarray:
        with paddle.no_grad(), evaluation_mode(self.model):
            return self.model(paddle.to_tensor(check_images(images, self.sidecar))).numpy()

    def close(self) -> None:
        self.model = None


class PaddleBackend:
    """Paddle Inference: oneDNN on CPU; on GPU with TensorRT where Paddle has it."""

    name = "paddle"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        self.sidecar = sidecar
        self.prepared = None  # largest batch and image side that TensorRT is prepared for

        def settings():
            config = inference.Config(str(path), str(path.with_name(PADDLE_WEIGHTS_FILE)))
            config.disable_glog_info()
            config.switch_ir_optim(True)
            return config

        try:
            if paddle.device.get_device().startswith("gpu"):
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

    has_tensorrt = (
        paddle.__version__.startswith("2.")
        and precision != "bf16"
        and any(inference.get_trt_compile_version())
        and any(inference.get_trt_runtime_version())
    )
    if has_tensorrt:
        try:
            return predictor(tensorrt=True), (TENSORRT_BATCH, size)
        except (RuntimeError, ValueError) as error:
            logger.warning("without TensorRT, which does not take this network: %s", error)
    return predictor(tensorrt=False), None


class OnnxRuntimeBackend:
    """ONNX Runtime on CPU."""

    name = "onnxruntime"

    def __init__(self, path: Path, sidecar: Sidecar, threads: int, precision: str):
        onnxruntime = import_extra("onnxruntime")
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
        openvino = import_extra("openvino")
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


_OPENERS = {
    "paddle": PaddleBackend,
    "onnxruntime": OnnxRuntimeBackend,
    "openvino": OpenVinoBackend,
}


def model_path(folder: Path, sidecar: Sidecar, files: Iterable[str]) -> Path:
    """The ONNX file or the Paddle program among the `files` of an export folder.

    Raises:
        InputError: they are not those of the export's format, or this Paddle cannot read them.
    """
    programs = (ONNX_MODEL_FILE,) if sidecar.format == "onnx" else PADDLE_MODEL_FILES
    others = () if sidecar.format == "onnx" else (PADDLE_WEIGHTS_FILE,)
    found = [name for name in programs if name in files]
    if len(found) != 1 or not set(others) <= set(files):
        wanted = " and ".join([" or ".join(programs), *others])
        raise InputError(
            f"{folder / FILE} lists {', '.join(sorted(files)) or 'no files'}; an export of format "
            f"{sidecar.format} has {wanted}; {AGAIN}"
        )
    path = folder / found[0]
    if path.suffix == ".json" and paddle.__version__.startswith("2."):
        raise InputError(
            f"{path} was written by Paddle {sidecar.paddle_version}, and Paddle "
            f"{paddle.__version__} cannot read it; export it again with this Paddle, or use "
            "-format onnx, which all read"
        )
    return path


def unreadable(path: Path, program: str, error: Exception) -> InputError:
    """What to say of a model file that a program refuses."""
    reason = " ".join(str(error).split())[:300]
    return InputError(f"{program} cannot read {path}: {reason}; export it again")


class BackendLayer(nn.Layer):
    """A backend in the place of a network: tensor (N, 3, H, W) -> tensor (N, num_classes)."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(self.backend.run(images.numpy()))


def open_for_evaluation(config, name: str) -> nn.Layer:
    """What `-eval -backend NAME` evaluates: MODEL.PRETRAINED, a checkpoint or an export folder.

    Raises:
        FileNotFoundError, InputError: it cannot be opened so, or an export that is not of the
            network, or not preprocessed as, `config` says.
    """
    source = config.MODEL.PRETRAINED
    if source is None:
        raise InputError(f"-backend {name} without weights; name them by -pretrained")
    if is_export(source):
        given = Sidecar.read(source)
        wanted = Sidecar.build(config, format=given.format)
        differ = [
            f"{key} is {getattr(given, key)}, in the configuration {getattr(wanted, key)}"
            for key in ("architecture", "num_classes", "preprocessing")
            if getattr(given, key) != getattr(wanted, key)
        ]
        if differ:
            raise InputError(f"{source} is not of this configuration: {'; '.join(differ)}")
        config = None
    backend = open_backend(source, name, config=config)
    logger.info("evaluating on backend %s, %s", backend.name, backend.sidecar.precision)
    return BackendLayer(backend)
