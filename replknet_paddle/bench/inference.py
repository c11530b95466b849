"""How fast a network runs on every backend, in every precision, side by side in one run."""

import contextlib
import importlib.metadata
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import paddle

from replknet_paddle.bench.timing import (
    Table,
    check_counts,
    describe_machine,
    summarize,
    time_in_turn,
)
from replknet_paddle.config import RANDOM
from replknet_paddle.deploy.backends import (
    BACKENDS,
    NAMES_OF_0_2,
    Backend,
    installed_backends,
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
from replknet_paddle.deploy.fold import check_finite, largest_deviation, random_images
from replknet_paddle.model import RepLKNet, build_replknet
from replknet_paddle.runtime.errors import InputError, counted
from replknet_paddle.runtime.files import atomic_file, json_text
from replknet_paddle.zoo import open_network

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
# Backend; network, `trained` as the checkpoint has it or `folded`; precision.
Key = tuple[str, str, str]
EAGER: Key = ("eager", "trained", "fp32")
EAGER_ROUNDS = 3  # one takes about as long as twenty of the others
# Intel's OpenMP, which Paddle brings, lets idle threads spin for 0.2 s.
SETTLE_SECONDS = 0.3
COLUMNS = {"batch": 5, "backend": -12, "network": -8, "precision": -9, "median ms": 10}
COLUMNS |= {"from": 9, "to": 9, "images/s": 9, "x eager": 8, "deviation": 9, "runs": 4}


@dataclass(frozen=True)
class Plan:
    """What to time: each backend in each precision, at each batch size."""

    backends: Sequence[str] | None = None  # None: all that are installed
    precisions: Sequence[str] = PRECISIONS  # eager mode runs in fp32 whatever they are
    batch_sizes: Sequence[int] = (1, 8)
    threads: int | None = None  # None: all cores of this process
    rounds: int = 9

    def check(self) -> None:
        """Raise InputError for a name or number that is not allowed."""
        threads = 1 if self.threads is None else self.threads
        check_counts(rounds=self.rounds, batch_sizes=min(self.batch_sizes), threads=threads)
        for flag, given, allowed in (
            ("-backends", [NAMES_OF_0_2.get(b, b) for b in self.backends or ()], BACKENDS),
            ("-precisions", self.precisions, PRECISIONS),
        ):
            unknown = sorted(set(given) - set(allowed))
            if unknown:
                raise InputError(f"{flag} {' '.join(unknown)}; allowed: {' '.join(allowed)}")

    def candidates(self) -> list[tuple[str, str]]:
        """Return the (backend, precision) to time besides eager mode."""
        backends = installed_backends() if self.backends is None else self.backends
        on_gpu = paddle.device.get_device().startswith("gpu")
        return [
            (backend, precision)
            for backend, precision in CANDIDATES
            if backend in backends
            and precision in self.precisions
            and (precision != "fp16" or on_gpu)
        ]


def report_inference(config, plan: Plan, *, json_file: str | None) -> None:
    """Print how fast each backend runs a network, in each precision and batch size.

    Its weights are those of MODEL.PRETRAINED, or random. What has been measured is written to
    `json_file` after each batch size.
    """
    if config.MODEL.OUT_INDICES is not None:
        raise InputError(
            f"MODEL.OUT_INDICES is {config.MODEL.OUT_INDICES}, which makes a backbone without a "
            "head; allowed: None"
        )
    plan.check()
    size = config.DATA.IMAGE_SIZE
    has_weights = config.MODEL.PRETRAINED not in (None, RANDOM)
    if has_weights:
        model = open_network(config)
        check_finite(model)
    else:
        paddle.seed(config.SEED)
        model = build_replknet(config)
        set_statistics(model, random_images(max(4, 2 * (256 // size) ** 2), size))
    print(machine())
    weights = config.MODEL.PRETRAINED if has_weights else "random weights"
    title = f"{config.MODEL.NAME}, {size} x {size} pixels, {weights}"
    print(f"{title}, {counted(plan.threads, 'thread') if plan.threads else 'all threads'}")
    table, rows = Table(COLUMNS), []
    for of_batch in time_backends(model, config, plan):
        rows += of_batch
        for row in of_batch:
            table.add(
                *(row[name] for name in ("batch", "backend", "network", "precision")),
                *(f"{row[name]:.2f}" for name in ("median_ms", "min_ms", "max_ms")),
                f"{row['images_per_second']:.2f}",
                f"{of_batch[0]['median_ms'] / row['median_ms']:.2f}",
                *(f"{row['deviation']:.1e}", row["runs"]),
            )
        if json_file:
            facts = {"machine": machine(), "network": title, "threads": plan.threads}
            with atomic_file(json_file) as file:
                file.write(json_text({**facts, "rows": rows}, indent=2) + "\n")


def set_statistics(model: RepLKNet, images: np.ndarray) -> None:
    """Give every batch norm of `model` the statistics of these images (N, 3, H, W).

    With those of a fresh network logits are so large that no deviation says anything.
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


def time_backends(model: RepLKNet, config, plan: Plan) -> Iterator[list[dict]]:
    """Time eager mode and each candidate of `plan`; yield the rows of each batch size.

    Eager mode, the first row, is Paddle alone, with its own convolutions. INT8 is calibrated with
    random images, so its speed means something and its deviation little. A candidate that fails,
    when it is opened or later, is reported and left out from there on.
    """
    eager = open_eager(model, ModelInfo(config))
    with tempfile.TemporaryDirectory(prefix="replknet-") as folder:
        opened = open_candidates(model, config, plan, Path(folder))
        try:
            for batch in plan.batch_sizes:
                yield time_batch(eager, opened, batch, config.DATA.IMAGE_SIZE, plan.rounds)
        finally:
            for backend in opened.values():
                backend.close()


def open_candidates(model: RepLKNet, config, plan: Plan, folder: Path) -> dict[Key, Backend]:
    """Open what `plan` names; exports go into `folder`, which is empty."""
    opened = {}
    for backend, precision in plan.candidates():
        if (backend, precision) == ("paddle", "fp32"):
            with left_out_if_it_fails("paddle on the trained form"):
                trained = folder / "trained"  # neither merged nor folded
                trained.mkdir()
                write_paddle_model(model, trained)
                write_record(ModelInfo(config), trained)
                opened[backend, "trained", precision] = open_backend(
                    trained, backend, threads=plan.threads
                )
        with left_out_if_it_fails(f"{backend} in {precision}"):
            if precision != "int8":
                opened[backend, "folded", precision] = open_backend(
                    model, backend, config=config, threads=plan.threads, precision=precision
                )
                continue
            int8 = folder / "int8"
            if not int8.exists():
                info = ModelInfo(config, format="onnx", precision="int8")
                calibration = [random_images(4, config.DATA.IMAGE_SIZE)]
                export_model(model, int8, info, calibration=calibration)
            opened[backend, "folded", precision] = open_backend(int8, backend, threads=plan.threads)
    return opened


@contextlib.contextmanager
def left_out_if_it_fails(what: str) -> Iterator[None]:
    """Report whatever a backend raises, so that the others are measured."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"left out: {what}: {message}")


def time_batch(
    eager: Backend, opened: dict[Key, Backend], batch: int, size: int, rounds: int
) -> list[dict]:
    """Return the rows of a batch size; candidates that fail are reported, and leave `opened`."""
    images = random_images(batch, size)
    outputs = {EAGER: eager.run(images)}
    for key in list(opened):
        with left_out_if_it_fails(f"{key[0]} in {key[2]} at batch {batch}"):
            outputs[key] = opened[key].run(images)
            continue
        opened.pop(key).close()
    seconds = time_in_turn(
        {key: partial(backend.run, images) for key, backend in opened.items()},
        rounds=rounds,
        settle_seconds=SETTLE_SECONDS,
    )
    seconds |= time_in_turn({EAGER: partial(eager.run, images)}, rounds=min(rounds, EAGER_ROUNDS))
    rows = []
    for key in (EAGER, *opened):
        median, low, high, runs = summarize(seconds[key])
        rows.append(
            {
                **dict(zip(("backend", "network", "precision"), key)),
                "batch": batch,
                "median_ms": 1e3 * median,
                "min_ms": 1e3 * low,
                "max_ms": 1e3 * high,
                "images_per_second": batch / median,
                "runs": runs,
                # The largest difference of logits from eager float32, relative to the largest.
                "deviation": largest_deviation(outputs[key], outputs[EAGER]),
            }
        )
    return rows


def machine() -> str:
    """Return hardware and versions, in one line."""
    versions = []
    for name in ("onnx", "onnxruntime", "openvino"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return f"{describe_machine()}, {', '.join(versions)}"
