"""The types that editors and type checkers see in the public API."""

import ast
import os
import subprocess
import sys
from typing import get_args

import pytest
from harness import make_run
from tiny import FIXTURES, ROOT

import replknet_paddle
from replknet_paddle import list_models
from replknet_paddle.zoo.records import ModelName

# yacs has no types: to mypy all that is in it is Any.
YACS = "class CfgNode(dict[str, object]): ...\n"

# What mypy says of each line, by its first words.
MISTAKES = {
    "from replknet_paddle import get_modle": 'Module "replknet_paddle" has no attribute',
    "from replknet_paddle import get_model, inference_model, load_pretrained": None,
    "model = get_model('replknet-31b-1k-224')": None,
    "model.forward_features('photo.jpg')": 'Argument 1 to "forward_features"',
    "model.num_features.upper()": '"int" has no attribute "upper"',
    "get_model('output/RUN', num_classes='3')": "No overload variant",
    "load_pretrained('weights.pth', model)": 'Argument 1 to "load_pretrained"',
    "inference_model(model, 'photo.jpg')['class']": 'TypedDict "Classification" has no key "class"',
    "inference_model(model, ['photo.jpg'])['pred_class']": "No overload variant",
}


@pytest.mark.slow
def test_mypy_knows_the_types_and_finds_every_mistake(tmp_path):
    (tmp_path / "yacs").mkdir()
    (tmp_path / "yacs" / "__init__.pyi").touch()
    (tmp_path / "yacs" / "config.pyi").write_text(YACS)
    mistakes = tmp_path / "mistakes.py"
    mistakes.write_text("\n".join(MISTAKES) + "\n")
    flags = ["--strict", "--disallow-any-expr"]
    flags += ["--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]  # only the two files
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, ROOT / "tests" / "typed_use.py", mistakes],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert done.stderr == ""
    said = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line for line in said if "mistakes.py" not in line] == []
    for number, (code, expected) in enumerate(MISTAKES.items(), 1):
        of_line = [line.split(": error: ")[1] for line in said if f"py:{number}:" in line]
        assert bool(of_line) == bool(expected), code
        assert all(text.startswith(expected) for text in of_line[:1]), (code, of_line)


def test_what_mypy_reads_runs(tmp_path):
    (tmp_path / "run").mkdir()
    run = make_run(tmp_path / "run")
    picture = FIXTURES / "images" / "landscape_499x375.jpg"
    subprocess.run(
        [sys.executable, ROOT / "tests" / "typed_use.py", run, picture],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def test_names_are_imported_from_where_type_checkers_are_told():
    tree = ast.parse((ROOT / "replknet_paddle" / "__init__.py").read_text())
    told = {
        alias.name: statement.module
        for block in tree.body
        if isinstance(block, ast.If)
        for statement in block.body
        for alias in statement.names
    }
    assert told == replknet_paddle._PLACES
    assert sorted(["__version__", *told]) == replknet_paddle.__all__ == dir(replknet_paddle)


def test_editors_offer_the_published_names():
    assert list(get_args(ModelName)) == list_models()
