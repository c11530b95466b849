"""Puts the repository's root on the path, and makes what many tests need: tiny configurations and
tiny data sets in list files."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FIXTURES = Path(__file__).resolve().parent / "fixtures"

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


@pytest.fixture(scope="session")
def tiny_config_file(tmp_path_factory):
    """A network of 11,000 parameters with all of the recipe's augmentation on."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """40 training and 101 validation pictures of noise, each class brighter than the last."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, train=40, val=101)
    return folder


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


@pytest.fixture
def run_main():
    """Runs a main in a process of its own, on one thread; returns the finished process."""

    def run(*arguments, script="main_multi_gpu.py", timeout=300):
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


def flags(**values) -> argparse.Namespace:
    """What the command line parser would give for these flags."""
    return argparse.Namespace(**values)
