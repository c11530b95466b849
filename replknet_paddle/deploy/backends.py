"""Ways to run a network: one interface, and `auto`, which takes the fastest of those installed.

    backend = open_backend("exported")       # a folder that replknet export wrote
    logits = backend.run(images)             # float32 (N, 3, H, W) -> float32 (N, num_classes)

There are Paddle's eager mode, Paddle Inference, ONNX Runtime and OpenVINO. Each but the first opens
one format of export, or a network in memory, which it then exports to a temporary place.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import inference, nn
from yacs.config import CfgNode

from replknet_paddle import zoo
from replknet_paddle.config import is_yaml
from replknet_paddle.data.class_names import get_class_names
from replknet_paddle.deploy.export import (
    AGAIN,
    FORMATS,
    MODEL_FILES,
    PRECISIONS,
    ModelInfo,
    differences,
    is_export,
    read_export,
    write_model,
)
from replknet_paddle.deploy.fold import random_images
from replknet_paddle.deploy.operators import check_operators
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import build_convolutions, cache_weights
from replknet_paddle.runtime import processes
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import cache_folder, locked, write_text
from replknet_paddle.runtime.machines import available_cores, core_share, processor_name
from replknet_paddle.runtime.packages import import_extra, install_command, is_installed
from replknet_paddle.zoo.records import ModelName

logger = logging.getLogger(__name__)


class Backend:
    """A network that is ready to run.

    Attributes:
        name: key of `BACKENDS`.
        info: what the network is.
        network: the one that runs, in Paddle's eager mode; else None.
    """

    def __init__(
        self,
        name: str,
        info: ModelInfo,
        compute: Callable[[np.ndarray], np.ndarray],
        close: Callable[[], object] = lambda: None,
        network: nn.Layer | None = None,
    ) -> None:
        self.name = name
        self.info = info
        self.network = network
        self._compute = compute
        self._close = close

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits, float32 (N, num_classes), or (N, num_classes, H, W) in segmentation,
        of images, float32 (N, 3, H, W); of a network without a head the features (N, C).

        Raises:
            InputError: images of another shape or type, or a model that has other classes.
        """
        logits = self._compute(check_images(images, self.info))
        model = self.info.config.MODEL
        count = model.NUM_CLASSES or model.CHANNELS[-1]
        if logits.shape[:2] != (len(images), count):
            raise InputError(
                f"the model gives outputs of shape {logits.shape}, which does not fit "
                f"MODEL.NUM_CLASSES {model.NUM_CLASSES}; {AGAIN}"
            )
        return logits

    def close(self) -> None:
        """Free the memory; `run` must not be called any more."""
        self._close()
        self._compute = None


def check_images(images: np.ndarray, info: ModelInfo) -> np.ndarray:
    """Return `images` as contiguous memory, if they are what `Backend.run` takes."""
    images = np.asarray(images)
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise InputError(
            f"images are {images.dtype} {images.shape}; allowed: float32 (N, 3, H, W), N >= 1"
        )
    side = info.config.DATA.IMAGE_SIZE
    if info.fixed_size and images.shape[2:] != (side, side):
        raise InputError(
            f"images of {images.shape[2]} x {images.shape[3]} pixels; this export takes "
            f"{side} x {side} alone"
        )
    return np.ascontiguousarray(images)


