"""Building and loading the library: once, whole, and everything goes on where it fails."""

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from replknet_paddle.commands import run_command
from replknet_paddle.ops import library as library_module
from replknet_paddle.ops.library import LibraryError, operators_library, self_test, thread_count
from replknet_paddle.runtime.compiler import BuildError, build_folder
from replknet_paddle.runtime.errors import InputError

pytestmark = pytest.mark.paddle_version

FAKE_COMPILER = """#!/bin/sh
# Writes four letters where a compiler would write its output, and counts.
[ "$1" = --version ] && { echo fake 1.0; exit 0; }
echo call >> "$CALLS"
while [ $# -gt 1 ]; do
    [ "$1" = -o ] && printf code > "$2"
    shift
done
sleep 0.1
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compiler of no code into a folder of its own; returns the file where it counts."""
    compiler = tmp_path / "fake-c++"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REPLKNET_PADDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "calls"


def test_is_built_once_and_kept_and_stays_in_use_without_a_compiler(fake, monkeypatch, capsys):
    library, seconds = operators_library().build()
    calls = fake.read_text()
    assert library.exists() and seconds > 0
    assert len(calls.splitlines()) == len(operators_library().sources) + 1  # and the linking
    assert operators_library().build() == (library, 0.0)
    assert fake.read_text() == calls
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run_command("build", []) == 1  # the image operations were never built
    assert "convolution operators built before stay in use" in capsys.readouterr().out
    assert operators_library().find() == library


def test_several_processes_build_once(fake):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=operators_library().build) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(fake.read_text().splitlines()) == len(operators_library().sources) + 1
    left = {path.suffix for path in build_folder().iterdir()}
    assert left == {".so", ""}  # the lock has no suffix; no temporary folder stays


def test_another_paddle_has_a_library_of_its_own(fake, tmp_path, monkeypatch):
    first, _ = operators_library().build()
    other = tmp_path / "paddle"
    (other / "version").mkdir(parents=True)
    (other / "version" / "__init__.py").write_text("full_version = '9.9'")
    monkeypatch.setattr(library_module, "paddle_folder", lambda: other)
    assert operators_library().find() is None
    second, _ = operators_library().build()
    assert second != first


@pytest.mark.parametrize(
    "compiler, told",
    [
        ("no-such-compiler", "CXX=no-such-compiler is not a program"),
        ("false", "false failed with status 1"),
        ("", "no C.. compiler: none of c.., g.., clang.."),
    ],
)
def test_failure_is_reported(fake, monkeypatch, compiler, told):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", compiler)
        if not compiler:
            patch.setenv("PATH", str(fake.parent))
        with pytest.raises(BuildError, match=told):
            operators_library().build()
    assert operators_library().find() is None
    assert operators_library().build()[0] == operators_library().find()


def test_the_command_says_what_is_used_where_nothing_can_be_compiled(fake, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "false")
    assert run_command("build", []) == 1
    operators, images = capsys.readouterr().out.splitlines()
    assert operators.startswith(
        "no compiled convolution operators, so Paddle's or Pillow's are used: "
        "false failed with status 1: "
    )
    assert images.startswith("no compiled image operations, so ")


@pytest.mark.parametrize("damage", [b"", b"cod", b"cOde", b"codes"])
def test_a_damaged_library_is_not_loaded_and_is_built_anew(fake, damage, caplog):
    library, _ = operators_library().build()
    library.write_bytes(damage)
    assert operators_library().find() is None
    assert caplog.messages == [f"{library} is damaged and is not loaded"]
    assert operators_library().find_or_build() == library == operators_library().find()
    assert library.read_bytes() == b"code"
    library.write_bytes(damage)
    assert run_command("build", []) == 0
    assert library.read_bytes() == b"code"


@pytest.mark.parametrize("change", ["group", "all", "owner"])
@pytest.mark.parametrize("what", ["library", "folder"])
def test_a_library_that_others_may_write_is_refused(fake, what, change, monkeypatch, capsys):
    previous = os.umask(0o002)  # as many systems have it
    try:
        library, _ = operators_library().build()
    finally:
        os.umask(previous)
    assert operators_library().find_or_build() == library
    path = library if what == "library" else library.parent
    if change != "owner":
        path.chmod({"group": 0o775, "all": 0o757}[change])
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        path = library.parent
    for use in ("find", "find_or_build", "build"):
        with pytest.raises(BuildError, match=re.escape(f"{path} may be written by other users")):
            getattr(operators_library(), use)()
    assert run_command("build", []) == 1
    assert f"used: {path} may be written by other users" in capsys.readouterr().out


