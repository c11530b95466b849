"""Where relative paths are looked up, and how commands are called from where one stands."""

import glob
import os
import shlex
import shutil
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]

# The checkout. In an installed package, which has the YAML files inside it, the package.
PROJECT_FOLDER = next(
    folder for folder in (_PACKAGE, _PACKAGE.parent) if (folder / "configs").is_dir()
)


def find_path(path: str | os.PathLike) -> str:
    """`path`, or the project's file or folder of that name where there is none here."""
    path = os.fspath(path)
    own = os.path.join(PROJECT_FOLDER, path)
    is_missing = not os.path.isabs(path) and not os.path.lexists(path)
    return own if is_missing and os.path.exists(own) else path


def tried(path: str | os.PathLike) -> str:
    """A path that was not found, for messages: with the places where it was looked for."""
    path = os.fspath(path)
    if os.path.isabs(path):
        return path
    places = dict.fromkeys([os.path.abspath(path), os.path.join(PROJECT_FOLDER, path)])
    return f"{path} (tried {' and '.join(places)})"


def tried_checkpoint(path: str | os.PathLike) -> str:
    """As `tried`, and what lies there by the same name and a suffix, if anything does."""
    names = []
    for folder in (".", PROJECT_FOLDER):
        found = glob.glob(glob.escape(os.path.join(folder, path)) + ".*")
        names += [f"{os.fspath(path)}{name[len(os.path.join(folder, path)) :]}" for name in found]
    near = f"; did you mean {min(names)}?" if names else ""
    return f"{tried(path)}{near}"


def command_line(*words: str) -> str:
    """`replknet WORDS`, as it can be typed into a shell here."""
    if shutil.which("replknet") is not None:
        return shlex.join(["replknet", *words])
    name = os.path.basename(sys.executable)
    python = name if shutil.which(name) == sys.executable else sys.executable
    return shlex.join([python, "-m", _PACKAGE.name, *words])
