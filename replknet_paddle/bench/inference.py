"""How fast a network runs on every backend, in every precision, side by side in one run."""

import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.bench.timing import describe_machine, summarize, time_in_turn
from replknet_paddle.deploy.backends import open_backend
from replknet_paddle.deploy.export import export_model, write_paddle_model
from replknet_paddle.deploy.extras import import_extra
from replknet_paddle.deploy.fold import largest_deviation, random_images
from replknet_paddle.deploy.runtimes import Backend, DygraphBackend
from replknet_paddle.deploy.sidecar import Sidecar
from replknet_paddle.model import RepLKNet
from replknet_paddle.runtime.errors import InputError
from replknet_paddle.runtime.files import written_whole

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
# Eager mode takes about as long for one run as the others for twenty.
DYGRAPH_ROUNDS = 3
# Intel's OpenMP, which Paddle brings, lets idle threads spin for 0.2 s.
SETTLE_SECONDS = 0.3
PACKAGES = ("onnx", "onnxruntime", "openvino")


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
    *,
    backends: Sequence[str],
    batch_sizes: Sequence[int],
    threads: int | None,
    rounds: int,
    report=lambda text: None,
) -> list[Row]:
    """Time eager mode and each installed backend of `backends` in each precision that it has.

    Eager mode is Paddle alone, with its own convolutions: `replknet benchmark network` has those of
    `ops/`. INT8 is calibrated with random images, so its speed means something and its deviation
    little.

    Args:
        model: a classifier in evaluation mode; stays as it is.
        report: told of what is left out, and why.
    """
    size = config.DATA.IMAGE_SIZE
    eager = DygraphBackend(model, Sidecar.build(config, format="paddle"))
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder:
        opened = {}
        if "paddle" in backends:
            opened["paddle", "trained", "fp32"] = open_trained(
                model, eager.sidecar, Path(folder) / "trained", threads
            )
        exports = {}
        for backend, precision in CANDIDATES:
            on_gpu = paddle.device.get_device().startswith("gpu")
            if backend not in backends or (precision == "fp16" and not on_gpu):
                continue
            try:
                if precision != "int8":
                    opened[backend, "folded", precision] = open_backend(
                        model, backend, config=config, threads=threads, precision=precision
                    )
                    continue
                if "int8" not in exports:
                    exports["int8"] = Path(folder) / "int8"
                    export_model(
                        model,
                        exports["int8"],
                        Sidecar.build(config, format="onnx", precision="int8"),
                        calibration=[random_images(4, size)],
                    )
                opened[backend, "folded", precision] = open_backend(
                    exports["int8"], backend, threads=threads
                )
            except InputError as error:
                report(f"left out: {backend} in {precision}: {error}")
        rows = []
        for batch in batch_sizes:
            images = random_images(batch, size)
            reference = eager.run(images)
            seconds = time_in_turn(
                {key: partial(backend.run, images) for key, backend in opened.items()},
                rounds=rounds,
                settle_seconds=SETTLE_SECONDS,
            )
            eager_key = ("dygraph", "trained", "fp32")
            seconds |= time_in_turn(
                {eager_key: partial(eager.run, images)}, rounds=min(rounds, DYGRAPH_ROUNDS)
            )
            for key in [eager_key, *opened]:
                timing = summarize(seconds[key])
                outputs = reference if key == eager_key else opened[key].run(images)
                rows.append(
                    Row(
                        *key,
                        batch=batch,
                        median_ms=1e3 * timing.median_seconds,
                        min_ms=1e3 * timing.min_seconds,
                        max_ms=1e3 * timing.max_seconds,
                        images_per_second=batch / timing.median_seconds,
                        runs=timing.runs,
                        deviation=largest_deviation(outputs, reference),
                    )
                )
    return rows


def open_trained(model, sidecar: Sidecar, folder: Path, threads: int | None) -> Backend:
    """Paddle Inference on the network as it is: neither merged nor folded."""
    folder.mkdir()
    write_paddle_model(model, folder)
    sidecar.write(folder)
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
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{describe_machine()}, {', '.join(versions)}"


def chart_suffixes() -> list[str]:
    """Endings of the pictures that can be drawn.

    Raises:
        InputError: matplotlib is missing.
    """
    figures = import_extra("matplotlib.figure", "requirements/plots.txt")
    return [f".{kind}" for kind in sorted(figures.Figure().canvas.get_supported_filetypes())]


def write_json(path: str, rows: list[Row], **facts) -> None:
    """Write the rows, and what else is to be known of the run, to a JSON file."""
    with written_whole(path) as file:
        json.dump({**facts, "rows": [asdict(row) for row in rows]}, file, indent=2)


def draw_chart(path: str, rows: list[Row], title: str) -> None:
    """Draw images per second as bars, a panel for each batch size, to a picture file.

    Raises:
        InputError: matplotlib is missing.
    """
    figures = import_extra("matplotlib.figure", "requirements/plots.txt")
    batches = sorted({row.batch for row in rows})
    count = max(sum(row.batch == batch for row in rows) for batch in batches)
    figure = figures.Figure(figsize=(6 * len(batches), 1.5 + 0.4 * count), layout="constrained")
    figure.suptitle(title, fontsize="small")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches):
        shown = [row for row in rows if row.batch == batch][::-1]
        names = [f"{row.backend} {row.precision}, {row.network}" for row in shown]
        bars = axes.barh(names, [row.images_per_second for row in shown])
        axes.bar_label(bars, [f"{row.median_ms:.3g} ms" for row in shown], padding=3)
        axes.margins(x=0.2)
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("images/s (labels: median time of a batch)")
    with written_whole(path, "wb") as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix[1:])
