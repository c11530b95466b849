"""Packages that only some commands need, which pyproject.toml lists as extras."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from replknet_paddle.runtime.errors import InputError

# Beside the package in a checkout; an installed package has none.
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"


def is_installed(name: str) -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def install_command(extra: str) -> str:
    """The pip command that installs the packages of an extra.

    Args:
        extra: of pyproject.toml, and name of a file in requirements/.
    """
    file = REQUIREMENTS / f"{extra}.txt"
    return f"pip install -r {file}" if file.is_file() else f'pip install "replknet-paddle[{extra}]"'


def import_extra(name: str, extra: str) -> ModuleType:
    """Import the package or module `name`, which belongs to `extra`.

    Raises:
        InputError: it is missing, or does not load; the message has the pip command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this needs {name.partition('.')[0]} ({error}); {install_command(extra)}"
        ) from None
