"""The pages of the miniature study, in a browser: what they show is what its tables and stores hold."""

import pandas as pd
import pytest
import zarr

RESULTS = "results/studies/miniature"


@pytest.fixture
def tab(open_tab, finished):
    return open_tab(finished.folder / RESULTS / "pages")


def test_the_matrix_is_the_tables_and_its_cells_lead_to_features(tab, finished):
    page = tab.open()
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
    page.get_by_role("link", name=f"Layer {match.match_layer}, feature {match.match_feature}").first.click()
    page.wait_for_selector("main:not([aria-busy]) h1")
    assert page.locator("h1").inner_text() == f"Feature {match.match_feature} of reader@0, layer {match.match_layer}"
    assert page.locator("mark, .token").count() > 0


def test_a_ranking_and_a_pair_of_layers_open(tab):
    for route in ("#/ranking/squares/tiny/seen", "#/pair/squares/tiny/reader@0/0/reader@1/1"):
        page = tab.open(route)
        assert page.locator("tbody tr").count() > 5
