"""Public names of a package that are imported when they are first used.

So the modules of a package that need no torch are imported without it.
"""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def on_demand(package: str, **modules: Iterable[str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose public names lie in its modules.

    Args:
        package: the package's ``__name__``.
        modules: for each module of the package, the names that it holds.
    """
    places = {name: module for module, names in modules.items() for name in names}

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the package's own
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return __getattr__
