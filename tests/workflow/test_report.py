"""The report of `snakemake --report` for the miniature study: its content, and its look in a browser."""

import json
import re
import zipfile
from types import SimpleNamespace
from urllib.parse import unquote

import jinja2
import pytest
from docutils.core import publish_parts

from conceptshare.config.products import FIGURES, TABLES

from .conftest import CLONE

STUDY = "results/studies/miniature"
TWINS = {".pdf": ".png", ".parquet": ".csv"}
"""Files that are not in it, as others have the same content."""
NOT_REPORTED = {"pages", "pairs", "study.json"}


@pytest.fixture(scope="module")
def report(finished, tmp_path_factory):
    """The report, unzipped."""
    folder = tmp_path_factory.mktemp("report")
    result = finished.run("--report", str(folder / "report.zip"))
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(folder / "report.zip") as zipped:
        zipped.extractall(folder)
    return folder / "report"


@pytest.fixture(scope="module")
def page_data(report):
    """The data in its page, by name."""
    page = (report / "report.html").read_text()
    return {name: json.loads(text) for name, text in re.findall(r'<script id="\w+">\s+var (\w+) = (\{.*\});\n', page)}


def figures_and_tables(folder):
    """All figures and tables of the study, including those shared with other studies of the same data."""
    files = [path for path in (folder / STUDY).rglob("*") if path.is_file() and not path.name.startswith(".")]
    files = [path for path in files if NOT_REPORTED.isdisjoint(path.parts)]
    files = [path for path in files if path.suffix not in TWINS or not path.with_suffix(TWINS[path.suffix]).is_file()]
    for stage in ("names", "similarity"):
        files += (folder / "results/squares" / stage).rglob("*.csv")
    return files


def test_has_every_figure_and_table_with_category_caption_and_labels(report, page_data, finished):
    results = page_data["results"]
    expected = {str(path.relative_to(finished.folder)): path for path in figures_and_tables(finished.folder)}
    assert {path.suffix for path in expected.values()} == {".png", ".csv", ".md", ".tex", ".json"}
    assert sorted(results) == sorted(expected)
    for path, file in expected.items():
        assert (report / results[path]["data_uri"]).read_bytes() == file.read_bytes()
    listed = [path for part in page_data["categories"].values() for paths in part.values() for path in paths]
    assert sorted(listed) == sorted(results)
    assert page_data["categories"].keys() == {
        *("Comparative Sharedness", "Layerwise heatmaps", "Names of features", "SAE training"),
        *("Fit of samples", "Similarity of activations", "The study", "wMPPC matrices"),
    }
    assert [path for path in results if len(re.findall(r"\w\.(?:\s|<)", results[path]["caption"])) < 2] == []
    labels = [tuple(sorted(result["labels"].items())) for result in results.values()]
    assert len(set(labels)) == len(labels)
    assert all({"shows", "type"} <= result["labels"].keys() for result in results.values())


def test_the_rule_graph_has_every_rule_with_its_command(page_data, finished):
    ran = finished.plan("--forceall")
    nodes, links, direct = (data["values"] for data in page_data["rulegraph_spec"]["data"])
    assert {node["rule"] for node in nodes} == ran.keys()
    among = {(link["sourcerule"], link["targetrule"]) for link in links + direct}
    assert {("dataset", "activations"), ("features", "correlations"), ("metrics_matrix", "figures_matrix")} <= among
    assert {target for _, target in among} == ran.keys() - {"dataset", "weights"}
    assert {rule: page_data["rules"][rule]["n_jobs"] for rule in page_data["rules"]} == {
        r: n for r, n in ran.items() if r != "all"
    }
    assert all("conceptshare" in rule["code"] for rule in page_data["rules"].values())


def test_captions_are_valid_and_used():
    texts = {path.name: path.read_text() for path in (CLONE / "workflow/report").glob("*.rst")}
    rules = "".join(path.read_text() for path in [CLONE / "workflow/Snakefile", *CLONE.glob("workflow/rules/*.smk")])
    of_products = {f"{table.name}_table.rst" for table in TABLES} | {f"{figure.name}.rst" for figure in FIGURES}
    assert set(re.findall(r"report/(\w+\.rst)", rules)) | of_products == texts.keys()
    wildcards = dict.fromkeys(["name", "member", "encoder", "seed"], "a_")
    known = {"snakemake": SimpleNamespace(wildcards=wildcards, config={"study": "a_"}), "categories": []}
    for text in texts.values():
        rendered = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(known)
        publish_parts(rendered, writer="html", settings_overrides={"halt_level": 2})


def test_it_opens_in_a_browser(report, page_data, open_tab):
    tab = open_tab(report, viewport={"width": 1280, "height": 400})
    tab.expected = ("cdn.tailwindcss.com should not be used in production",)
    page = tab.page
    page.goto((report / "report.html").as_uri())
    assert page.locator("h1", has_text="Which concepts").is_visible()
    assert page.locator("#rulegraph canvas").bounding_box()["height"] > 50 * len(page_data["rules"])
    for category, parts in page_data["categories"].items():
        (paths,) = parts.values()
        page.locator(".prose").get_by_role("link", name=category).click()
        page.locator("nav tbody tr").nth(len(paths) - 1).wait_for()
        assert page.locator("nav tbody tr").count() == len(paths)
        page.locator("nav nav a").first.click()
        page.get_by_text("Workflow", exact=True).click()
    page.get_by_text("Comparative Sharedness", exact=True).first.click()
    page.locator("nav tbody tr", has_text="seen").filter(has_text="top features").locator("a").first.click()
    figure = page.locator("img").last
    assert unquote(figure.get_attribute("src")).endswith("/seen.png")
    figure.evaluate("image => image.decode()")
    place = figure.bounding_box()
    assert place["height"] > 400  # although it is taller than the window
    assert place["y"] >= 0
    page.locator("nav tbody tr", has_text="seen").filter(has_text="top features").locator("a").last.click()
    assert page.get_by_text("up to nine samples on which it is strongest").is_visible()
