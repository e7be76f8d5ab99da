"""Runs SAELens's and sparsify's real code in a separate process, a fork that has already imported torch.

Imports that they do not need to load, save or apply an SAE are mocked there: reports to a website (wandb), and
device placement and optimisers (accelerate, schedulefree). If accelerate were installed, transformers would behave
differently in all other tests.
"""

import importlib.util

import pytest

from tests.helpers.forks import run_forked

_STAND_INS = """
import importlib.machinery, sys
from unittest.mock import MagicMock

for name in ("wandb", "accelerate", "accelerate.utils", "schedulefree"):
    sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
"""


def run_elsewhere(libraries, code, *arguments, folder="."):
    """Run code that may import these libraries; skip the test if they are not installed (tests/requirements.txt)."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    # If Triton is installed, sparsify decodes with it, which does not work on a CPU.
    environment = {"SPARSIFY_DISABLE_TRITON": "1"}
    ended = run_forked(_STAND_INS + code, *arguments, folder=folder, environment=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
