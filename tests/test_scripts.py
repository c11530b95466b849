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


def test_flags_after_the_script_win_over_its_own():
    done = sh(
        "run_eval_multi.sh", "-batch_size=7", "-cfg=configs/replknet_xl.yaml", "--print_config"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "  BATCH_SIZE: 7" in lines and "  NAME: replknet_xl" in lines
    assert "EVAL: true" in lines and "AMP: true" in lines


def test_setup_uses_an_environment_that_has_paddle():
    done = sh("setup_env.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.executable


def test_setup_says_what_an_environment_lacks(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # no site-packages
    python.chmod(0o755)
    for name, says in (
        (str(python), ["No module named 'paddle'", "lacks the package"]),
        ("no-such-python", ["no-such-python is no program"]),
    ):
        done = sh("setup_env.sh", PYTHON=name)
        assert done.returncode == 2 and all(part in done.stderr for part in says)


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.sh")))
def test_scripts_are_posix_sh_and_executable(script):
    path = ROOT / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True)
