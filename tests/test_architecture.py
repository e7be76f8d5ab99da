"""The packages of the library import downwards only, and the light ones import no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "src/conceptshare"

# As in docs/architecture.md: a package imports only from those on lines above its own.
LEVELS = (
    ("io", "_on_demand"),
    ("metrics", "device"),
    ("config",),
    ("data",),
    ("encoders",),
    ("activations",),
    ("sae",),
    ("correlations",),
    ("analysis",),
    ("concepts",),
    ("figures", "pages"),
    ("preflight",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def package_of(module):
    return module.relative_to(LIBRARY).with_suffix("").parts[0]


def imported(module):
    """The packages of the library that a module imports, anywhere in it, with the lines."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: a relative import"
            whole = node.module == "conceptshare"
            names = [f"conceptshare.{alias.name}" if whole else str(node.module) for alias in node.names]
        else:
            continue
        for name in names:
            library, _, rest = name.partition(".")
            if library == "conceptshare":
                yield rest.partition(".")[0], node.lineno


def test_packages_import_downwards_only():
    modules = [path for path in LIBRARY.rglob("*.py") if path.parent != LIBRARY or path.stem != "__init__"]
    assert {package_of(module) for module in modules} == LEVEL.keys()
    upwards = [
        f"{module}:{line}: {package_of(module)} imports {package}"
        for module in modules
        for package, line in imported(module)
        if package != package_of(module) and LEVEL[package] >= LEVEL[package_of(module)]
    ]
    assert upwards == []


@pytest.mark.parametrize("package", ["io", "config", "preflight", "cli"])
def test_light_packages_import_no_torch(package):
    modules = [
        ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((LIBRARY / package).rglob("*.py"))
    ]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr or "torch is imported"
