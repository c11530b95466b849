"""Packages that only some ways of deploying need."""

import importlib
import importlib.util
from types import ModuleType

from replknet_paddle.runtime.errors import InputError

REQUIREMENTS = "requirements/deploy.txt"


def is_installed(name: str) -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def import_extra(name: str, requirements: str = REQUIREMENTS) -> ModuleType:
    """The package `name`, which the file `requirements` lists.

    Raises:
        InputError: it is missing, or does not load.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs {name} ({error}); pip install -r {requirements}") from None
