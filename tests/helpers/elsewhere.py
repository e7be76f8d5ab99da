"""Runs SAELens's and sparsify's real code in a separate process.

Imports that they do not need to load, save or apply an SAE are mocked there: reports to a website (wandb), and
device placement and optimisers (accelerate, schedulefree). If accelerate were installed, transformers would behave
differently in all other tests.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

_STAND_INS = """
import importlib.machinery, sys
from unittest.mock import MagicMock

for name in ("wandb", "accelerate", "accelerate.utils", "schedulefree"):
    sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
"""


def run_elsewhere(libraries, code, *arguments, cwd=None):
    """Run code that may import these libraries; skip the test if they are not installed (tests/requirements.txt)."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    # If Triton is installed, sparsify decodes with it, which does not work on a CPU.
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}
    command = [sys.executable, "-c", _STAND_INS + code, *map(str, arguments)]
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
