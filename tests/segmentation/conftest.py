"""A tiny segmentation configuration and datasets of shapes."""

import pytest

from replknet_paddle.data.make_lists import make_shapes

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
