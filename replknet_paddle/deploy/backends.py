"""Ways to run a network: one interface, and a rule that chooses among those installed.

    backend = open_backend("exported")       # a folder that replknet export wrote
    logits = backend.run(images)             # float32 (N, 3, H, W) -> float32 (N, num_classes)

Each backend opens one format of export, or a network in memory, which it then exports to a
temporary place. docs/deployment.md has the measurements behind `CPU_ORDER`.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import paddle
from paddle import nn

from replknet_paddle.checkpoints.convert import load_pretrained
from replknet_paddle.checkpoints.run_folder import run_config_file, weights_of
from replknet_paddle.config import get_config
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.deploy.export import (
    ONNX_MODEL_FILE,
    PADDLE_MODEL_FILES,
    PADDLE_WEIGHTS_FILE,
    write_model,
)
from replknet_paddle.deploy.extras import REQUIREMENTS, import_extra, is_installed
from replknet_paddle.deploy.runtimes import (
    OPENERS,
    Backend,
    DygraphBackend,
    computes_in,
    no_bfloat16,
)
from replknet_paddle.deploy.sidecar import AGAIN, FILE, PRECISIONS, Sidecar
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.ops import use_fast_depthwise_conv, use_fast_pointwise_conv
from replknet_paddle.runtime.cores import core_share
from replknet_paddle.runtime.errors import InputError

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
    build: Callable = build_replknet,
) -> Backend:
    """Get a network ready to run.

    Args:
        source: an export folder; or a checkpoint or run folder; or a network, which keeps its
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
        build: config -> the network of a checkpoint.

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
    if isinstance(source, nn.Layer):
        if config is None:
            raise ValueError("a network needs its config")
        model = source
    elif is_export(source):
        return _open_export(Path(source), name, threads, precision)
    else:
        model, config = load_network(source, config, build)
    return _open_network(model, config, name, threads, precision or "fp32", class_names)


def is_export(source) -> bool:
    """Whether a path is an export folder: any folder that is no run folder is meant as one."""
    folder = Path(source)
    return folder.is_dir() and ((folder / FILE).exists() or not (folder / "config.yaml").exists())


def load_network(source, config=None, build: Callable = build_replknet) -> tuple[nn.Layer, object]:
    """The network of a checkpoint or run folder with its weights, and its configuration.

    Args:
        config: instead of that of the run folder.
        build: config -> the network.

    Raises:
        FileNotFoundError, InputError: there is none, or it does not fit.
    """
    config = get_config(run_config_file(source)) if config is None else config
    if config.MODEL.TYPE != "RepLKNet" and build is build_replknet:
        raise InputError(f"{source} is a segmentation network; `replknet segment predict` runs it")
    model = build(config)
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
    return OPENERS[name](path, sidecar, threads, precision or sidecar.precision)


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
        return OPENERS[name](path, sidecar, threads, precision)


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


class BackendLayer(nn.Layer):
    """A backend in the place of a network: tensor (N, 3, H, W) -> tensor of logits."""

    def __init__(self, backend: Backend):
        super().__init__()
        self.backend = backend

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(self.backend.run(images.numpy()))


def open_for_evaluation(config, name: str, build: Callable = build_replknet) -> nn.Layer:
    """What `-eval -backend NAME` evaluates: MODEL.PRETRAINED, a checkpoint or an export folder.

    Args:
        build: config -> the network of a checkpoint.

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
            for key in ("architecture", "num_classes", "preprocessing", "segmentation")
            if getattr(given, key) != getattr(wanted, key)
        ]
        if differ:
            raise InputError(f"{source} is not of this configuration: {'; '.join(differ)}")
        config = None
    backend = open_backend(source, name, config=config, build=build)
    logger.info("evaluating on backend %s, %s", backend.name, backend.sidecar.precision)
    return BackendLayer(backend)
