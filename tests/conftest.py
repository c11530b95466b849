"""Puts the repository's root on the path, and makes tiny configurations and data sets.

On a machine with a GPU, tests see it only where they are selected by `-m gpu`: all others, and the
processes that they start, compute on the CPU.
"""

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import devices  # noqa: F401  before anything imports Paddle, which then looks for GPUs
import hypothesis
import pytest
import yaml
from tiny import ROOT, TINY, TINY31, TINYXL, make_data

from replknet_paddle.config import get_config
from replknet_paddle.model import build_replknet

pytest.register_assert_rewrite("harness")

# The same examples in each run, however busy the machine is.
hypothesis.settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("same")

# Paddle's launcher chooses ports seconds before they are bound. These are not those that Linux
# gives to connections, and each worker has its own.
_FIRST_PORT = 61000 + 1000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
os.environ["PORT_RANGE"] = f"{_FIRST_PORT}:{_FIRST_PORT + 999}"


def pytest_sessionstart(session):
    """Compile the operators before anything runs: a run and its repetition must both have them."""
    import paddle  # noqa: F401  which the library needs

    from replknet_paddle.ops.library import operators_library
    from replknet_paddle.runtime.compiler import BuildError

    with contextlib.suppress(BuildError):  # the tests that need them are skipped and say why
        operators_library().build()
        if "LK_ISA" in os.environ:  # run_tests.sh: 0 for portable code, 1 for AVX2
            kernels = ctypes.CDLL(str(operators_library().find()))
            assert kernels.lk_set_isa(int(os.environ["LK_ISA"])) == 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same random numbers of Paddle's in each run, in any order: a failure can be repeated."""
    import paddle

    paddle.seed(0)


def pytest_runtest_logreport(report):
    """Notes for run_tests.sh how long each test took; where there are workers, outside of them."""
    if "SLOWEST" in os.environ and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["SLOWEST"], "a") as file:
            file.write(f"{report.duration:7.1f} s  {report.nodeid} ({report.when})\n")


def pytest_terminal_summary(terminalreporter):
    """The figures that tests on a GPU have measured, as a table to paste."""
    from figures import table

    for line in table():
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def restore_logging():
    """Runs replace the root logger's handlers; the next test gets them as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("replknet_paddle.data.loader").setLevel(logging.NOTSET)


@pytest.fixture
def operators():
    """The compiled operators; skips where there are none for want of a compiler."""
    from replknet_paddle.ops.library import get_library, operators_library
    from replknet_paddle.runtime.compiler import BuildError, find_compiler

    try:
        find_compiler()
    except BuildError as error:
        if operators_library().find() is None:
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
    """60 training and 101 validation pictures of noise, each class brighter than the last."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, train=60, val=101)
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
