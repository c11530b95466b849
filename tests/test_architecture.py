"""The directions of DESIGN that import-linter, which follows packages alone, cannot see; and what
no file of the project may do."""

import ast
import os
import subprocess
import sys

import pytest
from tiny import ROOT

MODULES = {path.stem for path in ROOT.glob("*.py")}
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}

# What each file of the top level may import of the project.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "replknet": set(),
    "losses": {"errors"},
    "distributed": {"errors"},
    "loader": {"errors", "transforms"},
    "datasets": {"errors", "transforms", "loader"},
    "list_files": {"errors", "transforms", "datasets"},
    "main_single_gpu": {"engine"},
    "main_multi_gpu": {"engine"},
}

# What the folders may import of the files of the top level; import-linter checks the folders
# among themselves.
ALLOWED_OF_FOLDERS = {
    "transforms": {"errors"},
    "optim": {"errors"},
    "ops": {"errors"},
    "analysis": {"errors"},
    "zoo": {"errors", "config", "replknet"},
    "engine": {"errors", "config", "replknet", "losses", "distributed", "datasets", "loader"},
    "deploy": {"errors", "config", "replknet", "losses", "distributed", "datasets", "loader"},
    "tools": {
        "errors",
        "config",
        "replknet",
        "losses",
        "distributed",
        "datasets",
        "loader",
        "list_files",
    },
}

# Modules that run code from the data they read.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# The zoo reads pickles by an interpreter of its own, which needs the names of the opcodes, and
# writes .pdparams, which are pickles; neither loads one.
ALLOWED_PICKLE = {"zoo/readers.py", "zoo/unpickle.py", "zoo/writers.py"}


def project_files():
    """The Python files that are, or can be, under version control, tests left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not names:  # no checkout
        names = [str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")]
        names += [
            str(p.relative_to(ROOT)) for name in FOLDERS for p in ROOT.glob(f"{name}/**/*.py")
        ]
    return sorted(n for n in names if not n.startswith("tests/") and (ROOT / n).is_file())


def tree_of(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), filename=name)


def imports(name):
    """Top-level names of all that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # relative: within its own folder
                assert "/" in name, f"{name} imports relatively"
            else:
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
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = dotted(node.func).split(".")
            yield ".".join([known.get(first, first), *rest]), node


FILES = project_files()


def test_every_file_of_the_top_level_has_its_directions_here():
    assert MODULES == ALLOWED.keys()
    assert FOLDERS <= ALLOWED_OF_FOLDERS.keys()


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_a_file_of_the_top_level_imports_what_it_may(module):
    assert imports(f"{module}.py") & (MODULES | FOLDERS) <= ALLOWED[module]


def test_the_network_imports_paddle_alone():
    assert imports("replknet.py") == {"paddle", "math"}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_of_the_top_level_what_it_may(folder):
    for name in FILES:
        if name.startswith(f"{folder}/"):
            assert imports(name) & MODULES <= ALLOWED_OF_FOLDERS[folder], name


def test_the_project_imports_no_tests():
    for name in FILES:
        assert not imports(name) & {"tests", "conftest", "pytest"}, name


def test_nothing_imports_what_can_unpickle():
    guilty = {name for name in FILES if imports(name) & UNPICKLERS}
    assert guilty <= ALLOWED_PICKLE


@pytest.mark.parametrize("name", sorted(ALLOWED_PICKLE))
def test_the_zoo_uses_of_pickle_opcodes_and_writing_alone(name):
    tree = tree_of(name)
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name for a in node.names if a.name == "pickle"}
        elif isinstance(node, ast.ImportFrom):
            assert node.module != "pickle", "import the module, so that its uses can be seen"
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases
    }
    harmless = {attribute for attribute in used if attribute.isupper()} | {
        "dump",
        "dumps",
        "Pickler",
    }
    assert used <= harmless
    bare = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in aliases]
    attributes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and dotted(node.value) in aliases
    ]
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


def test_import_prints_nothing():
    """Of ours: Paddle's own import may warn, so it goes first."""
    code = """
import sys
import numpy, paddle, PIL.Image, yaml, yacs.config
for stream in (sys.stdout, sys.stderr):
    print("-- ours from here", file=stream, flush=True)
import config, replknet, datasets
import losses, distributed, errors
config.get_config()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        assert output.split("-- ours from here\n")[1] == ""


def test_config_and_errors_need_no_paddle():
    """So that a mistake in a config is told at once."""
    code = "import sys, config; config.get_config(); sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
