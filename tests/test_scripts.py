"""The shell scripts, as far as they go without a data set of their own."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT


def sh(script, *arguments, **environment):
    return subprocess.run(
        ["sh", str(ROOT / script), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_without_imagenet_they_say_what_to_prepare(script, tmp_path):
    missing = tmp_path / "imagenet"
    weights = tmp_path / "weights.pdparams"
    done = sh(script, f"-data_path={missing}", f"-pretrained={weights}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(missing) in done.stderr or str(weights) in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3  # the message, and no more than Paddle's own


def test_training_without_data_describes_the_layout(tmp_path):
    done = sh("run_train_multi.sh", f"-data_path={tmp_path / 'imagenet'}")
    assert "train_list.txt and val_list.txt" in done.stderr


def test_flags_after_the_script_win_over_its_own():
    done = sh(
        "run_eval_multi.sh", "-batch_size=7", "-cfg=configs/replknet_xl.yaml", "--print_config"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "  BATCH_SIZE: 7" in lines and "  NAME: replknet_xl" in lines
    assert "EVAL: true" in lines and "AMP: true" in lines


def test_number_of_restarts_must_be_a_number(tmp_path):
    done = sh("run_train_multi.sh", MAX_RESTARTS="many")
    assert done.returncode == 2
    assert "MAX_RESTARTS is many" in done.stderr


def test_setup_uses_an_environment_that_has_paddle():
    done = sh("setup_env.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable


def test_setup_says_what_an_environment_without_paddle_lacks(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # no site-packages
    python.chmod(0o755)
    done = sh("setup_env.sh", PYTHON=str(python))
    assert done.returncode == 2
    assert "No module named 'paddle'" in done.stderr and "lacks the package" in done.stderr


def test_setup_refuses_a_python_that_is_not_there():
    done = sh("setup_env.sh", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python is no program" in done.stderr


# Stands for Python: tests fail, on every call; everything else is done and says nothing.
FAILING_PYTHON = """#!/bin/sh
case "$*" in
    "-m pytest "*) echo "LK_ISA=${LK_ISA:-} ONEDNN=${ONEDNN_MAX_CPU_ISA:-} $*"; exit 1 ;;
    *importlib.metadata*) echo "Paddle 0.0" ;;
esac
"""


def test_every_step_of_the_tests_runs_though_one_before_it_failed(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAILING_PYTHON)
    python.chmod(0o755)
    done = sh("run_tests.sh", "-k", "merging", PYTHON=str(python))
    assert done.returncode == 1 and "== processor: " in done.stdout
    calls = [line for line in done.stdout.splitlines() if "-m pytest" in line]
    assert [call.split()[:2] for call in calls] == [
        ["LK_ISA=", "ONEDNN="],
        ["LK_ISA=", "ONEDNN="],
        ["LK_ISA=1", "ONEDNN=AVX2"],
        ["LK_ISA=0", "ONEDNN=SSE41"],
    ]
    assert all(call.endswith(" -k merging") for call in calls)
    assert done.stdout.count(": status 1") == 4
    files = {word.removeprefix("--ignore=") for call in calls for word in call.split()}
    files = {word for word in files if word.startswith("tests/")}
    assert len(files) > 20 and all((ROOT / word).exists() for word in files)


@pytest.mark.parametrize(
    "paddle, status",
    [
        ("works", 0),
        ("raises", 2),  # e.g. cuDNN of another version, or a GPU it has no machine code for
        ("sees no GPU", 2),  # e.g. a driver that is too old
        ("for CPU", 0),
    ],
)
def test_setup_checks_that_paddle_computes_on_the_gpu(tmp_path, paddle, status):
    listing = tmp_path / "nvidia-smi"
    listing.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")
    python = tmp_path / "python"  # a sitecustomize of its own stands for the GPU build
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(tmp_path / "fake")!r})
"""
    )
    (tmp_path / "fake" / "paddle").mkdir(parents=True)
    (tmp_path / "fake" / "paddle" / "__init__.py").write_text(
        f"""
from types import SimpleNamespace
state = {paddle!r}
__version__ = "2.6.2"
def is_compiled_with_cuda(): return state != "for CPU"
device = SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: int(state != "sees no GPU")))
def run_check():
    if state == "raises":
        raise RuntimeError("(External) CUDA error(209), no kernel image is available")
    print("PaddlePaddle works well on 1 GPU")
utils = SimpleNamespace(run_check=run_check)
"""
    )
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n',
    )
    for program in (listing, python):
        program.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = sh("setup_env.sh", PYTHON=str(python), PATH=path, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == status, done.stderr
    if status:
        assert "paddlepaddle-gpu 3.x" in done.stderr and "PYTHON" in done.stderr
        assert done.stdout == ""
        hidden = sh("setup_env.sh", PYTHON=str(python), PATH=path, CUDA_VISIBLE_DEVICES="")
        assert hidden.returncode == 0, hidden.stderr
    else:
        assert done.stdout.strip() == str(python)


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.sh")))
def test_scripts_are_posix_sh_and_executable(script):
    path = ROOT / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True)
