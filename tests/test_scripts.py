"""The shell scripts, as far as they go without a data set of their own."""

import os
import re
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


@pytest.mark.slow
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
    "-m pytest "*)
        echo "LK_ISA=${LK_ISA:-} ONEDNN=${ONEDNN_MAX_CPU_ISA:-} $*"
        echo "    1.5 s  a test" >> "$SLOWEST"
        exit 1 ;;
esac
"""


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_every_step_of_the_tests_runs_though_one_before_it_failed(tmp_path, flags):
    python = tmp_path / "python"
    python.write_text(FAILING_PYTHON)
    python.chmod(0o755)
    done = sh("run_tests.sh", *flags, "-k", "merging", PYTHON=str(python))
    assert done.returncode == 1 and "== processor: " in done.stdout
    calls = [line for line in done.stdout.splitlines() if "-m pytest" in line]
    assert all(call.endswith(" -k merging") for call in calls)
    assert [re.sub(" -m pytest -n [0-9]+ -m| -k merging", "", call) for call in calls] == [
        "LK_ISA= ONEDNN= not slow",
        "LK_ISA= ONEDNN= slow",
        "LK_ISA=1 ONEDNN=AVX2 numbers and not slow",
        "LK_ISA=0 ONEDNN=SSE41 numbers and not slow",
    ][: None if flags else 1]
    assert done.stdout.count(": status 1") == len(calls)
    steps = done.stdout.partition("== steps\n")[2]
    assert "s  set-up\n" in steps and "s  ruff\n" in steps and " s in all\n" in steps
    assert steps.count("1.5 s  a test\n") == len(calls)


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.sh")))
def test_scripts_are_posix_sh_and_executable(script):
    path = ROOT / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True)
