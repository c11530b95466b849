"""What the tests of both adapters share: an adapter imported beside stubs, YAML files, clones."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import yaml
from tiny import ROOT

FOLDER = ROOT / "integrations"


def import_with_stubs(monkeypatch, module: str, stubs: dict[str, dict]) -> ModuleType:
    """A fresh import of an adapter, with modules of these contents in place of the project's."""
    for name, content in stubs.items():
        stub = ModuleType(name)
        stub.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setitem(sys.modules, module, None)  # so that the import below is undone
    del sys.modules[module]
    return importlib.import_module(module)


class Loader(yaml.SafeLoader):
    """Reads PaddleDetection's tagged mappings as mappings."""


Loader.add_multi_constructor("!", lambda loader, tag, node: loader.construct_mapping(node, True))


def read_yaml(path: Path) -> dict:
    """A configuration with those of its `_BASE_` below it, as PaddleDetection merges them."""
    tree = yaml.load(path.read_text(), Loader)
    merged: dict = {}
    for base in tree.pop("_BASE_", []):
        merge(merged, read_yaml(path.parent / base))
    return merge(merged, tree)


def merge(tree: dict, over: dict) -> dict:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value
    return tree


def is_norm(name: str) -> bool:
    """Whether the YAML files' rule, `norm` or `bn` in the name, takes a parameter for a norm's."""
    return "norm" in name or "bn" in name


def clone_of(package: str) -> Path | None:
    """The clone of the project that has `package`, if it is on the path."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def launch(script: Path, *arguments, cwd: Path) -> str:
    """What `integrations/launch.py` printed, in a process of its own, which must succeed."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "launch.py"), str(script), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr
