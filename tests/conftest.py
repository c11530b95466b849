"""Puts the repository's root on the path, and makes tiny configurations and data sets."""

import contextlib
import os
import subprocess
import sys

import pytest
from tiny import ROOT, TINY, make_data

sys.path.insert(0, str(ROOT))


def pytest_sessionstart(session):
    """Compile the operators before anything runs: a run and its repetition must both have them."""
    from replknet_paddle.ops.build import BuildError, build

    with contextlib.suppress(BuildError):  # the tests that need them are skipped and say why
        build()


@pytest.fixture
def operators():
    """The compiled operators; skips where there are none for want of a compiler."""
    from replknet_paddle.ops.build import BuildError, find_compiler, find_library
    from replknet_paddle.ops.library import get_library

    try:
        find_compiler()
    except BuildError as error:
        if find_library() is None:
            pytest.skip(str(error))
    return get_library()


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
