"""Documents that repeat what the code says must say the same."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.sae import train_sae
from conceptshare.study import SAESettings, build_study
from tests.elsewhere import run_elsewhere

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


def test_the_citation_has_what_cff_requires_and_the_versions_of_the_package():
    # The required keys of https://citation-file-format.github.io/1.2.0/schema.json
    citation = yaml.safe_load((CLONE / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["cff-version"] == "1.2.0"
    package = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        package["name"],
        package["version"],
        package["license"],
    )
    assert citation["authors"] == [{"name": "The conceptshare developers"}]
    (paper,) = citation["references"]
    assert paper.keys() >= {"type", "title", "authors"}
    assert all(author.keys() == {"family-names", "given-names"} for author in paper["authors"])
    assert "2507.18512" in paper["url"]


def test_the_demo_data_is_what_its_readme_says():
    table = pq.read_table(CLONE / "demo/openclipart.parquet")
    assert f"{len(table):,}" in (CLONE / "demo/README.md").read_text(encoding="utf-8")
    assert f"{len(table):,}" in (CLONE / "README.md").read_text(encoding="utf-8")
    assert (CLONE / "demo/openclipart.parquet").stat().st_size <= 12e6
    assert table.column_names == ["id", "image", "caption"]


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "config/README.md",
        "docs/formats.md",
        "docs/using-saes.md",
        "docs/comparing-encoders.md",
        "results/README.md",
    ],
)
def test_every_relative_link_leads_somewhere(document):
    path = CLONE / document
    targets = [part.split(")")[0] for part in path.read_text(encoding="utf-8").split("](")[1:]]
    for target in targets:
        assert target.startswith("https://") or (path.parent / target.split("#")[0]).exists(), target


@pytest.fixture
def page(tmp_path, monkeypatch, write_activations, write_tokens, rng):
    """The page on using SAEs, in a folder that has the SAE it speaks of, and the activations that it was trained on."""
    store = tmp_path / "results/openclipart/streams/small/activations/minilm.zarr"
    store.parent.mkdir(parents=True)
    layers = {5: [rng.standard_normal((4, 12)) for _ in range(50)]}
    write_activations(store, layers)
    out = tmp_path / "results/openclipart/streams/small/saes/minilm/layer-05/seed-0"
    train_sae(write_tokens(tmp_path / "minilm.zarr", layers), 5, SAESettings(expansion=4, k=3), seed=0, out=out)
    monkeypatch.chdir(tmp_path)
    return (CLONE / "docs/using-saes.md").read_text(encoding="utf-8")


def run_commands(page):
    """The output of each command of the page, run in order."""
    runner = CliRunner()
    commands = re.findall(r"^    \.venv/bin/conceptshare (.*)$", page, re.MULTILINE)
    return [runner.invoke(app, shlex.split(command), catch_exceptions=False).stdout for command in commands]


def test_the_page_on_using_saes_runs(page, tmp_path):
    run_commands(page)
    checked = "with torch.no_grad():\n    assert torch.allclose(reconstruction, sae.decode(sae.top_k(x)), atol=1e-5)\n"
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ours = [block for block in blocks if "sae_lens" not in block and "sparsify" not in block]
    assert len(ours) == len(blocks) - 2
    run_elsewhere([], "".join(ours) + "assert features.shape == (50, 48)\n", cwd=tmp_path)
    theirs = "".join(f"{block}{checked}" for block in blocks[2:])
    run_elsewhere(["sae_lens", "transformer_lens", "sparsify"], "".join(blocks[:2]) + theirs, cwd=tmp_path)


def test_the_page_on_using_saes_shows_what_info_says(page):
    shown = page.split("```\nencoder ")[1].split("```")[0].splitlines()
    described = run_commands(page)[0].removeprefix("encoder ").splitlines()
    labels = [[line[:20].strip() for line in lines[1:] if line[:20].strip()] for lines in (shown, described)]
    assert labels[0] == labels[1]
    settings = [set(re.findall(r"(\w+): ", " ".join(lines))) for lines in (shown, described)]
    assert settings[0] == settings[1]
    assert {"preset", "k", "max_dead"} <= settings[0]


def test_what_the_page_imports_is_the_sae_that_it_exported(page, tmp_path):
    run_commands(page)
    own = tmp_path / "results/openclipart/streams/small/saes/minilm/layer-05/seed-0"
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "imported/layer-05" / file).read_bytes() == (own / file).read_bytes()


@pytest.fixture
def comparing(tmp_path, monkeypatch, write_features, rng):
    """The page on comparing encoders, in a folder that has the features it speaks of."""
    features = tmp_path / "results/openclipart/features/small"
    for member in ("minilm@0", "tiny-clip-text@0", "tiny-clip-image@0", "dinov2-small@0"):
        write_features(features, member, {n: rng.random((60, 30)) for n in range(2)})
    monkeypatch.chdir(tmp_path)
    return (CLONE / "docs/comparing-encoders.md").read_text(encoding="utf-8")


def test_the_page_on_comparing_encoders_runs(comparing, tmp_path):
    table, ranking = run_commands(comparing)
    assert "minilm@0" in table
    assert "tiny-clip-text@0" in table
    assert "rho_g" in ranking
    blocks = re.findall(r"^```python\n(.*?)^```", comparing, re.MULTILINE | re.DOTALL)
    shapes = "assert found.rho_ab.shape == found.match_ab.shape == (1, 128)\nassert rho.shape == match.shape == (64,)\n"
    run_elsewhere([], "".join(blocks) + shapes, cwd=tmp_path)
