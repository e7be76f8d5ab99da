"""Publishing the SAEs of a study: its files, its model card, and SAELens with the card's lines."""

import json
import re

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.io.hub import STUDY
from conceptshare.sae import load_sae
from tests.helpers.elsewhere import run_elsewhere
from tests.helpers.hub import TOKEN, running, use

RELEASE = "results/releases/miniature"
LAYER = "squares/tiny/reader/layer-01/seed-1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running() as hub:
        use(monkeypatch, hub.endpoint, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def publish(project, monkeypatch, *options):
    monkeypatch.chdir(project.folder)
    result = CliRunner().invoke(app, ["publish", "us/saes", *options])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def rows(card, heading):
    """The rows of the table below a heading, each by its columns."""
    lines = [line.strip("|").split("|") for line in card.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()]
    header, _, *rest = [[cell.strip() for cell in line] for line in lines if len(line) > 1]
    return [dict(zip(header, row, strict=True)) for row in rest]


def test_without_push_writes_a_card_that_agrees_with_the_results_and_sends_nothing(study, hub, monkeypatch):
    output = publish(study, monkeypatch, "--licence", "mit")
    assert not hub.log
    assert "nothing was uploaded; read results/releases/miniature/README.md" in output
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in output.splitlines()[:-2]}
    release, results = study.folder / RELEASE, study.folder / "results/squares"
    assert listed == {name: len(content) for name, content in files(release).items()}
    for name, content in files(release / "saes/squares/tiny").items():
        assert content == (results / "saes/tiny" / name).read_bytes()
    load_sae(release / "saes" / LAYER)
    card = (release / "README.md").read_text()
    assert "license: mit" in card
    assert f"{STUDY}: miniature" in card
    table = rows(card, "SAEs")
    assert len(table) == 2 * 3
    for row in table:
        metrics = json.loads(
            (results / "saes/tiny" / row["SAE"].strip("`").split("tiny/")[1] / "metrics.json").read_text()
        )
        for tokens in ("all", "global"):
            for label, key in (("FVU", "fvu"), ("dead", "dead")):
                assert float(row[f"{label}, {tokens} tokens"]) == pytest.approx(
                    metrics[f"{tokens}_tokens"][key], abs=6e-4
                )
        assert (row["measured on"], row["architecture"]) == (metrics["measured_on"], "topk")
    matrix = pd.read_csv(study.folder / "results/studies/miniature/squares/tiny/matrices/all.csv")
    floors = {(row["source"], row["target"]): row for row in rows(card, "Floors")}
    assert floors.keys() == {
        *((a, b) for a, b in zip(matrix.source, matrix.target, strict=True)),
        *(("reader@0", "reader@1"), ("reader@1", "reader@0")),
    }
    for row in matrix[matrix.reading == "pooled"].itertuples():
        shown = floors[row.source, row.target]
        assert [float(shown[key]) for key in ("wMPPC", "floor", "null", "excess")] == pytest.approx(
            [row.wmppc, row.floor, row.null, row.excess], abs=6e-4
        )
    assert {row["global token"] for row in rows(card, "Encoders")} == {"the first token"}
    assert rows(card, "Data")[0]["samples"] == "40"


def test_publishes_saes_that_sae_lens_loads_with_the_lines_of_the_card(study, hub, monkeypatch, tmp_path):
    output = publish(study, monkeypatch, "--push", "--features")
    assert f"uploaded: {hub.endpoint}/us/saes/commit/" in output
    release = study.folder / RELEASE
    assert hub.files("us/saes") == {**files(release), ".gitattributes": b""}
    store = files(study.folder / "results/squares/features/tiny/reader@1.zarr")
    assert store == files(release / "features/squares/tiny/reader@1.zarr")
    assert "names/squares/tiny/reader@1.parquet" in files(release)
    lines = re.search(r"```python\n(.*?)```", (release / "README.md").read_text(), re.DOTALL)[1]
    assert len(lines.splitlines()) == 3
    folder = re.search(r'"us/saes", "(.*?)"', lines)[1]
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    around = """
from pathlib import Path
import pytest
from safetensors.torch import load_file, save_file
from tests.helpers.hub import use
use(pytest.MonkeyPatch(), sys.argv[1], Path("home"))
x = load_file("x.safetensors")["x"]
{}
save_file({{"latents": latents.detach()}}, "latents.safetensors")
"""
    run_elsewhere(["sae_lens", "transformer_lens"], around.format(lines), hub.endpoint, folder=tmp_path)
    sae = load_sae(release / folder)
    with torch.no_grad():
        expected = sae.active(x).dense(32)
    assert expected.count_nonzero() > 20
    torch.testing.assert_close(load_file(tmp_path / "latents.safetensors")["latents"], expected)


def test_needs_an_owner(study, monkeypatch):
    monkeypatch.chdir(study.folder)
    with pytest.raises(StudyError, match="saes: write the repository as OWNER/NAME"):
        CliRunner().invoke(app, ["publish", "saes"], catch_exceptions=False)


def test_refuses_a_licence_that_the_hub_would_refuse_with_similar_ones(study, hub, monkeypatch):
    with pytest.raises(StudyError, match=r"--licence Apache-2: not an identifier of the hub; .* such as apache-2.0, "):
        publish(study, monkeypatch, "--licence", "Apache-2")
    assert not (study.folder / RELEASE).exists()


def test_names_what_an_unfinished_or_damaged_study_lacks(study, monkeypatch):
    weights = study.folder / "results/squares/saes/tiny/reader/layer-01/seed-1/sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(StoreError, match=rf"{LAYER[8:]}: sae_weights.safetensors .*run the sae stage again"):
        publish(study, monkeypatch)
    assert not (study.folder / RELEASE).exists()
    weights.write_bytes(whole)
    (study.folder / "results/studies/miniature/provenance.json").unlink()
    with pytest.raises(StoreError, match=r"provenance.json: no such file, .*; run it with snakemake first"):
        publish(study, monkeypatch)
    study.config = study.config | {"saes": {"tiny": {**study.config["saes"]["tiny"], "k": 3}}}
    with pytest.raises(StoreError, match="results were made with other settings"):
        publish(study, monkeypatch)
