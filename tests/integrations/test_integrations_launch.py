"""The launcher: what a script of a clone finds when it starts."""

import subprocess
import sys

import pytest
from adapters import FOLDER, launch
from tiny import ROOT

SCRIPT = """
import sys
import paddleseg.cvlibs
import config
print("registered", *paddleseg.cvlibs.manager.BACKBONES.names)
print("config", config.OWNER)
print("argv", *sys.argv)
print("name", __name__)
"""

MANAGER = """
class BACKBONES:
    names = []

    @classmethod
    def add_component(cls, component):
        cls.names.append(component.__name__)
        return component
"""


@pytest.fixture
def clone(tmp_path):
    """A folder laid out as PaddleSeg is, with a module of its own that is named as one of ours."""
    (tmp_path / "paddleseg" / "cvlibs").mkdir(parents=True)
    (tmp_path / "tools").mkdir()
    (tmp_path / "paddleseg" / "__init__.py").write_text("")
    (tmp_path / "paddleseg" / "cvlibs" / "__init__.py").write_text("from . import manager")
    (tmp_path / "paddleseg" / "cvlibs" / "manager.py").write_text(MANAGER)
    (tmp_path / "config.py").write_text("OWNER = 'clone'")
    (tmp_path / "tools" / "train.py").write_text(SCRIPT)
    return tmp_path


def test_a_script_starts_with_the_backbone_registered_and_its_own_modules(clone, tmp_path):
    script = clone / "tools" / "train.py"
    lines = launch(script, "--config", "x.yml", cwd=tmp_path).splitlines()
    assert "registered RepLKNet" in lines
    assert "config clone" in lines
    assert f"argv {script} --config x.yml" in lines
    assert "name __main__" in lines


@pytest.mark.parametrize("script", ["none.py", str(ROOT / "setup.py")])
def test_a_script_of_no_clone_is_one_message(script):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "launch.py"), script],
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {script} is not a script in a clone of PaddleSeg or")
