"""Runs that nothing happened to, one of each per session, for others to be compared with."""

import pytest
from processes import finish, finish_ranks


@pytest.fixture
def run_flags(tiny_config_file, tiny_data):
    """Flags of a tiny run, 4 epochs of 3 steps in one process, but for its folder."""
    return [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}"]


@pytest.fixture(scope="session")
def straight(tiny_config_file, tiny_data, tmp_path_factory):
    """The folder of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    finish(
        [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", f"-output={folder / 'run'}"],
        output=folder / "log",
    )
    return folder / "run"


@pytest.fixture(scope="session")
def straight_on_two(tiny_config_file, tiny_data, tmp_path_factory):
    """The same in two processes with half the batch each, dropping out alike."""
    folder = tmp_path_factory.mktemp("straight_on_two")
    flags = [f"-cfg={tiny_config_file}", f"-data_path={tiny_data}", "-batch_size=4"]
    finish_ranks([*flags, f"-output={folder / 'run'}"], folder=folder)
    return folder / "run"
