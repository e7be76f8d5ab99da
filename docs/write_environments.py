"""Write envs/*.yaml, the environments of `--sdm conda`, from pyproject.toml and demo/requirements.txt.

Run as `python docs/write_environments.py`.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

CLONE = Path(__file__).parents[1]
PYTHON = "3.12"
CONDA_NAMES = {"matplotlib": "matplotlib-base", "open_clip_torch": "open-clip-torch", "torch": "pytorch"}
ONLY_STARTS_JOBS = {"snakemake", "snakemake-executor-plugin-slurm"}
HEADS = {
    "conceptshare": """\
# The environment of every rule, for runs with --sdm conda. The library itself comes from the clone.
""",
    "mambavision": """\
# The environment in which activations of encoders with code of their own are extracted, for runs with --sdm conda: the
# packages of every rule, and what MambaVision's code imports. mamba-ssm has kernels for CUDA and is built against the
# torch it finds; without a GPU, remove its line: the scan then runs in plain PyTorch, slower, with equal results.
""",
}


def environments() -> dict[str, str]:
    """The text of each file in envs/, by its name without suffix."""
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]
    weights = (CLONE / "demo" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    common = [each for each in map(_conda, project["dependencies"]) if each.split()[0] not in ONLY_STARTS_JOBS]
    demo = [*map(_conda, extra["demo"]), "pip", {"pip": ["--no-deps", *(x for x in weights if not x.startswith("#"))]}]
    further = {"conceptshare": demo, "mambavision": [*map(_conda, extra["mambavision"]), "mamba-ssm >=2.2"]}
    return {name: HEADS[name] + _yaml([f"python ={PYTHON}", *common, *more]) for name, more in further.items()}


def _conda(requirement: str) -> str:
    """A requirement as conda writes it."""
    name, versions = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
    return f"{CONDA_NAMES.get(name, name)} {versions}"


def _yaml(packages: list[Any]) -> str:
    environment = {"channels": ["conda-forge", "nodefaults"], "dependencies": packages}
    return f"# Written by docs/write_environments.py.\n{yaml.safe_dump(environment, sort_keys=False)}"


if __name__ == "__main__":
    for name, text in environments().items():
        (CLONE / "envs" / f"{name}.yaml").write_text(text, encoding="utf-8")
