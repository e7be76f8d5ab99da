"""Lazy imports of a package's public names, so that modules that do not need torch are imported without it."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def on_demand(package: str, **modules: Iterable[str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package that imports its public names on first use.

    Args:
        package: the package's ``__name__``.
        modules: for each module of the package, the public names in it.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the package's own
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return __getattr__
