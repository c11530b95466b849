"""What no file of the project may do. Directions between packages are import-linter's part."""

import ast
import os
import subprocess
import sys

import pytest
from tiny import ROOT

FACES = ("replknet.py", "datasets.py", "config.py", "main_single_gpu.py", "main_multi_gpu.py")
PACKAGE = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "replknet_paddle").rglob("*.py"))
ADAPTERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "integrations").rglob("*.py"))
FILES = sorted([*FACES, *PACKAGE, *ADAPTERS, "hubconf.py"])

# Modules that run code from the data they read.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# One reads pickles as data, by Python's unpickler with all replaced that looks up or calls; the
# other writes .pdparams, which are pickles.
ALLOWED_PICKLE = {f"replknet_paddle/checkpoints/{name}.py" for name in ("pickles", "files")}


def tree_of(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def imports(name):
    """Top-level names of everything that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found.add(node.module.split(".")[0])
    return found


def dotted(node):
    """`a.b.c` of an expression of names and attributes."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def calls(name):
    """(dotted name, node) of every call, with the names as imported: `from a import b as c` makes
    `c()` a call of `a.b`."""
    tree = tree_of(name)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = dotted(node.func).split(".")
            yield ".".join([known.get(first, first), *rest]), node


def test_the_network_imports_paddle_alone():
    assert imports("replknet_paddle/layers.py") == {"paddle", "math"}
    assert imports("replknet_paddle/model.py") == {"paddle", "dataclasses", "replknet_paddle"}
    assert "from replknet_paddle.layers import" in (ROOT / "replknet_paddle/model.py").read_text()


def test_the_package_imports_no_face_and_no_test():
    names = {name.removesuffix(".py") for name in FACES} | {"tests", "conftest", "pytest"}
    for name in PACKAGE:
        assert not imports(name) & names, name


@pytest.mark.parametrize("name", FACES)
def test_a_face_is_a_few_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= 20


def test_nothing_imports_what_can_unpickle():
    guilty = {name for name in FILES if imports(name) & UNPICKLERS}
    assert guilty <= ALLOWED_PICKLE


@pytest.mark.parametrize("name", sorted(ALLOWED_PICKLE))
def test_of_pickle_only_opcodes_and_writing_are_used(name):
    tree = tree_of(name)
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name == "pickle"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module != "pickle", "import the module, so that its uses can be seen"
    attributes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases
    ]
    harmless = {"dump", "dumps", "Pickler"}
    if name.endswith("pickles.py"):  # what it replaces there: tests/checkpoints
        harmless |= {"Unpickler"}
    assert all(node.attr.isupper() or node.attr in harmless for node in attributes)
    bare = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in aliases]
    assert len(bare) == len(attributes)  # the module itself is handed to nobody: getattr(op, ...)


@pytest.mark.parametrize("name", FILES)
def test_no_file_runs_code_from_data(name):
    forbidden = {"paddle.load", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    forbidden |= {"paddle.framework.io.load", "eval", "exec", "os.system", "os.popen"}
    for called, node in calls(name):
        assert called not in forbidden, f"line {node.lineno}: {called}"
        keywords = {k.arg: k.value for k in node.keywords}
        for keyword in ("allow_pickle", "shell"):
            value = keywords.get(keyword)
            assert value is None or (isinstance(value, ast.Constant) and value.value is False), (
                f"line {node.lineno}: {keyword}"
            )


def run_python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
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
        "from replknet_paddle.commands import COMMANDS, command_module\n"
        "list(map(command_module, COMMANDS))",
    ],
    ids=["config and model names", "help of every command"],
)
def test_what_must_answer_at_once_does_not_import_paddle(code):
    done = run_python(f"import sys\n{code}\nsys.exit('paddle' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_test_files_have_names_of_their_own():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
