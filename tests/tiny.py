"""What many tests share: paths, a tiny configuration, tiny data sets in list files.

Not in conftest.py, for there are several of that name, and forked processes import by name.
"""

import argparse
import csv
import functools
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from replknet_paddle.commands import main

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
PICTURES = sorted(map(str, (FIXTURES / "images").glob("[!eR]*")))

TINY = """
DATA:
  BATCH_SIZE: 8
  IMAGE_SIZE: 32
  CROP_PCT: 1.0
  NUM_WORKERS: 0
MODEL:
  NAME: tiny
  NUM_CLASSES: 4
  DROPPATH: 0.1
  LARGE_KERNEL_SIZES: [7, 7, 5, 5]
  LAYERS: [1, 1, 1, 1]
  CHANNELS: [4, 6, 8, 10]
TRAIN:
  NUM_EPOCHS: 4
  WARMUP_EPOCHS: 1
  ACCUM_ITER: 2
  MODEL_EMA_DECAY: 0.9
SAVE_FREQ: 2
"""

# The two networks of the reference files in tests/fixtures.
TINY31 = """
DATA: {IMAGE_SIZE: 64, NUM_WORKERS: 0}
MODEL:
  NUM_CLASSES: 10
  LARGE_KERNEL_SIZES: [31, 29, 27, 13]
  LAYERS: [1, 1, 2, 1]
  CHANNELS: [8, 16, 24, 32]
"""

TINYXL = (
    TINY31.replace("[31, 29, 27, 13]", "[27, 27, 27, 13]")
    + """
  SMALL_KERNEL: None
  DW_RATIO: 1.5
"""
)


def make_data(folder: Path, *, train: int, val: int, classes: int = 4) -> None:
    """Write a data set in list files: one folder a class, JPEGs of assorted sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        lines = []
        for i in range(count):
            label = i % classes
            path = f"{split}/class {label}/{i:04d}.jpg"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            size = (int(rng.integers(30, 60)), int(rng.integers(30, 60)), 3)
            pixels = rng.integers(0, 80, size) + 50 * label
            Image.fromarray(pixels.astype("uint8")).save(folder / path)
            lines.append(f"{path} {label}\n")
        (folder / f"{split}_list.txt").write_text("".join(lines))


def relisted(data: Path, folder: Path, change, lists: str = "*_list.txt") -> Path:
    """A copy of a data set, each of whose `lists` has the lines that `change` makes of its own."""
    shutil.copytree(data, folder)
    for path in folder.glob(lists):
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    return folder


def make_patterns(folder) -> None:
    """64 noisy images of 4 patterns, which no augmentation turns into one another; all are both
    the training and the validation set."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(40) * 1.2) > 0
    patterns = [
        np.broadcast_to(waves, (40, 40)),
        np.broadcast_to(waves[:, None], (40, 40)),
        waves ^ waves[:, None],
        np.zeros((40, 40)),
    ]
    folder.mkdir()
    lines = []
    for i in range(64):
        pixels = 80 * patterns[i % 4][..., None] + rng.integers(40, 100, (40, 40, 3))
        Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
        lines.append(f"{i}.png {i % 4}\n")
    for split in ("train", "val"):
        (folder / f"{split}_list.txt").write_text("".join(lines))


def rows_of(path) -> list[list[str]]:
    """The cells of a .csv file, its header first."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def table(path) -> list[dict[str, str]]:
    """The rows of a .csv file below its header, by the names in that."""
    header, *rows = rows_of(path)
    return [dict(zip(header, row, strict=True)) for row in rows]


def command(name: str):
    """`replknet NAME` as a function: arguments -> exit status, in this process."""
    return functools.partial(_run, name)


def _run(name: str, arguments: list[str]) -> int:
    return main([name, *arguments])


def weights(model) -> dict[str, np.ndarray]:
    """Copies of all tensors of a network, in float32."""
    return {name: t.astype("float32").numpy().copy() for name, t in model.state_dict().items()}


def assert_identical(left, right) -> None:
    """Arrays by name, equal in each value."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def same_bits(left, right) -> set[str]:
    """The names of arrays that are the same, bit for bit."""
    return {name for name in left if left[name].tobytes() == right[name].tobytes()}


def leaves(node, prefix=""):
    """{dotted key: value} of a config."""
    values = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            values |= leaves(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def flags(**values) -> argparse.Namespace:
    """What the command line parser would give for these flags."""
    return argparse.Namespace(**values)
