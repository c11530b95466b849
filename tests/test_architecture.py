"""What no file of the project may do. Directions between packages are import-linter's part."""

import os
import re
import subprocess
import sys

import pytest
from tiny import ROOT

FACES = ("replknet.py", "datasets.py", "config.py", "main_single_gpu.py", "main_multi_gpu.py")
PACKAGE = sorted((ROOT / "replknet_paddle").rglob("*.py"))
FILES = [*(ROOT / name for name in (*FACES, "hubconf.py")), *PACKAGE]
FILES += sorted((ROOT / "integrations").rglob("*.py"))

# What runs code from the data that it reads, and imports that hide where they lead.
FORBIDDEN = re.compile(
    r"""
    \b(torch|paddle|paddle\.framework\.io)\.load\( | \byaml\.(load|unsafe_load|full_load)\( |
    (?<![\w.])(eval|exec)\((?!\)) | \bos\.(system|popen)\( | (allow_pickle|shell)=(?!False) |
    \b(import|from)\s+(cPickle|cloudpickle|dill|joblib|marshal|shelve)\b | ^\s*from\s+\. |
    \b(import|from)\s+(tests|conftest|pytest|replknet|datasets|main_single_gpu)\b
    """,
    re.VERBOSE | re.MULTILINE,
)
# Only there, and there as data: tests/checkpoints.
PICKLE = re.compile(r"^\s*(import|from)\s+_?pickle\b", re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_code_from_data_or_imports_a_face_or_a_test(path):
    text = path.read_text(encoding="utf-8")
    code = re.sub(r'""".*?"""|#.*?$', "", text, flags=re.MULTILINE | re.DOTALL)
    assert not FORBIDDEN.findall(code)
    assert path.parent.name == "checkpoints" or not PICKLE.findall(code)


@pytest.mark.parametrize("name", FACES)
def test_a_face_is_a_few_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 20


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_import_prints_nothing():
    """Of ours: Paddle's own import may warn, so it goes first."""
    done = run_python("""
import sys
import numpy, paddle, PIL.Image, yaml, yacs.config
for stream in (sys.stdout, sys.stderr):
    print("-- ours from here", file=stream, flush=True)
import config, replknet, datasets
import replknet_paddle.engine.run
config.get_config()
""")
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        assert output.split("-- ours from here\n")[1] == ""


@pytest.mark.parametrize(
    "code",
    [
        "import replknet_paddle; replknet_paddle.get_config(); replknet_paddle.list_models()",
        "from replknet_paddle.commands import COMMANDS, help_of\nlist(map(help_of, COMMANDS))",
        "import replknet_paddle.analysis.plots",
    ],
    ids=["config and model names", "help of every command", "plots"],
)
def test_what_must_answer_at_once_does_not_import_paddle(code):
    done = run_python(f"import sys\n{code}\nsys.exit('paddle' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_test_files_have_names_of_their_own():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