def test_what_a_killed_build_leaves_goes_with_the_next(fake, tmp_path):
    compiler = tmp_path / "fake-c++"
    compiler.write_text(FAKE_COMPILER.replace("sleep 0.1", "exec sleep 600"))
    code = "from replknet_paddle.ops.library import operators_library as x; x().build()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True) as build:
        while not fake.exists():
            assert build.poll() is None
            time.sleep(0.01)
        os.killpg(build.pid, signal.SIGKILL)
    (left,) = build_folder().glob("unfinished-*")
    compiler.write_text(FAKE_COMPILER)
    library, _ = operators_library().build()
    assert {path.name for path in build_folder().iterdir()} == {library.name, "lock"}


CODE = """
import logging
logging.basicConfig(format="%(message)s")
import paddle
from replknet_paddle.model import RepLKNet
from replknet_paddle.ops import use_fast_depthwise_conv, use_fast_pointwise_conv
model = RepLKNet(large_kernel_sizes=[7] * 4, layers=[1] * 4, channels=[4] * 4)
assert use_fast_depthwise_conv(model) == use_fast_pointwise_conv(model) == 0
assert model(paddle.randn([1, 3, 32, 32])).shape == [1, 1000]
"""


@pytest.mark.parametrize(
    "compiler, why",
    [("false", "false failed with status 1"), (None, "large_kernel.*file too short")],
    ids=["no library", "a library without code"],
)
def test_without_a_library_that_loads_all_works_and_one_line_says_why(fake, compiler, why):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"CXX": compiler} if compiler else {}  # else the fake one
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "operator" in line)
    assert re.search(why, line)


def test_a_truncated_library_does_not_end_the_process(operators, tmp_path):
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    copy = shutil.copy(operators.path, folder)
    os.truncate(copy, os.path.getsize(copy) // 2)
    variables = {"CXX": "false", "REPLKNET_PADDLE_CACHE": os.fspath(tmp_path / "cache")}
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"{copy} is damaged and is not loaded" in done.stderr


@pytest.mark.parametrize("change", [lambda v: v + 0.1, lambda v: float("nan")])
@pytest.mark.parametrize(
    ("function", "algorithm", "output", "told"),
    [
        ("forward", "direct", -1, "direct, forward"),
        ("gradients", "fft", -2, "fft, input gradient"),
        ("forward_cached", None, -1, "kept spectrum"),
        ("pointwise", None, -3, "1x1, output"),
    ],
)
def test_self_test_finds_one_wrong_value(
    operators, function, algorithm, output, told, change, monkeypatch
):
    self_test(operators)
    really = getattr(operators, function)

    def wrong(shape, *pointers, **options):
        really(shape, *pointers, **options)
        if options.get("algorithm") == algorithm:
            number = ctypes.c_float.from_address(pointers[output] + 4 * 17)
            number.value = change(number.value)

    monkeypatch.setattr(operators, function, wrong)
    with pytest.raises(LibraryError, match=f"self-test failed: .*{told}"):
        self_test(operators)


def test_the_library_of_this_compiler_is_the_one_that_is_used(fake, tmp_path, monkeypatch):
    first, _ = operators_library().build()
    other = tmp_path / "other-c++"
    other.write_text(FAKE_COMPILER.replace("fake 1.0", "other 2.0"))
    other.chmod(0o755)
    os.utime(first, (1, 1))
    monkeypatch.setenv("CXX", str(other))
    second, _ = operators_library().build()
    assert operators_library().find() == second != first
    os.utime(second, (2, 2))
    monkeypatch.setenv("CXX", str(tmp_path / "fake-c++"))
    assert operators_library().build() == (first, 0.0)
    assert operators_library().find() == first


def test_threads_are_this_process_cores_shared_by_local_processes():
    cores = len(os.sched_getaffinity(0))
    assert thread_count({}) == cores
    assert thread_count({"OMP_NUM_THREADS": "1"}) == cores
    assert thread_count({"LARGE_KERNEL_THREADS": "3"}) == 3
    launched = {
        "PADDLE_CURRENT_ENDPOINT": "10.0.0.1:6170",
        "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:6170,10.0.0.1:6171,10.0.0.2:6170,10.0.0.2:6171",
    }
    assert thread_count(launched) == max(1, cores // 2)
    for wrong in ("0", "-1", "many", "2.5", "", "65"):
        with pytest.raises(InputError, match="LARGE_KERNEL_THREADS"):
            thread_count({"LARGE_KERNEL_THREADS": wrong})
