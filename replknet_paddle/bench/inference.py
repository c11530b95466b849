"""How fast a network runs on every backend, in every precision, side by side in one run."""

import contextlib
import gc
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.bench.inference_chart import chart_suffixes, draw_chart
from replknet_paddle.bench.timing import check_counts, describe_machine, summarize, time_in_turn
from replknet_paddle.deploy.backends import (
    BACKENDS,
    Backend,
    installed_backends,
    load_network,
    open_backend,
    open_eager,
)
from replknet_paddle.deploy.export import (
    PRECISIONS,
    ModelInfo,
    export_model,
    write_paddle_model,
    write_record,
)
from replknet_paddle.deploy.fold import largest_deviation, random_images
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import check_file_target, written_whole

# What there is to time besides eager mode, as (backend, precision); fp16 on GPU alone.
CANDIDATES = (
    ("paddle", "fp32"),
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("paddle", "bf16"),
    ("paddle", "fp16"),
    ("openvino", "int8"),
    ("onnxruntime", "int8"),
)
EAGER = ("dygraph", "trained", "fp32")
# Eager mode takes about as long for one run as the others for twenty.
DYGRAPH_ROUNDS = 3
# Intel's OpenMP, which Paddle brings, lets idle threads spin for 0.2 s.
SETTLE_SECONDS = 0.3
MEASURED_PACKAGES = ("onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Row:
    """One backend, precision and batch size.

    Attributes:
        network: `trained`, as the checkpoint has it, or `folded`.
        median_ms, min_ms, max_ms: of one batch.
        images_per_second: at the median.
        runs: how many were timed.
        deviation: largest difference of logits from eager float32, relative to the largest logit.
    """

    backend: str
    network: str
    precision: str
    batch: int
    median_ms: float
    min_ms: float
    max_ms: float
    images_per_second: float
    runs: int
    deviation: float


@dataclass(frozen=True)
class Plan:
    """What to time.

    Attributes:
        backends: names; None for all that are installed.
        precisions: of `PRECISIONS`; eager mode runs in fp32 whatever they are.
        batch_sizes: images at once.
        threads: that compute; None for all cores of this process.
        rounds: how often each is timed.
    """

    backends: Sequence[str] | None = None
    precisions: Sequence[str] = PRECISIONS
    batch_sizes: Sequence[int] = (1, 8)
    threads: int | None = None
    rounds: int = 9

    def check(self) -> None:
        """Raise InputError for a name or number that is not allowed."""
        check_counts(
            rounds=self.rounds,
            batch_sizes=min(self.batch_sizes),
            threads=1 if self.threads is None else self.threads,
        )
        for flag, given, allowed in (
            ("--backends", self.backends or (), BACKENDS),
            ("--precisions", self.precisions, PRECISIONS),
        ):
            unknown = sorted(set(given) - set(allowed))
            if unknown:
                raise InputError(f"{flag} {' '.join(unknown)}; allowed: {' '.join(allowed)}")

    def candidates(self) -> list[tuple[str, str]]:
        """The (backend, precision) to time besides eager mode."""
        backends = installed_backends() if self.backends is None else self.backends
        on_gpu = paddle.device.get_device().startswith("gpu")
        return [
            (backend, precision)
            for backend, precision in CANDIDATES
            if backend in backends
            and precision in self.precisions
            and (precision != "fp16" or on_gpu)
        ]


def report_inference(
    config, pretrained: str | None, plan: Plan, *, json_file: str | None, chart_file: str | None
) -> None:
    """Print how fast each backend runs a network, in each precision and batch size.

    Args:
        config: of the network.
        pretrained: checkpoint or run folder; None for random weights.
        json_file, chart_file: also write the figures, and a picture of them. What has been measured
            is written after each batch size.

    Raises:
        FileNotFoundError, InputError: something cannot be measured or written so.
    """
    if config.MODEL.OUT_INDICES is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone without a "
            "head; allowed: None"
        )
    plan.check()
    if json_file:
        check_file_target(json_file, [".json"])
    if chart_file:
        check_file_target(chart_file, chart_suffixes())
    size = config.DATA.IMAGE_SIZE
    if pretrained:
        model, _ = load_network(pretrained, config)
    else:
        paddle.seed(config.SEED)
        model = build_replknet(config)
        set_statistics(model, random_images(max(4, 2 * (256 // size) ** 2), size))
    print(machine())
    weights = pretrained or "random weights"
    title = f"{config.MODEL.NAME}, {size} x {size} pixels, {weights}"
    print(f"{title}, {plan.threads or 'all'} threads")

    def keep(rows: list[Row]) -> None:
        if json_file:
            write_json(json_file, rows, machine=machine(), network=title, threads=plan.threads)
        if chart_file:
            draw_chart(chart_file, rows, f"{title}\n{machine()}")

    rows = time_backends(model, config, plan, report=print, keep=keep)
    print(table(rows))


def set_statistics(model: RepLKNet, images: np.ndarray) -> None:
    """Give every batch norm of `model` the statistics of these images (N, 3, H, W).

    Those of a fresh network are 0 and 1, which make logits so large that no deviation says
    anything.
    """
    norms = [layer for layer in model.sublayers() if hasattr(layer, "_momentum")]
    momenta = [norm._momentum for norm in norms]
    for norm in norms:
        norm._momentum = 0.0
    model.train()
    with paddle.no_grad():
        model(paddle.to_tensor(images))
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm._momentum = momentum


def time_backends(
    model: RepLKNet,
    config,
    plan: Plan,
    *,
    report: Callable[[str], object],
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Time eager mode and each candidate of `plan`.

    Eager mode is Paddle alone, with its own convolutions: `replknet benchmark network` has those of
    `ops/`. INT8 is calibrated with random images, so its speed means something and its deviation
    little. A candidate that fails, when it is opened or later, is reported and left out from there
    on.

    Args:
        model: a classifier in evaluation mode; stays as it is.
        report: gets what is left out, and why.
        keep: gets all rows so far, after each batch size.
    """
    eager = open_eager(model, ModelInfo(config))
    rows = []
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder, contextlib.ExitStack() as open_:
        opened = open_candidates(model, config, plan, Path(folder), report)
        open_.callback(close_all, opened)
        for batch in plan.batch_sizes:
            rows += time_batch(eager, opened, batch, config.DATA.IMAGE_SIZE, plan.rounds, report)
            keep(rows)
    return rows


def open_candidates(
    model: RepLKNet, config, plan: Plan, folder: Path, report: Callable[[str], object]
) -> dict[tuple[str, str, str], Backend]:
    """Open what `plan` names, by (backend, network, precision); a failure is reported.

    Args:
        folder: an empty one for exports.
    """
    opened = {}
    int8 = folder / "int8"

    def open_one(backend: str, precision: str) -> Backend:
        if precision != "int8":
            return open_backend(
                model, backend, config=config, threads=plan.threads, precision=precision
            )
        if not int8.exists():
            info = ModelInfo(config, format="onnx", precision="int8")
            calibration = [random_images(4, config.DATA.IMAGE_SIZE)]
            export_model(model, int8, info, calibration=calibration)
        return open_backend(int8, backend, threads=plan.threads)

    candidates = plan.candidates()
    if ("paddle", "fp32") in candidates:
        try:
            opened["paddle", "trained", "fp32"] = open_trained(
                model, config, folder / "trained", plan.threads
            )
        except Exception as error:
            report(f"left out: paddle on the trained form: {one_line(error)}")
    for backend, precision in candidates:
        try:
            opened[backend, "folded", precision] = open_one(backend, precision)
        except Exception as error:  # whatever a backend raises, the others are measured
            report(f"left out: {backend} in {precision}: {one_line(error)}")
    return opened


def time_batch(
    eager: Backend,
    opened: dict[tuple[str, str, str], Backend],
    batch: int,
    size: int,
    rounds: int,
    report: Callable[[str], object],
) -> list[Row]:
    """Rows of one batch size; candidates that fail are reported, and removed from `opened`."""
    images = random_images(batch, size)
    reference = eager.run(images)
    outputs = {EAGER: reference}
    for key in list(opened):
        try:
            outputs[key] = opened[key].run(images)
        except Exception as error:  # as above
            report(f"left out: {key[0]} in {key[2]} at batch {batch}: {one_line(error)}")
            opened.pop(key).close()
    seconds = time_in_turn(
        {key: partial(backend.run, images) for key, backend in opened.items()},
        rounds=rounds,
        settle_seconds=SETTLE_SECONDS,
    )
    seconds |= time_in_turn({EAGER: partial(eager.run, images)}, rounds=min(rounds, DYGRAPH_ROUNDS))
    rows = []
    for key in (EAGER, *opened):
        timing = summarize(seconds[key])
        rows.append(
            Row(
                *key,
                batch=batch,
                median_ms=1e3 * timing.median_seconds,
                min_ms=1e3 * timing.min_seconds,
                max_ms=1e3 * timing.max_seconds,
                images_per_second=batch / timing.median_seconds,
                runs=timing.runs,
                deviation=largest_deviation(outputs[key], reference),
            )
        )
    return rows


def close_all(opened: dict[tuple[str, str, str], Backend]) -> None:
    """Give the memory of all backends back."""
    for backend in opened.values():
        backend.close()
    opened.clear()
    gc.collect()


def one_line(error: Exception) -> str:
    """The message of an exception, at most 300 characters of it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def open_trained(model: RepLKNet, config, folder: Path, threads: int | None) -> Backend:
    """Paddle Inference on the network as it is: neither merged nor folded."""
    folder.mkdir()
    write_paddle_model(model, folder)
    write_record(ModelInfo(config), folder)
    return open_backend(folder, "paddle", threads=threads)


def table(rows: list[Row]) -> str:
    """The rows as text, each batch size by itself and with its ratio to eager mode."""
    lines = [
        f"{'batch':>5}  {'backend':<12} {'network':<8} {'precision':<9} {'median':>10}  "
        f"{'range':>19}  {'images/s':>8}  {'x eager':>8}  deviation"
    ]
    eager = {row.batch: row.median_ms for row in rows if row.backend == "dygraph"}
    for row in rows:
        lines.append(
            f"{row.batch:>5}  {row.backend:<12} {row.network:<8} {row.precision:<9} "
            f"{row.median_ms:>7.2f} ms  {row.min_ms:>8.2f} - {row.max_ms:>8.2f}  "
            f"{row.images_per_second:>8.2f}  {eager[row.batch] / row.median_ms:>8.2f}  "
            f"{row.deviation:.1e} (n = {row.runs})"
        )
    return "\n".join(lines)


def machine() -> str:
    """Hardware and versions, in one line."""
    versions = []
    for name in MEASURED_PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{describe_machine()}, {', '.join(versions)}"


def write_json(path: str, rows: list[Row], **facts) -> None:
    """Write the rows, and what else is to be known of the run, to a JSON file."""
    with written_whole(path) as file:
        json.dump({**facts, "rows": [asdict(row) for row in rows]}, file, indent=2)
