"""A miniature study in a separate clone: real Snakemake, real transformers classes with small random weights."""

import compileall
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTImageProcessor, ViTModel

from tests.helpers.forks import forked_python, run_forked

CLONE = Path(__file__).parents[2]
# The library is the clone's, which a test may have edited. Jobs run the Python that Snakemake runs in.
SNAKEMAKE = """
import sys
from snakemake.cli import main
from tests.helpers.forks import reimport
reimport("conceptshare")
sys.executable, *arguments = sys.argv[1:]
main(arguments)
"""
LAYERS = 2
WIDTH = 16
WORDS = ["a", "red", "green", "blue", "square", "on", "white", "large", "small", "picture"]


def change(*keys, to):
    """A function that sets one key of a config."""

    def apply(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = to

    return apply


class Project:
    """A clone with separate source, config and results.

    Attributes:
        python: The Python of its jobs.
    """

    def __init__(self, folder, python=sys.executable):
        self.folder = folder
        self.python = python

    @property
    def config(self):
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @config.setter
    def config(self, config):
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    @property
    def environment(self):
        return os.environ | {"PYTHONPATH": str(self.folder / "src"), "HF_HUB_OFFLINE": "1"}

    def run(self, *arguments):
        """Run an already imported Snakemake and return the result."""
        return run_forked(SNAKEMAKE, self.python, *arguments, folder=self.folder, environment=self.environment)

    def start(self, program, *arguments):
        """Run a program to its end, as users do."""
        command = [str(Path(sys.executable).parent / program), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )

    def plan(self, *arguments):
        """The number of planned jobs of each rule."""
        result = self.run("-n", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        table = re.search(r"\njob +count\n[- ]+\n(.*?)\ntotal ", result.stdout + result.stderr, re.DOTALL)
        if table is None:
            assert "Nothing to be done" in result.stdout + result.stderr
            return {}
        return {rule: int(count) for rule, count in (line.split() for line in table[1].splitlines())}

    def copy(self, folder):
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, self.python)


def new_clone(folder):
    """The files of the workflow and the library in a git clone."""
    folder.mkdir()
    for name in ("Snakefile", "workflow", "profiles", "envs", "demo"):
        source = CLONE / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    shutil.copytree(CLONE / "src" / "conceptshare", folder / "src" / "conceptshare")
    (folder / "slurm").symlink_to("profiles/slurm")
    compileall.compile_dir(folder / "src", quiet=1)  # once, instead of in the first jobs of each copy
    return Project(folder)


def write_dataset(path, rows=40, columns=("picture", "words")):
    """Captioned squares of three colours and two sizes."""
    rng = np.random.default_rng(0)
    table = []
    for _ in range(rows):
        name, colour = [("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))][rng.integers(3)]
        size, side = [("large", 24), ("small", 8)][rng.integers(2)]
        image = Image.new("RGB", (32, 32), "white")
        image.paste(colour, (4, 4, 4 + side, 4 + side))
        file = io.BytesIO()
        image.save(file, "PNG")
        table.append({columns[0]: {"bytes": file.getvalue(), "path": None}, columns[1]: f"a {size} {name} square"})
    pd.DataFrame(table).to_parquet(path)


def write_text_encoder(folder, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def write_image_encoder(folder):
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def encoder_entry(model, modality, kind, **more):
    fixed = {"library": "transformers", "layers": LAYERS, "width": WIDTH, "global_token": "first"}
    return {"model": model, "modality": modality, "kind": kind, **fixed, **more}


def miniature_config():
    return {
        "study": "miniature",
        "datasets": {"squares": {"source": "./squares.parquet", "image": "picture", "caption": "words"}},
        "encoders": {
            "reader": encoder_entry("./models/reader", "text", "language", seeds=[0, 1]),
            "viewer": encoder_entry("./models/viewer", "image", "vision"),
        },
        "saes": {"tiny": {"expansion": 2, "k": 4, "learning_rate": 1e-2, "batch_captions": 16}},
        "analyses": {
            "matrices": {"all": None},
            "layerwise": {"seeds": {"pairs": [["reader@0", "reader@1"]]}},
            "sharedness": {
                "seen": {"source": "reader", "shared_with": ["viewer"], "not_shared_with": ["reader@1"]},
                "own": {"source": "reader", "shared_with": ["reader@1"], "not_shared_with": ["viewer"]},
            },
            "samples": {"captions": {"image": "viewer", "text": "reader", "text_layers": "all"}},
        },
        "correlations": {"memory_mb": 100},
    }


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """The miniature study before its first run. Its jobs reuse the tests' imports."""
    project = new_clone(tmp_path_factory.mktemp("fresh") / "clone")
    write_dataset(project.folder / "squares.parquet")
    write_text_encoder(project.folder / "models" / "reader")
    write_text_encoder(project.folder / "models" / "second-reader", seed=2)
    write_image_encoder(project.folder / "models" / "viewer")
    project.config = miniature_config()
    project.python = str(forked_python())
    return project


@pytest.fixture(scope="session")
def finished(fresh, tmp_path_factory):
    """The miniature study after its run; tests that change it use a copy."""
    project = fresh.copy(tmp_path_factory.mktemp("finished") / "clone")
    result = project.run("--cores", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return project


@pytest.fixture
def study(finished, tmp_path):
    """A finished miniature study that a test may change."""
    return finished.copy(tmp_path / "clone")


@pytest.fixture
def new_study(fresh, tmp_path):
    """A miniature study before its first run, that a test may change."""
    return fresh.copy(tmp_path / "clone")
