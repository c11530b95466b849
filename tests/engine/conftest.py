"""The runs of this folder's tests evaluate often, and so on few images."""

import shutil

import pytest
from harness import run_flags, straight, straight_on_two  # noqa: F401  with these images
from tiny import make_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """60 training and 23 validation pictures of noise, each class brighter than the last."""
    folder = tmp_path_factory.mktemp("engine_data")
    make_data(folder, train=60, val=23)  # multiples of no batch size and of no number of ranks
    return folder


@pytest.fixture
def validation_images(tiny_data):
    """How many there are."""
    return len((tiny_data / "val_list.txt").read_text().splitlines())


@pytest.fixture
def own_data(tiny_data, tmp_path):
    """A copy of the data, and the validation image that is read last."""
    shutil.copytree(tiny_data, tmp_path / "data")
    last = (tmp_path / "data" / "val_list.txt").read_text().splitlines()[-1].rsplit(" ", 1)[0]
    return tmp_path / "data", tmp_path / "data" / last
