"""Golden runs: what the program computes, seen from outside, to hold a change against it.

    python tests/golden.py --save FILE.npz     the results of this checkout, some 15 MB
    python tests/golden.py --against FILE.npz  name what differs from them in this checkout
    python tests/golden.py --record            write tests/fixtures/golden.json

The runs call commands, the faces at the top level and documented functions alone, each in a process
of its own, and read the files that these leave: nothing here knows a module of the package. The
results of two checkouts on one machine must agree bit for bit, and texts letter by letter.
`test_golden.py` compares with golden.json, which other processors meet within rounding.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
RECORDED = FIXTURES / "golden.json"

MODELS = {
    "tiny31": {"LARGE_KERNEL_SIZES": [31, 29, 27, 13]},
    "tinyxl": {"LARGE_KERNEL_SIZES": [27, 27, 27, 13], "SMALL_KERNEL": None, "DW_RATIO": 1.5},
}
# Rounding, which AdamW turns into steps of the learning rate where a gradient is near zero, must
# not reach the figures compared.
RECIPE = {
    "NUM_EPOCHS": 2,
    "WARMUP_EPOCHS": 1,
    "BASE_LR": 1e-5,
    "ACCUM_ITER": 2,
    "MODEL_EMA_DECAY": 0.9,
}
# Keys of the times and sizes of a run, which no two runs share.
MEASURED = re.compile("second|time|_ms|memory|images_per|throughput|path|date|eta|host|device")

COMMANDS = (
    *("train", "eval", "predict", "page", "export", "merge", "convert", "benchmark"),
    *("make-lists", "check-data", "make-digits", "model-info", "plot", "erf", "kernels", "build"),
    *("segment", "make-shapes"),
)

API = """
import sys
import numpy as np, paddle
from config import get_config
from replknet import build_replknet
import replknet_paddle
from replknet_paddle import get_model, list_models
from replknet_paddle.ops import large_kernel_depthwise_conv2d, use_fast_depthwise_conv
cfg, weights, expected, out = sys.argv[1:]
images = paddle.to_tensor(np.load(expected)["images"])
config = get_config(cfg)
fresh = build_replknet(config)
found = {"names": np.array(list_models()),
         "parameters": np.array([f"{k} {v.shape}" for k, v in fresh.state_dict().items()])}
model = get_model(cfg, pretrained=weights)
model.eval()
with paddle.no_grad():
    found["logits"] = model(images).numpy()
    model.structural_reparam()
    found["merged"] = model(images).numpy()
    use_fast_depthwise_conv(model)
    found["fast"] = model(images).numpy()
    found["nano"] = get_model(
        "configs/replknet_nano.yaml", num_classes=3, out_indices=[0, 3]
    ).feature_channels
rng = np.random.default_rng(0)
x = paddle.to_tensor(rng.normal(size=(2, 6, 20, 17)).astype("float32"))
w = paddle.to_tensor(rng.normal(size=(6, 1, 13, 13)).astype("float32"))
for impl in ("direct", "fft", "matmul", "paddle"):
    x.stop_gradient = w.stop_gradient = False
    y = large_kernel_depthwise_conv2d(x, w, impl=impl)
    found[f"{impl} forward"] = y.numpy()
    for name, grad in zip("xw", paddle.grad((y * y).sum(), [x, w])):
        found[f"{impl} gradient of {name}"] = grad.numpy()
