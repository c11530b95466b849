"""A stand-in for Paddle, where tests/no_paddle is on PYTHONPATH: it is imported, but not called.

Tests that pass with it do not depend on Paddle, so run_tests.sh runs them once and not on each
version. Classes can be derived from what it has, as `ListDataset` is from `paddle.io.Dataset`.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Absent(type):
    """A class for each name in Paddle, with an attribute for each name in that."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args, **kwargs):
        if not cls.__dict__.get("is_absent"):  # a class of ours, derived from one of these
            return super().__call__(*args, **kwargs)
        if cls.__qualname__ == "paddle.no_grad":  # decorates functions at import
            return lambda function: function
        raise RuntimeError(f"{cls.__qualname__} is called: this test depends on Paddle")


def _make(qualified_name: str) -> _Absent:
    name = qualified_name.rsplit(".", 1)[-1]
    return _Absent(name, (), {"__qualname__": qualified_name, "is_absent": True})


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("paddle."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Submodules())
sys.modules[__name__].__class__ = _Module
