"""The pages of real studies in a browser: they agree with tables and stores, and everything works."""

import re
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import zarr
from playwright.sync_api import expect
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.study import load_study
from conceptshare.io.errors import StoreError
from conceptshare.pages import pack_site
from tests.helpers.browser import read_data

DEFAULT = Path(__file__).parents[2] / "results/studies/openclipart/pages"
RESULTS = "results/studies/miniature"


@pytest.fixture
def tab(open_tab, finished):
    return open_tab(finished.folder / RESULTS / "pages")


def test_the_matrix_equals_the_table_and_its_cells_link_to_features(tab, finished):
    page = tab.open()
    members = read_data(tab.folder, "study")["members"]
    encoders = len({member["encoder"] for member in members})
    assert (
        f"SAE features of {encoders} encoders ({len(members)} counting seeds), on" in page.locator(".lead").inner_text()
    )
    table = pd.read_csv(finished.folder / RESULTS / "squares/tiny/matrices/all.csv").set_index(
        ["source", "target", "reading"]
    )
    link = page.get_by_label("wMPPC from reader@0 to viewer@0").first
    assert link.inner_text() == f"{table.wmppc['reader@0', 'viewer@0', 'pooled']:.2f}"
    link.click()
    page.wait_for_selector("main:not([aria-busy]) h1")
    assert "reader@0" in page.locator("h1").inner_text()


def test_a_features_page_shows_its_strongest_samples_and_its_match(tab, finished):
    store = zarr.open_group(finished.folder / "results/squares/features/tiny/viewer@0.zarr", mode="r")["layer-01"]
    feature = int(store["strength"][:].argmax())
    page = tab.open(f"#/feature/squares/tiny/viewer@0/1/{feature}")
    pictures = page.locator(".samples").first.locator("img")
    samples = [int(pictures.nth(n).get_attribute("src").rpartition("/")[2][:6]) for n in range(pictures.count())]
    assert samples == [sample for sample in store["top_samples"][feature, :9].tolist() if sample >= 0]
    assert all(pictures.nth(n).evaluate("image => image.decode().then(() => true)") for n in range(len(samples)))
    pairs = pd.read_parquet(finished.folder / RESULTS / "squares/tiny/pairs/reader@0__viewer@0.parquet")
    (match,) = pairs.query(f"source == 'viewer@0' and layer == 1 and feature == {feature}").itertuples()
    card = page.locator(".match", has=page.get_by_role("heading", name="reader@0", exact=True))
    card.scroll_into_view_if_needed()
    expect(card.locator("figure").first).to_be_visible()  # before that, the page grows
    card.get_by_role("link", name=f"Layer {match.match_layer}, feature {match.match_feature}", exact=True).click()
    expect(page.locator("h1")).to_have_text(f"Feature {match.match_feature} of reader@0, layer {match.match_layer}")


@pytest.mark.parametrize("images", [True, False])
def test_a_packed_site_opens_with_and_without_images(finished, tmp_path, monkeypatch, open_tab, images):
    monkeypatch.chdir(finished.folder)
    option = "--images" if images else "--no-images"
    for name in ("one", "two"):
        packed = CliRunner().invoke(app, ["pages", "pack", option, "--out", str(tmp_path / f"{name}.zip")])
        assert packed.exit_code == 0, packed.output
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as zipped:
        zipped.extractall(tmp_path)
    unpacked, site = (folder / name for folder, name in ((tmp_path, "miniature"), (Path(RESULTS), "pages")))
    assert "- squares: ./squares.parquet" in (unpacked / "README.txt").read_text()
    files = [path.relative_to(site) for path in site.rglob("[!.]*.*") if images or path.suffix != ".webp"]
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.*")} == {*files, Path("README.txt")}
    assert all((unpacked / file).read_bytes() == (site / file).read_bytes() for file in files)
    tab = open_tab(unpacked)
    tab.allowed = [] if images else [".webp"]
    page = tab.open("#/feature/squares/tiny/viewer@0/1/0")
    samples = page.locator(".samples").first
    expect(samples.locator("img")).to_have_count(9 if images else 0)
    expect(samples.get_by_role("img", name="No image")).to_have_count(0 if images else 9)


