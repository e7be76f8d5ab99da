"""Documents that repeat what the code says must say the same."""

import importlib.util
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from conceptshare.study import build_study

CLONE = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_what_the_models_say():
    text = (CLONE / "config/README.md").read_text(encoding="utf-8")
    reference = load(CLONE / "docs/write_config_reference.py")
    assert text == reference.with_reference(text), "run python docs/write_config_reference.py"


def test_the_example_of_the_config_reference_is_a_sound_study(monkeypatch):
    monkeypatch.chdir(CLONE)
    example = (CLONE / "config/README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    study = build_study(yaml.safe_load(example), origin="example")
    assert len(study.pairs()) == 4


def test_the_demo_data_is_what_its_readme_says():
    table = pq.read_table(CLONE / "demo/openclipart.parquet")
    assert f"{len(table):,}" in (CLONE / "demo/README.md").read_text(encoding="utf-8")
    assert f"{len(table):,}" in (CLONE / "README.md").read_text(encoding="utf-8")
    assert (CLONE / "demo/openclipart.parquet").stat().st_size <= 12e6
    assert table.column_names == ["id", "image", "caption"]


@pytest.mark.parametrize("document", ["README.md", "config/README.md", "docs/formats.md", "results/README.md"])
def test_every_relative_link_leads_somewhere(document):
    path = CLONE / document
    targets = [part.split(")")[0] for part in path.read_text(encoding="utf-8").split("](")[1:]]
    for target in targets:
        assert target.startswith("https://") or (path.parent / target.split("#")[0]).exists(), target
