"""docs/your_own_images.ipynb: its cells run, and its commands are those of the guide."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from photographs import CLASSES, make_photographs
from test_docs import command_lines
from tiny import ROOT

NOTEBOOK = ROOT / "docs" / "your_own_images.ipynb"


def code_cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


def test_the_commands_of_the_notebook_are_those_of_the_guide():
    typed = []
    for cell in code_cells()[1:]:
        if cell.startswith("replknet("):
            exec(cell, {"replknet": lambda command: typed.append(shlex.split(command))})
    guide = [shlex.split(line)[1:] for line in command_lines("docs/your_own_images.md")]
    assert typed == [command for command in guide if command[0] != "page"]  # which does not end


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path):
    pytest.importorskip("matplotlib", reason="optional: requirements/plots.txt")
    pytest.importorskip("sklearn", reason="optional: requirements/demo.txt")
    make_photographs(tmp_path / "photos", each=14, seed=0)
    make_photographs(tmp_path / "new", each=2, seed=1_000_000)
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(code_cells()), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=900,
    )
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    lines = done.stdout.splitlines()
    # The damaged file: check-data twice, since nobody has deleted it, and predict twice.
    assert lines.count("exit status 1") == 4 and "exit status 2" not in lines
    assert "best: epoch" in done.stdout and (tmp_path / "report" / "report.html").is_file()
    shown = [line for line in lines if line.startswith("new/")]
    assert len(shown) == 2 * len(CLASSES)
