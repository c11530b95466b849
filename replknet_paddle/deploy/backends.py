"""Ways to run a network: one interface, and `auto`, which takes the fastest of those installed.

    backend = open_backend("exported")       # a folder that replknet export wrote
    logits = backend.run(images)             # float32 (N, 3, H, W) -> float32 (N, num_classes)

Each backend opens one format of export, or a network in memory, which it then exports to a
temporary place.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import paddle
from paddle import nn

from replknet_paddle.checkpoints.checkpoint_file import CheckpointFile
from replknet_paddle.checkpoints.load import load_pretrained
from replknet_paddle.checkpoints.run_folder import checkpoint_path, run_config_file
from replknet_paddle.config import check_class_count, get_config
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.deploy.auto import open_fastest
from replknet_paddle.deploy.export import (
    ONNX_MODEL_FILE,
    PADDLE_MODEL_FILES,
    PADDLE_WEIGHTS_FILE,
    write_model,
)
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
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.machines import core_share
from replknet_paddle.runtime.packages import import_extra, install_command, is_installed

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
# What `auto` chooses from, by precision. Eager mode is slower than the fastest of them, and changes
# the network that it is given.
CPU_BACKENDS = {
    "fp32": ("openvino", "paddle", "onnxruntime"),
    "fp16": ("openvino", "onnxruntime"),
    "bf16": ("openvino", "paddle"),
    "int8": ("openvino", "onnxruntime"),
}
GPU_BACKENDS = {"fp32": ("paddle",), "fp16": ("paddle",), "bf16": ("paddle",), "int8": ()}


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
    batch_size: int = 1,
    build: Callable = build_replknet,
) -> Backend:
    """Get a network ready to run.

    Args:
        source: an export folder; or a checkpoint or run folder; or a network, which keeps its
            mode and its numbers. `dygraph` runs this very network: its convolutions become the
            compiled operators where MODEL.CONV_IMPL says so.
        name: a backend, or `auto` for the fastest installed one that can run `source`, which is
            measured the first time (deploy/auto.py).
        config: of a network, or of a checkpoint that does not lie in its run folder.
        threads: that compute, on CPU; None for the cores that this process may use, divided among
            the processes of the run on this machine. Without effect on `dygraph`, whose compiled
            operators take their number from LARGE_KERNEL_THREADS, and Paddle's own from
            OMP_NUM_THREADS, when they start.
        precision: to compute in; None for what the export was made for, or fp32. An export made
            for fp32 also runs in `bf16`.
        class_names: of a network or checkpoint; None for those that it brings, or that its config
            names.
        batch_size: images that `run` will get at once, for `auto` to measure with.
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
        return _open_export(Path(source), name, threads, precision, batch_size)
    else:
        model, config = load_network(source, config, build)
    precision = precision or "fp32"
    check_network_precision(precision, name)
    if class_names is None:
        class_names = getattr(model, "class_names", None) or get_class_names(config)
    sidecar = Sidecar.build(config, format="paddle", precision=precision, class_names=class_names)
    if name == "dygraph":
        use_fast_convolutions(model, config)
        return DygraphBackend(model, sidecar, is_owner=not isinstance(source, nn.Layer))
    return _open_network(model, sidecar, name, threads, batch_size)


def is_export(source) -> bool:
    """Whether a path is an export folder: any folder that is not a run folder counts as one."""
    folder = Path(source)
    return folder.is_dir() and ((folder / FILE).exists() or not (folder / "config.yaml").exists())


def load_network(source, config=None, build: Callable = build_replknet) -> tuple[nn.Layer, object]:
    """The network of a checkpoint or run folder with its weights, and its configuration.

    The network has the names of its classes, or None, as `class_names`.

    Args:
        config: instead of that of the run folder.
        build: config -> the network.

    Raises:
        FileNotFoundError, InputError: there is none, or it does not fit.
    """
    config = get_config(run_config_file(source)) if config is None else config
    if config.MODEL.TYPE != "RepLKNet" and build is build_replknet:
        raise InputError(f"{source} is a segmentation network; `replknet segment predict` runs it")
    check_class_count(config)
    model = build(config)
    file = CheckpointFile(checkpoint_path(source))
    load_pretrained(model, file, weights=config.MODEL.PRETRAINED_WEIGHTS)
    model.eval()
    model.class_names = get_class_names(config, file.classes.names_for(config))
    return model, config


