"""A tiny segmentation configuration and datasets of shapes."""

import numpy as np
import paddle
import pytest

from replknet_paddle.checkpoints.files import write_safetensors
from replknet_paddle.config import get_config
from replknet_paddle.data.make_lists import make_shapes
from replknet_paddle.segmentation.upernet import build_upernet

TINY = """
DATA:
  BATCH_SIZE: 2
  IMAGE_SIZE: 32
  NUM_WORKERS: 0
MODEL:
  TYPE: UPerNet
  NAME: tiny_upernet
  NUM_CLASSES: 4
  OUT_INDICES: [0, 1, 2, 3]
  DROPPATH: 0.1
  LARGE_KERNEL_SIZES: [7, 7, 5, 5]
  LAYERS: [1, 1, 1, 1]
  CHANNELS: [4, 6, 8, 10]
TRAIN:
  NUM_EPOCHS: 3
  WARMUP_EPOCHS: 0
  ACCUM_ITER: 2
  BASE_LR: 1.0e-3
  WARMUP_START_LR: 1.0e-9
  END_LR: 0.0
  MODEL_EMA_DECAY: 0.9
SEGMENTATION:
  HEAD_CHANNELS: 8
  AUX_CHANNELS: 4
  EPOCH_STEPS: 4
  WARMUP_STEPS: 2
  RESIZE: [64, 64]
"""


@pytest.fixture(scope="session")
def tiny_upernet_file(tmp_path_factory):
    """A network of 15,000 parameters, with an EMA and accumulated gradients."""
    path = tmp_path_factory.mktemp("configs") / "tiny_upernet.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """20 images, 4 of them for validation."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(str(folder), count=20)
    return folder


@pytest.fixture(scope="session")
def run_folder(tiny_upernet_file, tmp_path_factory):
    """A run folder with weights that tell classes apart, and sliding windows."""
    folder = tmp_path_factory.mktemp("run")
    text = tiny_upernet_file.read_text()
    (folder / "config.yaml").write_text(
        f"{text}  SLIDE_STRIDE: 21\n  PALETTE: 202020 e6194b 3cb44b 4363d8\n"
    )
    config = get_config(folder / "config.yaml")
    paddle.seed(3)
    network = build_upernet(config)
    rng = np.random.default_rng(0)
    network.train()
    for _ in range(40):
        network(paddle.to_tensor(rng.normal(size=(4, 3, 32, 32)).astype("float32")))
    weight = network.decode_head.conv_seg.weight
    weight.set_value(rng.normal(0, 2, weight.shape).astype("float32"))
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    write_safetensors(folder / "best", state, {})
    return folder
