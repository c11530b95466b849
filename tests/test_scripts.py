"""The shell scripts, as far as they go without a data set of their own."""

import os
import subprocess
import sys

import pytest
from tiny import ROOT


def sh(script, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", str(ROOT / script), *map(str, arguments)],
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("script", ["run_train_multi.sh", "run_eval_multi.sh"])
def test_flags_after_the_script_win_over_its_own(script):
    done = sh(script, "-batch_size=7", "-cfg=configs/replknet_xl.yaml", "--print_config")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "  BATCH_SIZE: 7" in lines and "  NAME: replknet_xl" in lines
    assert f"EVAL: {str('eval' in script).lower()}" in lines and "AMP: true" in lines


BARE = f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n'  # no site-packages


@pytest.mark.parametrize(
    "python, status, says",
    [
        (sys.executable, 0, []),
        ("{bare}", 2, ["No module named 'paddle'", "lacks the package"]),
        ("no-such-python", 2, ["no-such-python is no program"]),
    ],
)
def test_setup_uses_an_environment_that_has_paddle(tmp_path, python, status, says):
    bare = tmp_path / "python"
    bare.write_text(BARE)
    bare.chmod(0o755)
    done = sh("setup_env.sh", PYTHON=python.format(bare=bare))
    assert done.returncode == status, done.stderr
    assert done.stdout.strip() == ("" if status else sys.executable)
    assert all(part in done.stderr for part in says)


@pytest.mark.parametrize("script", sorted(p.name for p in ROOT.glob("*.sh")))
def test_scripts_are_posix_sh_and_executable(script):
    path = ROOT / script
    assert path.read_text().startswith("#!/bin/sh\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True)