def test_without_a_site_there_is_nothing_to_pack(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(fresh.folder)
    with pytest.raises(StoreError, match="pages: no site there; run the study first"):
        pack_site(load_study(Path("config.yaml")), Path("results"), True, tmp_path / "site.zip")


@pytest.fixture(params=["miniature", "default"])
def site(request):
    """The pages of the miniature study, and of the default study if they exist."""
    if request.param == "miniature":
        return request.getfixturevalue("finished").folder / RESULTS / "pages"
    if not (DEFAULT / "index.html").exists():
        pytest.skip("no default study in results/; `make demo` runs it")
    return DEFAULT


class Place:
    """A data set, an SAE setting, a pair of members of a layerwise analysis, and a feature with a match."""

    def __init__(self, site):
        self.study = read_data(site, "study")
        analysis = self.study["layerwise"][0]
        self.folder = f"{analysis['dataset']}/{analysis['sae']}"
        self.pair = analysis["pairs"][-1]
        self.a, self.b, self.layer = self.pair["a"], self.pair["b"], self.pair["layers_a"][-1]
        self.table = read_data(site, f"data/{self.folder}/{self.a}/layer-{self.layer:02d}")
        self.strongest = max(range(len(self.table["strength"])), key=lambda n: self.table["strength"][n])

    def routes(self):
        ranking = self.study["sharedness"][0]
        return {
            "overview": "#/",
            "table": f"#/layer/{self.folder}/{self.a}/{self.layer}",
            "features": f"#/feature/{self.folder}/{self.a}/{self.layer}/{self.strongest}?overlay=yes",
            "match": f"#/feature/{self.folder}/{self.b}/{self.pair['layers_b'][-1]}/0?overlay=yes",
            "pair": f"#/pair/{self.folder}/{self.a}/{self.layer}/{self.b}/{self.pair['layers_b'][0]}",
            "any layer": f"#/pair/{self.folder}/{self.a}/{self.layer}/{self.b}/any",
            "ranking": f"#/ranking/{ranking['dataset']}/{ranking['sae']}/{ranking['name']}",
            **{fit["name"]: f"#/fit/{fit['dataset']}/{fit['sae']}/{fit['name']}" for fit in self.study["samples"]},
        }


def wait(page):
    page.wait_for_selector("main:not([aria-busy]) h1")


def numbers(page, label):
    """The cells of a column of a page's last table."""
    table = page.locator("table.listing").last
    at = [text.strip() for text in table.locator("thead th").all_text_contents()].index(label) + 1
    return [text.strip() for text in table.locator(f"tbody tr > :nth-child({at})").all_text_contents()]


def test_search_and_sort(open_tab, site):
    place = Place(site)
    page = open_tab(site).open(place.routes()["table"])
    by_strength = sorted(range(len(place.table["strength"])), key=lambda n: -place.table["strength"][n])
    assert numbers(page, "Feature")[:1] == [str(by_strength[0])]
    page.get_by_role("button", name="Density", exact=True).click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("Density")
    shown = [place.table["density"][int(n)] for n in numbers(page, "Feature")]
    assert shown == sorted(place.table["density"], reverse=True)[:100]
    page.get_by_label("Name or number").fill(str(place.strongest))
    expect(page.get_by_role("status")).to_contain_text("of")
    assert str(place.strongest) in numbers(page, "Feature")
    # The URL of the search shows the same results.
    other = open_tab(site)
    other.page.goto(page.url)
    wait(other.page)
    assert numbers(other.page, "Feature") == numbers(page, "Feature")


def test_heatmap_cells_and_matches_are_links(open_tab, site):
    place = Place(site)
    page = open_tab(site).open()
    layers = place.pair["layers_b"]
    label = f"wMPPC from {place.a} layer {place.layer} to {place.b} layer {layers[0]}"
    page.get_by_text(f"From {place.a} ↑ to {place.b} →").or_(page.locator(".heats > :last-child")).last.hover()
    page.get_by_label(label).click()
    expect(page.locator("h1")).to_have_text(f"{place.a} layer {place.layer} → {place.b} layer {layers[0]}")
    found = read_data(site, f"data/{place.folder}/pairs/{place.a}__{place.b}/layer-{place.layer:02d}")
    first = int(numbers(page, place.a)[0])
    assert found["rho"][0][first] == max(rho for rho in found["rho"][0] if rho is not None)
    assert numbers(page, place.b)[0] == str(found["match"][0][first])
    page.locator("tbody th a").first.click()
    expect(page.locator("h1")).to_have_text(f"Feature {first} of {place.a}, layer {place.layer}")
    best = {name: values[first] for name, values in place.table["best"][place.b].items()}
    match = page.locator(".match", has=page.get_by_role("heading", name=place.b, exact=True))
    assert match.locator(".rho").inner_text() == f"{best['rho']:.2f}"
    match.get_by_role("link").press("Enter")  # a click may miss it while images above are loading
    expect(page.locator("h1")).to_have_text(f"Feature {best['feature']} of {place.b}, layer {best['layer']}")


def test_keyboard_alone(open_tab, site):
    """From a cell of a matrix to a feature."""
    page = open_tab(site).open()
    press = page.keyboard.press
    for _ in range(200):
        press("Tab")
        if page.evaluate("document.activeElement.closest('.heat') !== null"):
            break
    before = page.evaluate("document.activeElement.ariaLabel")
    press("ArrowRight")
    after = page.evaluate("document.activeElement.ariaLabel")
    assert before != after
    press("Enter")
    source, target = re.match(r"wMPPC from (\S+) to (\S+): ", after).groups()
    expect(page.locator("h1")).to_have_text(re.compile(rf"^{source} layer \d+ → {target}, any layer$"))
    expect(page.locator("h1")).to_be_focused()
    for _ in range(200):
        press("Tab")
        if page.evaluate("document.activeElement.matches('tbody th a')"):
            break
    press("Enter")
    expect(page.locator("h1")).to_have_text(re.compile(rf"^Feature \d+ of {source}, "))


@pytest.mark.parametrize("width", [1280, 360])
def test_every_view_in_the_dark_theme(open_tab, site, width):
    """Each view loads completely with its images, is dark, and is no wider than the window."""
    opened = open_tab(site, viewport={"width": width, "height": 800}, color_scheme="dark")
    for route in Place(site).routes().values():
        page = opened.open(route)
        for _ in range(4):
            page.mouse.wheel(0, 1000)
            page.wait_for_timeout(30)
        assert page.locator(".error").count() == 0, route
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, route
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", paper))) < 150
        page.wait_for_function("[...document.images].every(image => !image.complete || image.naturalWidth)")


def test_rankings_have_rows(open_tab, site):
    for ranking in read_data(site, "study")["sharedness"]:
        page = open_tab(site).open(f"#/ranking/{ranking['dataset']}/{ranking['sae']}/{ranking['name']}")
        assert numbers(page, "Feature")[:5] == [str(n) for n in ranking["features"][:5]]
