"""Verbs that are packages too: `fluxc.capture(...)` is a call, `fluxc.capture.sources` a module.

Python binds a subpackage to its name in the parent as soon as anything in it is imported, so the package itself has
to be callable.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """A package whose call runs its verb; `__verb__` is "module:function"."""

    __verb__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, _, function = self.__verb__.partition(":")
        return getattr(importlib.import_module(module), function)(*args, **kwargs)


def make_callable(package: str, verb: str) -> None:
    """Make the package `package` (its `__name__`) callable: calling it runs `verb`, "module:function"."""
    module = sys.modules[package]
    module.__class__ = _CallablePackage
    module.__verb__ = verb  # type: ignore[attr-defined]
