"""Sphinx extension: autodoc can import the module where torch and other libraries are not installed.

Unlike autodoc's own mocks, the attributes of a stand-in module are classes, so that they can be subclassed and
registered with functools.singledispatch.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from sphinx.application import Sphinx

NAMES = ("torch", "einops", "safetensors", "tqdm", "scipy", "numpy", "matplotlib", "matplotlib_inline", "ipywidgets",
         "pooch")  # fmt: skip


class _Anything(type):
    """A class whose attributes are all such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name, f"{cls.__module__}.{cls.__qualname__}")

    def __getitem__(cls, item: Any) -> Any:
        return cls


class _Base:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function  # a decorator returns the function unchanged

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name, "")


def _make(name: str, module: str) -> Any:
    return _Anything(name, (_Base,), {"__module__": module})


class _Module(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # submodules can be imported from it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _make(name, self.__name__)
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.missing else None

    def __init__(self, missing: list[str]) -> None:
        self.missing = missing

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def setup(app: Sphinx) -> dict[str, bool]:
    """Register stand-ins for those of ``NAMES`` that are not installed.

    Args:
        app: the Sphinx application.

    Returns:
        dict[str, bool]: what Sphinx asks of an extension.
    """
    missing = [name for name in NAMES if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(missing))
    sys.path.insert(0, str(app.srcdir))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