np.savez(out, **found)
"""


def results_of(checkout: Path, folder: Path) -> dict[str, np.ndarray]:
    """Return all results of `checkout` by name: arrays, and texts as arrays of lines.

    Args:
        folder: an empty one for data and outputs.
    """
    return _Runs(checkout, folder).results()


class _Runs:
    """The runs of one checkout below one folder."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
        self.found: dict[str, np.ndarray] = {}

    def results(self) -> dict[str, np.ndarray]:
        self.make_inputs()
        for name in MODELS:
            self.train(name, f"{name}.yaml", "data")
        nano = ["-opts", "TRAIN.NUM_EPOCHS", "2", "TRAIN.MODEL_EMA", "True", "TRAIN.ACCUM_ITER"]
        nano += ["2", "TRAIN.MIXUP_ALPHA", "0.8", "TRAIN.CUTMIX_ALPHA", "1.0", "TRAIN.BASE_LR"]
        nano += ["1e-6", "DATA.BATCH_SIZE", "8", "TRAIN.MODEL_EMA_DECAY", "0.9"]
        nano += ["MODEL.NUM_CLASSES", "None"]
        self.train("nano", self.checkout / "configs" / "replknet_nano.yaml", "data", *nano)
        self.train("upernet", "upernet.yaml", "shapes")
        self.evaluate()
        self.convert()
        self.export_and_predict()
        self.analyze()
        self.segment()
        return self.found

    def call(self, *arguments, script="-m replknet_paddle") -> str:
        """The standard output of a command line that must succeed."""
        command = [sys.executable, *script.split(), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.checkout,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": str(self.checkout),
            },
            text=True,
            capture_output=True,
            timeout=600,
        )
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout

    def make_inputs(self) -> None:
        """Write images, label images, lists and configurations."""
        rng = np.random.default_rng(0)
        for split, count in (("train", 48), ("val", 30)):
            for name in ("data", "shapes"):
                (self.folder / name / split).mkdir(parents=True)
            lines, pairs = [], []
            for i in range(count):
                size = rng.integers(70, 100, 2)
                pixels = rng.integers(0, 120, (*size, 3)) + 12 * (i % 10)
                image = Image.fromarray(pixels.astype("uint8"))
                image.save(self.folder / "data" / split / f"{i}.png")
                lines.append(f"{split}/{i}.png {i % 10}\n")
                image.save(self.folder / "shapes" / split / f"{i}.png")
                labels = np.repeat(np.repeat(rng.integers(0, 5, (10, 10)), 10, 0), 10, 1)
                Image.fromarray(labels[: size[0], : size[1]].astype("uint8")).save(
                    self.folder / "shapes" / split / f"{i}_labels.png"
                )
                pairs.append(f"{split}/{i}.png {split}/{i}_labels.png\n")
            (self.folder / "data" / f"{split}_list.txt").write_text("".join(lines))
            (self.folder / "shapes" / f"{split}_list.txt").write_text("".join(pairs))
        (self.folder / "data" / "class_names.txt").write_text(
            "".join(f"grey {i}\n" for i in range(10))
        )
        (self.folder / "photos").mkdir()
        pictures = sorted((FIXTURES / "images").glob("[!e]*_*[0-9].*"))
        pictures += sorted((FIXTURES / "images").glob("expected*384.png"))
        for path in pictures:
            (self.folder / "photos" / path.name).write_bytes(path.read_bytes())
        lines = [f"{path.name} {i % 10}\n" for i, path in enumerate(pictures)]
        (self.folder / "photos" / "val_list.txt").write_text("".join(lines))
        small = {"LAYERS": [1, 1, 2, 1], "CHANNELS": [8, 16, 24, 32], "DROPPATH": 0.1}
        data = {"IMAGE_SIZE": 64, "NUM_WORKERS": 0, "BATCH_SIZE": 4}
        for name, model in MODELS.items():
            self.write_config(name, {"NAME": name, "NUM_CLASSES": 10, **small, **model}, data)
        heads = {"HEAD_CHANNELS": 12, "AUX_CHANNELS": 6, "EPOCH_STEPS": 4, "WARMUP_STEPS": 2}
        heads |= {"RESIZE": [96, 80], "SLIDE_STRIDE": 32, "EVAL_RATIOS": [0.75, 1.0]}
        kernels = {"LARGE_KERNEL_SIZES": [13, 11, 9, 7], "OUT_INDICES": [0, 1, 2, 3]}
        kernels["NORM_INTER_FEATURES"] = True
        self.write_config(
            "upernet",
            {"TYPE": "UPerNet", "NAME": "upernet", "NUM_CLASSES": 5, **small, **kernels},
            data,
            TRAIN={**RECIPE, "WARMUP_EPOCHS": 0},
            SEGMENTATION={**heads, "EVAL_FLIP": True},
        )

    def write_config(self, name: str, model: dict, data: dict, **sections) -> None:
        tree = {"MODEL": model, "DATA": data, "TRAIN": RECIPE, **sections}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))

    def train(self, name: str, config, data: str, *flags) -> None:
        """Two epochs; then the same from a checkpoint in the middle of the first."""
        flags = list(flags or ["-opts"]) + ["SAVE_STEPS", "1", "SAVE_KEEP", "100"]
        common = [f"-cfg={self.folder / config}", f"-data_path={self.folder / data}", *flags]
        run = self.folder / "runs" / name
        self.call(*common, f"-output={run}", script="main_single_gpu.py")
        self.found[f"{name} checkpoints"] = np.array(sorted(os.listdir(run / "checkpoints")))
        self.found[f"{name} metrics"] = _facts(run / "metrics.jsonl")
        for part in ("last", "best"):
            self.add_tensors(f"{name} {part}", run / part)
        middle = sorted(os.listdir(run / "checkpoints"))[1]
        assert middle.startswith("epoch_0000_"), middle
        resumed = self.folder / "runs" / f"{name}_resumed"
        self.call(
            *common,
            f"-output={resumed}",
            f"-resume={run / 'checkpoints' / middle}",
            script="main_multi_gpu.py",
        )
        for part in ("last", "best"):
            self.add_tensors(f"{name} {part} resumed", resumed / part)

    def add_tensors(self, name: str, path: Path) -> None:
        for key, value in load_file(path).items():
            self.found[f"{name}: {key}"] = value

    def evaluate(self) -> None:
        """An evaluation of trained weights, and one of official weights with its report."""
        run, report = self.folder / "runs" / "nano", self.folder / "report"
        self.call(
            "eval",
            f"-pretrained={run}",
            f"-data_path={self.folder / 'data'}",
            f"-output={self.folder / 'own'}",
        )
        official = [f"-cfg={self.folder / 'tiny31.yaml'}", f"-data_path={self.folder / 'photos'}"]
        official += [f"-pretrained={FIXTURES / 'tiny31_official.pth'}", f"-report={report}"]
        self.call("eval", *official, f"-output={self.folder / 'official'}")
        for path in sorted(report.glob("*.csv")):
            self.found[f"report {path.name}"] = np.array(path.read_text().splitlines())
        for name in ("own", "official"):
            self.found[f"eval {name} metrics"] = _facts(self.folder / name / "metrics.jsonl")

    def convert(self) -> None:
        """Every reference file converted to each layout, and merged."""
        for path in sorted(FIXTURES.glob("tiny*.p*")):
            name = path.name.partition("_")[0]
            is_merged = ["-opts", "MODEL.SMALL_KERNEL_MERGED", "True"] * ("_merged" in path.name)
            for layout in ("native", "official", "mmpretrain"):
                if layout != "native" and not path.name.endswith("_official.pth"):
                    continue
                out = self.folder / f"{path.name}.{layout}.safetensors"
                config = ["-cfg", self.folder / f"{name}.yaml", *is_merged]
                self.call("convert", path, "-output", out, "-to", layout, *config)
                self.add_tensors(f"{path.name} as {layout}", out)
        merged = self.folder / "merged.safetensors"
        self.call("merge", self.folder / "runs" / "nano" / "best", "-output", merged)
        self.add_tensors("nano merged", merged)

    def export_and_predict(self) -> None:
        """Predictions by the run folder, and by exports of official weights, as result files."""
        models = {"run paddle": self.folder / "runs" / "nano"}
        official = [FIXTURES / "tiny31_official.pth", "-cfg", self.folder / "tiny31.yaml"]
        for kind, backends in {"paddle": ["paddle"], "onnx": ["onnxruntime", "openvino"]}.items():
            exported = self.folder / f"exported_{kind}"
            self.call("export", *official, "-format", kind, "-output", exported)
            models |= {f"export {backend}": exported for backend in backends}
        for name, model in models.items():
            out = self.folder / f"{name}.jsonl"
            backend = name.split()[1]
            self.call("predict", model, self.folder / "photos", "-output", out, "-backend", backend)
            self.found[f"predictions {name}"] = _facts(out)

    def analyze(self) -> None:
        """The Python interface, receptive fields, tables, and the help of all commands."""
        out = self.folder / "api.npz"
        config, weights = self.folder / "tiny31.yaml", FIXTURES / "tiny31_official.pth"
        expected = FIXTURES / "tiny31_expected.npz"
        (self.folder / "api.py").write_text(API)
        self.call(config, weights, expected, out, script=str(self.folder / "api.py"))
        with np.load(out) as found:
            self.found |= {f"api {name}": found[name] for name in found.files}
        field = self.folder / "field.npy"
        images = [weights, self.folder / "data" / "val", "-cfg", config]
        table = self.call("erf", *images, "-num_images", 3, "-image_size", 64, "-output", field)
        self.found["erf"] = np.load(field)
        self.found["erf table"] = np.array(table.replace(str(self.folder), "").splitlines()[:-1])
        for name in COMMANDS:
            words = self.call(*name.split(), "-h").split()  # lines may break elsewhere
            self.found[f"help {name}"] = np.array(words)
        for name in ("replknet_31b", "replknet_xl"):
            text = self.call("model-info", f"configs/{name}.yaml")
            self.found[f"model-info {name}"] = np.array(text.splitlines())

    def segment(self) -> None:
        """Evaluations at two scales with sliding windows, predictions, and an export."""
        data = f"-data_path={self.folder / 'shapes'}"
        run, weights = self.folder / "runs" / "upernet", FIXTURES / "upernet_official.pth"
        official = ["-cfg", self.folder / "upernet.yaml"]
        for name, flags in {
            "own": [f"-pretrained={run}"],
            "official": [*official, f"-pretrained={weights}"],
        }.items():
            out = self.folder / f"segment_{name}"
            self.call("segment", "eval", *flags, data, f"-output={out}")
            self.found[f"segment eval {name} metrics"] = _facts(out / "metrics.jsonl")
        exported = self.folder / "upernet_exported"
        self.call("export", weights, *official, "-format", "onnx", "-output", exported)
        for name, model in {"weights": [*official, weights], "export": [exported]}.items():
            out = self.folder / f"segments_{name}"
            pictures = self.folder / "photos" / "[l-p]*.*"
            self.call("segment", "predict", *model, pictures, "-output", out)
            for path in sorted(out.glob("*_labels.png")):
                labels = np.asarray(Image.open(path))
                overlay = path.with_name(path.name.replace("_labels", ""))
                height, width = labels.shape  # the legend is to the right
                pixels = np.asarray(Image.open(overlay))[:height, :width]
                self.found[f"segments {name}: {overlay.name}"] = pixels
                self.found[f"segments {name}: {path.name}"] = labels