@contextlib.contextmanager
def evaluation_mode(network: nn.Layer) -> Iterator[None]:
    """Set evaluation mode for the block; afterwards each layer is in the mode it was in."""
    training = [layer for layer in network.sublayers(include_self=True) if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def open_eager(model: nn.Layer, info: ModelInfo, *, is_owner: bool = False) -> Backend:
    """Open Paddle's eager mode on `model`; its layers cache their weights if `is_owner`, that is,
    if nobody else changes them."""
    frozen = contextlib.ExitStack()
    if is_owner:
        frozen.enter_context(cache_weights(model))

    def compute(images: np.ndarray) -> np.ndarray:
        with paddle.no_grad(), evaluation_mode(model):
            return model(paddle.to_tensor(images)).numpy()

    return Backend("eager", info, compute, frozen.close, model)


# Each opens the model file at a path, and returns what computes float32 logits of float32 images.


def open_paddle(path: Path, threads: int, precision: str) -> Callable:
    """Open Paddle Inference: oneDNN on CPU, cuDNN on GPU."""
    config = inference.Config(str(path), str(path.with_suffix(".pdiparams")))
    config.disable_glog_info()
    config.switch_ir_optim(True)
    if processes.on_gpu():
        compute_on_gpu(config, precision)
    else:
        config.disable_gpu()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
        if precision == "bf16":
            config.enable_mkldnn_bfloat16()
    predictor = inference.create_predictor(config)
    given = predictor.get_input_handle(predictor.get_input_names()[0])
    result = predictor.get_output_handle(predictor.get_output_names()[0])

    def compute(images: np.ndarray) -> np.ndarray:
        given.copy_from_cpu(images)
        predictor.run()
        return result.copy_to_cpu().astype(np.float32, copy=False)

    return compute


def compute_on_gpu(config, precision: str) -> None:
    """Let an `inference.Config` compute by cuDNN on the current GPU."""
    types = {"fp32": "Float32", "fp16": "Half", "bf16": "Bfloat16"}
    device = int(paddle.device.get_device().partition(":")[2] or 0)
    config.enable_use_gpu(256, device, getattr(inference.PrecisionType, types[precision]))
    # Paddle's depthwise kernel accumulates in half precision; the names in both kinds of program.
    config.exp_disable_mixed_precision_ops({"depthwise_conv2d", "pd_op.depthwise_conv2d"})


def open_onnxruntime(path: Path, threads: int, precision: str) -> Callable:
    """Open ONNX Runtime on CPU."""
    onnxruntime = import_extra("onnxruntime", "deploy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def open_openvino(path: Path, threads: int, precision: str) -> Callable:
    """Open OpenVINO on CPU."""
    core = import_extra("openvino", "deploy").Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        # Of what it compiles for each input size. By default 5000, and memory grows for hours.
        "CPU_RUNTIME_CACHE_CAPACITY": 100,
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda images: compiled(images)[0]


class Kind(NamedTuple):
    """A row of `BACKENDS`."""

    title: str  # for messages
    opener: Callable | None  # of a model file
    format: str | None  # of the exports that it opens; None: networks in memory alone
    packages: tuple[str, ...]  # that it needs for a network in memory
    on_cpu: tuple[str, ...]  # precisions that it computes in; bf16 where the device does
    on_gpu: tuple[str, ...] = ()  # likewise; none: it computes on CPU there, too


ONNX = ("onnx", "onnxruntime")
BACKENDS = {
    "eager": Kind("Paddle", None, None, (), ("fp32",), ("fp32",)),
    "paddle": Kind(
        "Paddle Inference", open_paddle, "paddle", (), ("fp32", "bf16"), ("fp32", "fp16", "bf16")
    ),
    "onnxruntime": Kind("ONNX Runtime", open_onnxruntime, "onnx", ONNX, ("fp32", "fp16", "int8")),
    "openvino": Kind("OpenVINO", open_openvino, "onnx", ("onnx", "openvino"), PRECISIONS),
}
NAMES_OF_0_2 = {"dygraph": "eager"}  # still accepted
SMALLEST_SIDE = 32  # pixels, of images whose last map has one position


def installed_backends() -> list[str]:
    """Return the names of the backends that can run here."""
    return [name for name, kind in BACKENDS.items() if all(map(is_installed, kind.packages))]


def device_of(name: str) -> str:
    """Return the device that a backend computes on in this process, "gpu" or "cpu"."""
    return "gpu" if processes.on_gpu() and BACKENDS[name].on_gpu else "cpu"


def precisions_of(name: str) -> tuple[str, ...]:
    """Return the precisions that a backend computes in on that device."""
    return BACKENDS[name].on_gpu if device_of(name) == "gpu" else BACKENDS[name].on_cpu


def check_precision(name: str, precision: str) -> None:
    """Raise InputError where backend `name` does not compute in this precision here."""
    device = device_of(name)
    if precision not in precisions_of(name):
        raise InputError(
            f"precision {precision} with backend {name} on {device.upper()}; allowed: "
            f"{', '.join(precisions_of(name))}"
        )
    if precision == "bf16" and not processes.supports_bfloat16(device):
        device = {
            "gpu": "a GPU that does not compute in bfloat16 (compute capability below 8.0)",
            "cpu": "a processor that does not compute in bfloat16 (AVX512-BF16 or AMX)",
        }[device]
        raise InputError(
            f"precision bf16 with backend {name} on {device}; allowed here: another precision; "
            "replknet export makes exports in others"
        )


def candidates(formats: Sequence[str], precision: str) -> list[str]:
    """Return the installed backends that open one of `formats` and compute in `precision` here.

    Eager mode is not among them: it is slower than the fastest of them, and changes the network
    that it is given.
    """
    readers = [name for name in reversed(BACKENDS) if BACKENDS[name].format in formats]
    able = [name for name in readers if precision in precisions_of(name)]
    if not able:
        raise InputError(
            f"precision {precision} in this format runs on a GPU alone, and Paddle uses none here; "
            "replknet export makes other exports"
        )
    if processes.on_gpu() and "paddle" in able:
        able = ["paddle"]
    installed = [name for name in able if name in installed_backends()]
    if not installed:
        raise InputError(
            f"no backend for this is installed ({' or '.join(able)}); {install_command('deploy')}"
        )
    check_precision(installed[0], precision)
    return installed


def open_backend(
    source: str | os.PathLike[str] | nn.Layer,
    name: str = "auto",
    *,
    config: CfgNode | None = None,
    threads: int | None = None,
    precision: str | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 1,
    build: Callable[..., nn.Layer] | None = None,
) -> Backend:
    """Return `source` ready to run.

    Args:
        source: an export folder; a checkpoint, a run folder, the name of a published model, or a
            YAML file whose MODEL.PRETRAINED names one of these; or a network, which keeps its mode
            and its numbers. `eager` runs this very network: its convolutions become the compiled
            operators where MODEL.CONV_IMPL says so.
        name: a backend, or `auto` for the fastest installed one that can run `source`, which is
            measured the first time.
        config: instead of the one that `source` carries; exports keep theirs.
        threads: that compute, on CPU; None for the cores that this process may use, divided among
            the processes of the run on this machine. Without effect on `eager`, whose compiled
            operators take their number from LARGE_KERNEL_THREADS, and Paddle's own from
            OMP_NUM_THREADS, when they start.
        precision: to compute in; None for what the export was made for, or fp32. An export made
            for fp32 also runs in `bf16`.
        class_names: of a network or checkpoint; None for those that it brings, or that its config
            names.
        batch_size: images that `run` will get at once, for `auto` to measure with.
        build: as of `zoo.open_network`.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        InputError: it cannot be run so; the message says what can be done.
    """
    name = NAMES_OF_0_2.get(name, name)
    if name not in ("auto", *BACKENDS):
        raise InputError(f"backend {name!r}; allowed: auto, {', '.join(BACKENDS)}")
    threads = core_share() if threads is None else threads
    if threads < 1:
        raise InputError(f"threads is {threads}; allowed: an integer >= 1")
    is_network = isinstance(source, nn.Layer)
    if not is_network:
        check_is_there(source, with_config=config is not None)
    is_exported = not is_network and is_export(source)
    with contextlib.ExitStack() as stack:
        if is_exported:
            info = read_export(source)
            precision = exported_precision(source, info, name, precision)
            info.verify(source)
            path = info.model_path(Path(source))
            check_operators(path)
            path_for, formats, size = (lambda kind: path), [info.format], path.stat().st_size
        else:
            model = source
            if not is_network:
                has_own = config is None or is_yaml(source)  # its MODEL.PRETRAINED
                pretrained = True if has_own else source
                model = zoo.open_network(config or source, pretrained=pretrained, build=build)
            config = config or getattr(model, "config", None)
            if config is None:
                raise InputError(
                    "this network was built without a configuration, which has its preprocessing; "
                    "allowed: networks of build_replknet(config) and of zoo.get_model"
                )
            precision = precision or "fp32"
            info = info_of_network(model, config, precision, class_names)
            if name == "eager":
                check_precision(name, precision)
                build_convolutions(model, config)
                return open_eager(model, info, is_owner=not is_network)
            path_for, formats = stack.enter_context(temporary_exports(model, info)), FORMATS
            size = sum(int(value.size) for value in model.state_dict().values())

        def open_one(backend: str) -> Backend:
            check_precision(backend, precision)
            kind = BACKENDS[backend]
            path = path_for(kind)
            try:
                opened = Backend(backend, info, kind.opener(path, threads, precision))
                if is_exported:  # its outputs, not its files, say how many classes there are
                    side = info.config.DATA.IMAGE_SIZE if info.fixed_size else SMALLEST_SIDE
                    opened.run(np.zeros((1, 3, side, side), np.float32))
                return opened
            except InputError:
                raise
            except Exception as error:  # whatever a program says of a file that it cannot run
                reason = " ".join(str(error).split())[:300]
                raise InputError(
                    f"{kind.title} cannot run {path}: {reason}; export it again"
                ) from None

        if name != "auto":
            return open_one(name)
        facts = {
            "network": [info.config.MODEL.NAME, info.config.MODEL.NUM_CLASSES, size],
            "image_size": info.config.DATA.IMAGE_SIZE,
            "precision": precision,
            "threads": threads,
        }
        return open_fastest(candidates(formats, precision), open_one, facts, batch_size)


def exported_precision(folder, info: ModelInfo, name: str, precision: str | None) -> str:
    """Return the precision to run an export in on backend `name`."""
    allowed = {"fp32": ("fp32", "bf16")}.get(info.precision, (info.precision,))
    if precision not in (None, *allowed):
        raise InputError(
            f"precision {precision} of {folder}, an export made for {info.precision}; allowed: "
            f"{' or '.join(allowed)}; replknet export makes others"
        )
    readers = [reader for reader, kind in BACKENDS.items() if kind.format == info.format]
    if name not in ("auto", *readers):
        raise InputError(
            f"{folder} is an export of format {info.format}, which backend {name} does not "
            f"open; allowed: auto, {', '.join(readers)}"
        )
    return precision or info.precision


def info_of_network(model: nn.Layer, config, precision: str, names) -> ModelInfo:
    """Return what a network in memory is, which runs in every precision but INT8."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision}; allowed: {', '.join(PRECISIONS)}")
    if precision == "int8":
        raise InputError(
            "precision int8 needs images to calibrate it with; replknet export "
            "-format onnx -precision int8 makes an export that runs in it"
        )
    if names is None:
        names = get_class_names(config, getattr(model, "class_names", None))
    return ModelInfo(config, precision=precision, class_names=names and tuple(names))


@contextlib.contextmanager
def temporary_exports(model: nn.Layer, info: ModelInfo) -> Iterator[Callable[[Kind], Path]]:
    """Give what exports a network for a kind of backend, once, and returns the file to open."""
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder:

        def path_for(kind: Kind) -> Path:
            for package in kind.packages:
                import_extra(package, "deploy")
            target = Path(folder, kind.format)
            if not target.exists():
                target.mkdir()
                write_model(model, target, replace(info, format=kind.format))
            return target / MODEL_FILES[kind.format][0][0]

        yield path_for


def check_is_there(source: str | os.PathLike, *, with_config: bool) -> None:
    """Raise FileNotFoundError where nothing is called `source`, and InputError where it brings its
    configuration and gets another one."""
    is_published = zoo.is_published(source)
    if is_published or is_yaml(source):
        return
    if not os.path.exists(source):
        raise FileNotFoundError(zoo.no_model(source))
    if with_config and is_export(source):
        raise InputError(
            f"a configuration (-cfg, -opts) for {source}, an export, which is as it was made; "
            "allowed: for checkpoints, run folders and published models"
        )


# `auto`. For RepLKNet-31B on a CPU the backends are within a third of each other, for a network of
# a few megabytes one can be ten times as fast as the next. So they run by turns for some seconds,
# and the result is kept in the user's cache.
MEASURED_FOLDER = "fastest_backend"  # in the cache
LARGEST_BATCH = 8  # larger batches keep the ratios of this one
ROUNDS = 5
MAX_SECONDS = 15  # after which no further round begins
TURN_SECONDS = 0.05  # at least, of each candidate in each round
# Intel's OpenMP, which Paddle brings, lets idle threads spin for 0.2 s.
SETTLE_SECONDS = 0.25


def open_fastest(
    names: Sequence[str], open_one: Callable[[str], Backend], facts: dict, batch_size: int
) -> Backend:
    """Open the fastest of the installed backends `names`."""
    if len(names) == 1:
        logger.info("backend %s: the only installed one that runs this", names[0])
        return open_one(names[0])
    images = random_images(min(batch_size, LARGEST_BATCH), facts["image_size"])
    facts = {
        **facts,
        "batch_size": len(images),
        "processor": processor_name(),
        "cores": available_cores(),
        "versions": {name: version(name) for name in names},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / MEASURED_FOLDER / f"{key}.json"
    with contextlib.ExitStack() as stack:  # one process of a run measures, the others wait for it
        with contextlib.suppress(OSError):  # a cache that cannot be written is done without
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path.parent / "lock"))
        # A file that is not there, or that something else has written, is measured anew.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            milliseconds = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
            fastest = min(set(milliseconds) & set(names), key=milliseconds.get)
            logger.info("backend %s: the fastest when it was measured (%s)", fastest, path)
            return open_one(fastest)
        logger.info(
            "measuring %s on batches of %d once; the result is remembered",
            ", ".join(names),
            len(images),
        )
        opened, milliseconds = measure(names, open_one, images)
        try:
            content = {"facts": facts, "milliseconds": milliseconds}
            write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logger.warning("the measurement is not remembered: %s", error)
    fastest = min(milliseconds, key=milliseconds.get)
    logger.info(
        "backend %s: the fastest of %s",
        fastest,
        ", ".join(f"{name} {value:.3g} ms" for name, value in milliseconds.items()),
    )
    for name in opened.keys() - {fastest}:
        opened[name].close()
    return opened[fastest]


def measure(
    names: Sequence[str], open_one: Callable[[str], Backend], images: np.ndarray
) -> tuple[dict[str, Backend], dict[str, float]]:
    """Open backends, and return them and the milliseconds of a run of each that runs.

    They run by turns, and the best round of each counts.
    """
    opened, best = {}, dict.fromkeys(names, float("inf"))
    end = time.monotonic() + MAX_SECONDS
    for _ in range(ROUNDS):
        for name in list(best):
            try:
                if name not in opened:
                    opened[name] = open_one(name)
                time.sleep(SETTLE_SECONDS)
                opened[name].run(images)  # not timed
                count, start, seconds = 0, time.perf_counter(), 0.0
                while count == 0 or seconds < TURN_SECONDS:
                    opened[name].run(images)
                    count, seconds = count + 1, time.perf_counter() - start
                best[name] = min(best[name], 1e3 * seconds / count)
            except Exception as error:  # whatever a backend raises, the others can run
                logger.warning("backend %s is left out: %s", name, error)
                del best[name]
        if not best:
            raise InputError("no backend runs this network; the warnings above say why")
        if time.monotonic() > end:
            break
    return opened, best


def version(name: str) -> str:
    """Return the version of a backend's package."""
    return paddle.__version__ if name == "paddle" else metadata.version(name)


class BackendLayer(nn.Layer):
    """A backend in the place of a network: tensor (N, 3, H, W) -> tensor of logits."""

    config: CfgNode
    class_names: Sequence[str] | None

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, images: paddle.Tensor) -> paddle.Tensor:
        return paddle.to_tensor(self.backend.run(images.numpy()))


@overload
def get_model(
    name: ModelName,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    weights: str = "auto",
    **overrides: Any,
) -> RepLKNet: ...
@overload
def get_model(
    name: str | os.PathLike[str] | CfgNode,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    drop_path_rate: float | None = None,
    weights: str = "auto",
    **overrides: Any,
) -> RepLKNet | BackendLayer: ...
def get_model(name: str | os.PathLike[str] | CfgNode, **options: Any) -> RepLKNet | BackendLayer:
    """Return what `zoo.get_model` returns or, for an export folder, a layer that runs it.

    The layer takes and gives what the network does, on the fastest backend that is installed. It
    has the network's `config` and `class_names`, and no parameters.

    Args:
        name: an export folder, or as for `zoo.get_model`.
        options: of `zoo.get_model`; an export has none.

    Raises:
        FileNotFoundError, InputError: as `zoo.get_model` and `open_backend`.
    """
    is_path = isinstance(name, (str, os.PathLike)) and not zoo.is_published(name)
    if not is_path or not is_export(name):
        return zoo.get_model(name, **options)
    if options:
        raise InputError(f"{', '.join(options)} of {name}, an export, which is as it was made")
    layer = BackendLayer(open_backend(name))
    layer.eval()
    layer.config, layer.class_names = layer.backend.info.config, layer.backend.info.class_names
    return layer


def open_for_evaluation(config, name: str, build: Callable | None = None) -> nn.Layer:
    """Open what `-eval -backend NAME` evaluates: MODEL.PRETRAINED, a checkpoint or an export."""
    source = config.MODEL.PRETRAINED
    batch_size = config.DATA.BATCH_SIZE_EVAL or config.DATA.BATCH_SIZE
    if is_export(source):
        differ = differences(read_export(source), config)
        if differ:
            raise InputError(f"{source} is not of this configuration: {'; '.join(differ)}")
        config = None
    backend = open_backend(source, name, config=config, batch_size=batch_size, build=build)
    logger.info("evaluating on backend %s, %s", backend.name, backend.info.precision)
    return BackendLayer(backend)