def _open_export(
    folder: Path, name: str, threads: int, precision: str | None, batch_size: int
) -> Backend:
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
    precision = precision or sidecar.precision
    sidecar.verify(folder)
    readers = [reader for reader, format in FORMAT.items() if format == sidecar.format]
    if name not in ("auto", *readers):
        raise InputError(
            f"{folder} is an export of format {sidecar.format}, which backend {name} does not "
            f"open; allowed: auto, {', '.join(readers)}"
        )
    names = candidates(readers, precision) if name == "auto" else [name]
    path = model_path(folder, sidecar, sidecar.files)

    def open_one(backend: str) -> Backend:
        return OPENERS[backend](path, sidecar, threads, precision)

    if name != "auto":
        return open_one(name)
    facts = {
        "network": [sidecar.architecture, sidecar.num_classes, sidecar.precision],
        "bytes": path.stat().st_size,
        "image_size": sidecar.preprocessing.image_size,
        "precision": precision,
        "threads": threads,
    }
    return open_fastest(names, open_one, facts=facts, batch_size=batch_size)


def _open_network(
    model: RepLKNet, sidecar: Sidecar, name: str, threads: int, batch_size: int
) -> Backend:
    precision = sidecar.precision
    names = candidates(list(FORMAT), precision) if name == "auto" else [name]
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder:

        def open_one(backend: str) -> Backend:
            for package in PACKAGES[backend]:
                import_extra(package, "deploy")
            written = replace(sidecar, format=FORMAT[backend])
            target = Path(folder, written.format)
            if not target.exists():
                target.mkdir()
                write_model(model, target, format=written.format, precision=precision)
            path = model_path(target, written, os.listdir(target))
            return OPENERS[backend](path, written, threads, precision)

        if name != "auto":
            return open_one(name)
        shapes = sorted((key, list(value.shape)) for key, value in model.state_dict().items())
        facts = {
            "network": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
            "image_size": sidecar.preprocessing.image_size,
            "precision": precision,
            "threads": threads,
        }
        return open_fastest(names, open_one, facts=facts, batch_size=batch_size)


def check_network_precision(precision: str, name: str) -> None:
    """Raise InputError for a precision that backend `name` does not run networks in memory in."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision}; allowed: {', '.join(PRECISIONS)}")
    if precision == "int8":
        raise InputError(
            "precision int8 needs images to calibrate it with; replknet export "
            "-format onnx -precision int8 makes an export that runs in it"
        )
    if name == "dygraph" and precision != "fp32":
        raise InputError(f"precision {precision} with backend dygraph; allowed: fp32")


def use_fast_convolutions(model: RepLKNet, config) -> None:
    """Let a network compute in eager mode as MODEL.CONV_IMPL says, in place."""
    use_fast_depthwise_conv(
        model, config.MODEL.CONV_IMPL, memory_bytes=config.MODEL.CONV_MEMORY_MB * 2**20
    )
    use_fast_pointwise_conv(model, config.MODEL.CONV_IMPL)


def candidates(readers: list[str], precision: str) -> list[str]:
    """The backends of `readers` that are installed and compute in this precision here.

    Raises:
        InputError: there is none; the message has the pip command.
    """
    on_gpu = paddle.device.get_device().startswith("gpu")
    able = [name for name in GPU_BACKENDS[precision] if on_gpu and name in readers]
    if able:
        return able
    able = [name for name in CPU_BACKENDS[precision] if name in readers]
    if not able:
        raise InputError(
            f"precision {precision} in this format runs on a GPU alone, and Paddle uses none here; "
            "replknet export makes other exports"
        )
    installed = [name for name in able if name in installed_backends()]
    if not installed:
        raise InputError(
            f"no backend for this is installed ({' or '.join(able)}); {install_command('deploy')}"
        )
    computing = [name for name in installed if computes_in(name, precision)]
    if not computing:
        raise InputError(no_bfloat16(installed[0]))
    return computing


def model_path(folder: Path, sidecar: Sidecar, files: Iterable[str]) -> Path:
    """The ONNX file or the Paddle program among the `files` of an export folder.

    Raises:
        InputError: they are not those of the export's format.
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
    return folder / found[0]


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
    batch_size = config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
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
    backend = open_backend(source, name, config=config, batch_size=batch_size, build=build)
    logger.info("evaluating on backend %s, %s", backend.name, backend.sidecar.precision)
    return BackendLayer(backend)