def _facts(path: Path) -> np.ndarray:
    """The objects of a file of JSON lines without times and paths, as lines KEY VALUE."""
    lines = []
    for text in path.read_text().splitlines():
        lines += [f"{key} {value}" for key, value in _leaves(json.loads(text))]
    return np.array([line for line in lines if not MEASURED.search(line.split()[0].lower())])


def _leaves(value, name=""):
    """(dotted name, value) of everything in nested JSON."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def record(results: dict[str, np.ndarray]) -> dict[str, list]:
    """Return what golden.json keeps: of a text its lines; of all arrays of a run, in the order of
    their names, the count of numbers, their mean, the root of their mean square and two random
    projections, which rounding hardly moves and any other change does. Help is left out, which
    each version of Python lays out in its own way.
    """
    kept, runs = {}, {}
    for name in sorted(results):
        if name.startswith("help "):
            continue
        if results[name].dtype.kind == "U":
            kept[name] = results[name].tolist()
        else:
            runs.setdefault(name.partition(":")[0], []).append(results[name])
    for name, arrays in runs.items():
        numbers = np.concatenate([array.astype("float64").ravel() for array in arrays])
        draws = np.random.default_rng(0).normal(size=(2, numbers.size))
        projections = draws @ numbers / np.sqrt(numbers.size)
        sums = [numbers.mean(), np.sqrt((numbers**2).mean()), *projections]
        kept[name] = [numbers.size, *(float(f"{value:.7g}") for value in sums)]
    return kept


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Return a line for each result that is not the same, bit for bit, in both."""
    lines = [f"only in one of them: {name}" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        a, b = one[name], other[name]
        if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes():
            continue
        if a.dtype.kind == "U" or a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}:\n  {a.tolist()!s:.600}\n  {b.tolist()!s:.600}")
        else:
            largest = np.abs(a.astype("float64") - b.astype("float64")).max()
            lines.append(f"{name}: differs by up to {largest:.3g}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, metavar="FILE")
    parser.add_argument("--against", type=Path, metavar="FILE")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = results_of(ROOT, Path(folder))
    if args.save is not None:
        np.savez_compressed(args.save, **results)
    if args.record:
        kept = sorted(record(results).items())
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in kept]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if args.against is None:
        return 0
    with np.load(args.against) as saved:
        lines = differences(results, {name: saved[name] for name in saved.files})
    print("\n".join(lines) or f"{len(results):,} results are the same, bit for bit")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
