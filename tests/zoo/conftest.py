"""The two networks of the reference files in tests/fixtures, and other small ones."""

from pathlib import Path

import pytest
import yaml

from replknet_paddle.config import get_config
from replknet_paddle.model import build_replknet

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


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    """Path of the YAML of a reference network: name 'tiny31' or 'tinyxl', and more MODEL keys."""
    folder = tmp_path_factory.mktemp("configs")

    def write(name: str, **keys) -> Path:
        tree = yaml.safe_load({"tiny31": TINY31, "tinyxl": TINYXL}[name])
        tree["MODEL"].update(keys)
        path = folder / f"{name}{len(list(folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture(scope="session")
def network(config_file):
    """A fresh reference network in evaluation mode: name, and more MODEL keys."""

    def build(name: str, **keys):
        model = build_replknet(get_config(str(config_file(name, **keys))))
        model.eval()
        return model

    return build
