"""The concept pages in a browser, from file://: content, links, keys, and safety from hostile data."""

import json
import re
import shutil
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from matplotlib import colormaps
from playwright.sync_api import expect

from tests.helpers.browser import SIZE, read_data

from .conftest import NARROW
from .made_up import (
    DATASET,
    FEATURES,
    HOSTILE,
    LAYERS,
    MEMBERS,
    MISSING_THUMBNAIL,
    NAMES,
    NEVER_ACTIVE,
    SAE,
    SIZES,
    UNRENDERED,
    layer_key,
    make_map,
    write,
)

SET = f"{DATASET}/{SAE}"
VIEWS = {
    "overview": "#/",
    "table": f"#/layer/{SET}/seer@0/3",
    "image": f"#/feature/{SET}/seer@0/3/20?overlay=yes",
    "text": f"#/feature/{SET}/reader@0/5/21",
    "hostile": f"#/feature/{SET}/reader-clip@1/0/0",
    "never active": f"#/feature/{SET}/seer@0/0/{NEVER_ACTIVE}",
    "pair": f"#/pair/{SET}/seer@0/0/reader@0/3",
    "ranking": f"#/ranking/{SET}/shared-with-text",
    "fit": f"#/fit/{SET}/captions",
    "sample": f"#/sample/{SET}/7",
    "search": f"#/search/{SET}?q=a+red",
    "not found": "#/nothing/here",
}
BLANK = re.compile(r"[\u0000-\u0020\u0085\u2028\u2029]+")


def seen(locator):
    """Texts of elements, with white space collapsed."""
    return [BLANK.sub(" ", text).strip() for text in locator.all_text_contents()]


def feature_label(table, feature):
    """The label of a feature on a page, with white space collapsed."""
    name, candidate = (BLANK.sub(" ", table[key][feature] or "").strip() for key in ("name", "candidate"))
    return name or (f"perhaps {candidate}" if candidate else "no clear name")


def column(page, label):
    """The cells of a table's column, by its label."""
    heads = [text.strip() for text in page.locator("table.listing").last.locator("thead th").all_text_contents()]
    return seen(page.locator("table.listing").last.locator(f"tbody tr > :nth-child({heads.index(label) + 1})"))


def ordered(values, descending=True):
    """Numbers of features, by value; nulls last, ties by number."""
    return sorted(
        range(len(values)),
        key=lambda n: (values[n] is None, 0 if values[n] is None else (-values[n] if descending else values[n]), n),
    )


def test_overview_shows_the_numbers(tab, site):
    page = tab.open()
    study = read_data(site, "study")
    expect(page.locator("h1")).to_have_text("made-up")
    expect(page.locator("main")).to_contain_text(f"{DATASET} (510 samples)")
    assert page.title() == "Overview – made-up"
    expect(page.locator(".lead")).to_contain_text("SAE features of 4 encoders, on")
    page.locator(".heats").scroll_into_view_if_needed()
    tables = page.locator("table.heat")
    expect(tables).to_have_count(3)
    pooled = study["matrices"][0]["wmppc"]["pooled"]
    shown = seen(tables.first.locator("tbody td"))
    assert shown == ["an encoder with itself" if value is None else f"{value:.2f}" for row in pooled for value in row]
    assert seen(page.locator(".legend .empty")) == ["an encoder with itself"]
    assert seen(tables.first.locator("tbody th .quiet")) == [
        "images, vision",
        "images, vision-language",
        "text, language",
        "text, vision-language",
    ]
    # Layer 0 is at the bottom left, as in the figures.
    a = study["layerwise"][0]["pairs"][0]
    assert seen(tables.nth(1).locator("tbody td")) == [f"{value:.2f}" for row in a["wmppc"][::-1] for value in row]
    assert seen(tables.nth(1).locator("tbody th")) == [str(layer) for layer in LAYERS[::-1]]
    heads, cells = (tables.nth(1).locator(f"{part} tr").last.bounding_box()["y"] for part in ("thead", "tbody"))
    assert heads > cells
    cell = page.get_by_role("link", name=f"wMPPC from seer@0 layer 3 to reader@0 layer 5: {a['wmppc'][1][2]:.2f}")
    expect(cell).to_be_visible()
    assert seen(page.locator(".rankings a")) == ["shared-with-text", "shared-with-vlms", "captions"]


def test_symbols_have_hints_for_pointer_and_keyboard(tab):
    page = tab.open()
    guide = page.get_by_text("How to read these pages")
    guide.click()
    hint = page.locator(".hint")
    expect(hint).to_be_hidden()
    terms = page.locator(".guide .term")
    assert seen(terms) == ["S", "ρ", "wMPPC", "excess", "null", "Δ"]
    for term in terms.all():
        term.hover()
        expect(hint).to_have_text(term.get_attribute("aria-description"))
        box = hint.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= page.viewport_size["width"]
        assert box["y"] >= term.bounding_box()["y"]
    guide.focus()
    page.keyboard.press("Tab")
    expect(hint).to_contain_text("activation summed over the samples")
    page.keyboard.press("Escape")
    expect(hint).to_be_hidden()
    tab.open(f"#/layer/{SET}/seer@0/3")
    page.get_by_role("button", name="Name AUC").hover()
    expect(hint).to_contain_text("0.5 is chance")
    page.locator("h1").hover()
    expect(hint).to_be_hidden()


def test_a_matrix_has_a_choice_of_readings(tab, site):
    page = tab.open()
    page.get_by_label("Reading (how layers are combined)").select_option("last")
    expect(page).to_have_url(re.compile(r"#/\?reading=last$"))
    last = read_data(site, "study")["matrices"][0]["wmppc"]["last"]
    shown = seen(page.locator("table.heat").first.locator("tbody td a"))
    assert shown == [f"{value:.2f}" for row in last for value in row if value is not None]
    page.go_back()
    expect(page.get_by_label("Reading (how layers are combined)")).to_have_value("pooled")
    expect(page.get_by_text("with samples re-paired at random (the null), it is 0.05 to 0.13 here")).to_be_visible()


def test_published_and_calibrated_values_are_a_switch_and_cells_by_chance_are_hatched(tab, site):
    page = tab.open()
    page.locator(".heats").scroll_into_view_if_needed()
    tables = page.locator("table.heat")
    expect(tables).to_have_count(3)
    study = read_data(site, "study")
    matrix, pair = study["matrices"][0], study["layerwise"][0]["pairs"][0]
    page.get_by_label("Value").select_option("excess")
    expect(page).to_have_url(re.compile(r"#/\?value=excess$"))
    shown = seen(tables.first.locator("tbody td a"))
    assert shown == [f"{value:.2f}" for row in matrix["excess"]["pooled"] for value in row if value is not None]
    assert seen(tables.nth(1).locator("tbody td")) == [f"{value:.2f}" for row in pair["excess"] for value in row]
    assert tables.first.locator("a.hatched").count() == 3  # the cells of one source
    label = f"from {NAMES[3]} to {NAMES[0]}: {matrix['excess']['pooled'][3][0]:.2f}, not above chance"
    label += ", 2 layers not explained by SAEs"
    expect(page.get_by_role("link", name=label)).to_have_class("hatched unexplained")
    assert tables.nth(1).locator("a.unexplained").count() == 3  # the cells of one layer
    bound = "layers whose SAE has an FVU above 0.8 at global tokens"
    expect(page.get_by_text(f"A marked upper corner: with {bound}")).to_be_visible()
    page.reload()
    expect(page.get_by_label("Value")).to_have_value("excess")


def test_pages_state_which_layers_are_left_out_and_which_features_are_shown(open_tab, broken_site):
    study = read_data(broken_site, "study")
    study["matrices"][0]["left_out"]["pooled"][0][1] = 2
    study |= {"codes": ["after_topk", "before_topk"], "unexplained_layers": "leave_out"}
    (broken_site / "study.js").unlink()  # a hard link to the site of other tests
    write(broken_site, "study", study)
    tab = open_tab(broken_site)
    page = tab.open()
    bound = "layers whose SAE has an FVU above 0.8 at global tokens"
    expect(page.get_by_text(f"A marked lower corner: without {bound}")).to_be_visible()
    label = re.compile(f"from {NAMES[0]} to {NAMES[1]}: .*, without 2 layers not explained by SAEs$")
    expect(page.get_by_role("link", name=label)).to_have_class("left-out")
    assert page.locator("a.left-out").count() == 1
    shown = "These pages show features after TopK; those before TopK are in the study’s tables and figures."
    expect(page.get_by_text(shown)).to_be_visible()
    expect(page.get_by_text("its best match in any explained layer of the column")).to_be_visible()
    page = tab.open(f"#/feature/{SET}/reader@0/5/21")
    expect(page.get_by_text("Values of samples are after TopK, those of tokens before it.")).to_be_visible()
    expect(page.get_by_text("Over all explained layers of the other member.")).to_be_visible()
    page = tab.open(f"#/pair/{SET}/seer@0/0/reader@0/any")
    expect(page.locator("h1")).to_have_text("seer@0 layer 0 → reader@0, any explained layer")


def test_pages_of_all_layers_before_topk_state_neither(tab):
    page = tab.open()
    assert page.get_by_text("without layers").count() == page.get_by_text("These pages show features").count() == 0
    page = tab.open(f"#/feature/{SET}/reader@0/5/21")
    expect(page.get_by_text("Over all layers of the other member.")).to_be_visible()
    assert page.get_by_text("after TopK").count() == 0


def test_pages_of_a_layer_and_its_features_state_that_its_sae_does_not_explain_it(tab):
    note = "has an FVU of 0.85 at global tokens, above 0.8"
    for view in (f"#/layer/{SET}/reader@0/5", f"#/feature/{SET}/reader@0/5/21"):
        expect(tab.open(view).get_by_text(note)).to_be_visible()
    page = tab.open(f"#/layer/{SET}/seer@0/5")
    expect(page.get_by_text("S (strength) is a feature’s activation")).to_be_visible()
    assert page.get_by_text("has an FVU of").count() == 0
    expect(tab.open(VIEWS["pair"]).locator("main")).to_contain_text(f"The SAE of reader@0, layer 3, {note}")


def test_all_heatmaps_share_a_scale(tab, site):
    """The colour of a cell is matplotlib's viridis (of 16 colours), from 0, as in the figures, to the largest."""
    page = tab.open()
    page.locator(".heats").scroll_into_view_if_needed()
    expect(page.locator("table.heat")).to_have_count(3)
    study = read_data(site, "study")
    matrix = study["matrices"][0]["wmppc"]
    everything = [value for table in matrix.values() for row in table for value in row if value is not None]
    everything += [v for pair in study["layerwise"][0]["pairs"] for row in pair["wmppc"] for v in row]
    low, high = 0, max(everything)
    for table, values in zip(
        page.locator("table.heat").all(),
        [matrix["pooled"], *(pair["wmppc"][::-1] for pair in study["layerwise"][0]["pairs"])],
        strict=True,
    ):
        colours = table.locator("tbody a").evaluate_all(
            "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
        )
        for colour, value in zip(colours, [v for row in values for v in row if v is not None], strict=True):
            expected = 255 * np.array(colormaps["viridis"]((value - low) / (high - low))[:3])
            np.testing.assert_allclose([int(part) for part in re.findall(r"\d+", colour)], expected, atol=10)
    assert seen(page.locator(".legend span"))[:3:2] == [f"{low:.2f}", f"{high:.2f}"]


def test_a_heatmap_cell_links_to_its_pair(tab, site):
    page = tab.open()
    page.locator(".heats").scroll_into_view_if_needed()
    page.get_by_role("link", name="wMPPC from seer@0 layer 3 to reader@0 layer 5").click()
    expect(page.locator("h1")).to_have_text("seer@0 layer 3 → reader@0 layer 5")
    expect(page.locator("h1")).to_be_focused()
    assert page.title().startswith("seer@0 layer 3 → reader@0 layer 5")
    pairs = read_data(site, f"data/{SET}/pairs/seer@0__reader@0/layer-03")
    best = ordered(pairs["rho"][2])
    assert column(page, "seer@0") == [str(n) for n in best[:100]]
    strength = read_data(site, layer_key("seer@0", 3))["strength"]
    assert [float(text.replace(",", "")) for text in column(page, "S")] == pytest.approx(
        [strength[n] for n in best[:100]], rel=0.01, abs=0.01
    )
    matches = [pairs["match"][2][n] for n in best[:100]]
    assert column(page, "reader@0") == ["–" if match < 0 else str(match) for match in matches]
    table = read_data(site, layer_key("reader@0", 5))
    assert column(page, "Name of the match")[:5] == [feature_label(table, n) for n in matches[:5]]
    wmppc = read_data(site, "study")["layerwise"][0]["pairs"][0]["wmppc"][1][2]
    expect(page.locator(".lead")).to_contain_text(f"wMPPC {wmppc:.2f}, by chance 0.07.")
    page.get_by_label("S from").fill("100")
    kept = [n for n in best if strength[n] >= 100]
    expect(page.get_by_role("status")).to_have_text(f"{len(kept)} of {FEATURES} features")
    assert column(page, "seer@0") == [str(n) for n in kept]
    page.get_by_label("S from").fill("")
    expect(page.get_by_role("status")).to_have_text(f"{FEATURES} features")
    page.get_by_role("link", name="The other direction").click()
    expect(page.locator("h1")).to_have_text("reader@0 layer 5 → seer@0 layer 3")
    assert "wMPPC" not in page.locator(".lead").text_content()  # which is in no analysis
    page.go_back()
    expect(page.locator("h1")).to_have_text("seer@0 layer 3 → reader@0 layer 5")
    page.locator("tbody tr").first.locator(".match-name a").click()
    expect(page.locator("h1")).to_have_text(f"Feature {matches[0]} of reader@0, layer 5")


def test_a_matrix_cell_links_to_best_matches_in_any_layer(tab, site):
    page = tab.open()
    page.get_by_role("link", name="wMPPC from reader@0 to seer-clip@1").click()
    expect(page.locator("h1")).to_have_text("reader@0 layer 5 → seer-clip@1, any layer")
    best = read_data(site, layer_key("reader@0", 5))["best"]["seer-clip@1"]
    order = ordered(best["rho"])[:100]
    assert column(page, "reader@0") == [str(n) for n in order]
    for label, key in (("Layer", "layer"), ("seer-clip@1", "feature")):
        assert column(page, label) == ["–" if best["layer"][n] < 0 else str(best[key][n]) for n in order]
    tables = {layer: read_data(site, layer_key("seer-clip@1", layer)) for layer in LAYERS}
    links = page.locator(".match-name a")
    for place, n in enumerate(order[:5]):
        expect(links.nth(place)).to_have_text(feature_label(tables[best["layer"][n]], best["feature"][n]))
    layers = page.get_by_role("navigation", name="Layer of seer-clip@1")
    assert seen(layers.locator("a")) == ["any"]  # which no layerwise analysis compares
    links.first.click()
    expect(page.locator("h1")).to_have_text(
        f"Feature {best['feature'][order[0]]} of seer-clip@1, layer {best['layer'][order[0]]}"
    )
    page.go_back()
    page.get_by_role("link", name="The other direction").click()
    expect(page.locator("h1")).to_have_text("seer-clip@1 layer 5 → reader@0, any layer")
    tab.open(f"#/pair/{SET}/seer@0/3/reader@0/any")
    assert seen(page.get_by_role("navigation", name="Layer of reader@0").locator("a")) == ["any", "0", "3", "5"]


def test_sorting(tab, site):
    page = tab.open(f"#/layer/{SET}/seer-clip@1/5?sort=feature")
    table = read_data(site, layer_key("seer-clip@1", 5))
    columns = {
        "S": table["strength"],
        "Density": table["density"],
        "Name z": table["score"],
        "Name AUC": table["auc"],
        "ρ reader@0": table["best"]["reader@0"]["rho"],
        "Δ shared-with-text": table["delta"]["shared-with-text"],
    }
    for label, values in columns.items():
        head = page.get_by_role("columnheader", name=label, exact=True)
        assert head.get_attribute("aria-sort") == "none"
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", "descending")
        assert column(page, "Feature") == [str(n) for n in ordered(values)[:100]]
        head.get_by_role("button").click()
        expect(head).to_have_attribute("aria-sort", "ascending")
        assert page.locator("th[aria-sort]:not([aria-sort=none])").count() == 1
        assert column(page, "Feature") == [str(n) for n in ordered(values, descending=False)[:100]]
        page.go_back()
        expect(head).to_have_attribute("aria-sort", "descending")


def test_filters_are_in_the_address(tab, site):
    """Filters agree with Python, and their URL shows the same in a new page."""
    page = tab.open(f"#/layer/{SET}/seer-clip@1/5")
    table = read_data(site, layer_key("seer-clip@1", 5))
    typed = {
        "Name or number": "E",
        "S from": "5",
        "S to": "400",
        "Density from, %": "0.1",
        "Density to, %": "10",
        "ρ from": "0.2",
        "ρ to": "0.6",
        "Δ from": "-30",
        "Δ to": "40",
    }
    chosen = {"ρ with": "reader@0", "Δ in": "shared-with-text"}

    def passes(n):
        return [
            "e" in (table["name"][n] or "").lower(),
            table["strength"][n] >= 5,
            table["strength"][n] <= 400,
            table["density"][n] >= 0.001,
            table["density"][n] <= 0.1,
            table["best"]["reader@0"]["rho"][n] >= 0.2,
            table["best"]["reader@0"]["rho"][n] <= 0.6,
            table["delta"]["shared-with-text"][n] >= -30,
            table["delta"]["shared-with-text"][n] <= 40,
        ]

    kept = [n for n in range(FEATURES) if all(passes(n))]
    alone = {place for n in range(FEATURES) if sum(found := passes(n)) == 8 for place in [found.index(False)]}
    assert kept
    assert len(alone) == 9  # each of them excludes something that the others do not
    more = page.locator("summary")
    expect(more).to_have_text("More filters")
    expect(page.get_by_label("S to")).not_to_be_visible()
    more.focus()
    page.keyboard.press("Enter")
    for label, name in chosen.items():
        page.get_by_label(label).select_option(name)
    for label, text in typed.items():
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_label("Named only").check()
    page.get_by_role("button", name="Density").click()
    expected = [str(n) for n in sorted(kept, key=lambda n: -table["density"][n])]
    expect(page.get_by_role("status")).to_have_text(f"{len(kept)} of {FEATURES} features")
    expect(page).to_have_url(re.compile("named=yes.*sort=-density"))
    assert column(page, "Feature") == expected
    other = tab.new_page()
    other.goto(page.url)
    expect(other.get_by_role("status")).to_have_text(f"{len(kept)} of {FEATURES} features")
    assert column(other, "Feature") == expected
    expect(other.get_by_label("ρ with")).not_to_be_visible()
    expect(other.locator("summary")).to_have_text("More filters (9 in use)")
    for label, value in (typed | chosen).items():
        expect(other.get_by_label(label, exact=label in typed)).to_have_value(value)
    expect(other.get_by_label("Named only")).to_be_checked()


def test_search_by_number_and_without_results(tab):
    page = tab.open(f"#/layer/{SET}/seer@0/3?q=64")
    assert column(page, "Feature") == ["64"]
    page.get_by_label("Name or number").fill("no such words")
    expect(page.get_by_role("status")).to_have_text(f"0 of {FEATURES} features")
    expect(page.locator("tbody")).to_contain_text("No feature passes these filters.")


@pytest.mark.parametrize(
    "query",
    ["s=abc", "page=99", "page=-3", "page=x", "sort=nonsense", "sort=-rho:nobody", "with=nobody&rho=0.1", "q=%E0"],
)
def test_unusual_queries_are_harmless(tab, query):
    page = tab.open(f"#/layer/{SET}/seer@0/3?{query}")
    expect(page.locator("h1")).to_have_text("Features of seer@0, layer 3")
    expect(page.get_by_role("status")).to_contain_text("features")


def test_pager(tab, site):
    page = tab.open(f"#/layer/{SET}/seer@0/3")
    order = [str(n) for n in ordered(read_data(site, layer_key("seer@0", 3))["strength"])]
    assert column(page, "Feature") == order[:100]
    page.get_by_role("button", name="Next").click()
    expect(page).to_have_url(re.compile("page=2"))
    expect(page.locator(".pager")).to_contain_text("Page 2 of 2")
    assert column(page, "Feature") == order[100:]
    page.go_back()
    expect(page.locator(".pager")).to_contain_text("Page 1 of 2")


def test_feature_page(tab, site):
    page = tab.open(f"#/feature/{SET}/seer@0/3/20")
    table = read_data(site, layer_key("seer@0", 3))
    details = read_data(site, f"{layer_key('seer@0', 3)}/000")["features"][20]
    captions = (
        read_data(site, f"samples/{DATASET}/000")["captions"] + read_data(site, f"samples/{DATASET}/001")["captions"]
    )
    expect(page.locator(".called")).to_have_text(table["name"][20])
    facts = page.locator(".facts")
    expect(facts).to_contain_text(f"{table['score'][20]:.2f}")
    expect(facts).to_contain_text(f"{table['auc'][20]:.2f}")
    top = page.locator("section").first.locator("figure")
    shown = seen(top.locator(".caption"))
    assert shown == [BLANK.sub(" ", captions[sample]).strip() for sample, _ in details["top"]]
    assert [float(text) for text in seen(top.locator(".value"))] == pytest.approx(
        [v for _, v in details["top"]], abs=5.1e-3
    )
    sources = top.locator("img").evaluate_all("images => images.map(image => image.getAttribute('src'))")
    assert sources == [f"samples/{DATASET}/{s // 500:03d}/{s:06d}.webp" for s, _ in details["top"]]
    page.get_by_role("heading", name="Around the 50th percentile").scroll_into_view_if_needed()
    band = page.locator(".band").nth(1).locator("figure .caption")
    expect(band).to_have_count(4)
    assert seen(band) == [captions[sample] or "no caption" for sample, _ in details["bands"][1]["samples"]]
    total = sum(details["histogram"]["counts"])
    expect(page.locator(".histogram svg")).to_have_attribute(
        "aria-label", re.compile(f"^Histogram of {total} activations")
    )
    assert page.locator(".histogram rect").count() == 20
    assert seen(page.locator(".match h3")) == [name for name in NAMES if name != "seer@0"]


def test_follows_a_match_and_goes_back(tab, site):
    page = tab.open(f"#/feature/{SET}/seer@0/3/20")
    best = read_data(site, layer_key("seer@0", 3))["best"]["reader@0"]
    layer, feature = best["layer"][20], best["feature"][20]
    there = read_data(site, layer_key("reader@0", layer))
    card = page.locator(".match", has=page.get_by_role("heading", name="reader@0", exact=True))
    card.scroll_into_view_if_needed()
    expect(card.locator(".rho")).to_have_text(f"{best['rho'][20]:.2f}")
    expect(card.locator(".name")).to_have_text(feature_label(there, feature))
    expect(card.locator("figure")).to_have_count(3)
    before = page.evaluate("scrollY")
    assert before > 0
    card.locator(".where a").click()
    expect(page.locator("h1")).to_have_text(f"Feature {feature} of reader@0, layer {layer}")
    assert page.evaluate("scrollY") == 0
    page.go_back()
    expect(page.locator("h1")).to_have_text("Feature 20 of seer@0, layer 3")
    page.wait_for_function("before => Math.abs(scrollY - before) < 2", arg=before)
    page.go_forward()
    expect(page.locator("h1")).to_have_text(f"Feature {feature} of reader@0, layer {layer}")


def test_links_to_the_neighbours_of_a_feature(tab):
    page = tab.open(f"#/feature/{SET}/seer@0/3/0")
    assert page.get_by_role("link", name="Previous").count() == 0
    page.get_by_role("link", name="Next").click()
    expect(page.locator("h1")).to_have_text("Feature 1 of seer@0, layer 3")
    tab.open(f"#/feature/{SET}/seer@0/3/{FEATURES - 1}")
    assert page.get_by_role("link", name="Next").count() == 0


def test_the_overlay_covers_the_part_that_the_encoder_saw(tab, site):
    """On wide, tall and square images, whether the encoder saw a part of one or more than it."""
    page = tab.open(f"#/feature/{SET}/seer@0/0/0")
    assert page.locator("canvas").count() == 0
    page.get_by_label("Where it fires").check()
    expect(page).to_have_url(re.compile(r"overlay=yes$"))
    frames = page.locator("section").first.locator(".thumbnail")
    expect(page.locator("canvas")).to_have_count(8)
    assert frames.nth(8).locator("canvas").count() == 0  # this one has no map
    rng = np.random.default_rng(0)
    shapes = set()
    for place in range(8):
        image = frames.nth(place).locator("img").bounding_box()
        canvas = frames.nth(place).locator("canvas").bounding_box()
        width, height = SIZES[place % 3]
        assert (image["width"], image["height"]) == pytest.approx((width, height), abs=0.6)
        x0, y0, x1, y1 = make_map(rng, place)["box"]
        assert canvas["x"] - image["x"] == pytest.approx(x0 * width, abs=0.6)
        assert canvas["y"] - image["y"] == pytest.approx(y0 * height, abs=0.6)
        assert canvas["width"] == pytest.approx((x1 - x0) * width, abs=0.6)
        assert canvas["height"] == pytest.approx((y1 - y0) * height, abs=0.6)
        shapes.add((place % 3, place % 4))
    assert len(shapes) == 8
    # Images share a colour scale, so the colour of the active lower left cell is relative to the overall maximum.
    drawn = page.locator("canvas").evaluate_all(
        "all => all.map(one => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data])"
    )
    maps = read_data(site, f"{layer_key('seer@0', 0)}/maps-000")["maps"][0]
    strengths = [entry["max"] for entry in maps[:8]]
    assert seen(page.locator(".key span"))[::2] == ["0", f"{max(strengths):.3g}"]
    for pixels, strength in zip(np.array(drawn).reshape(8, 20, 4), strengths, strict=True):
        expected = 255 * np.array(colormaps["viridis"](strength / max(strengths))[:3])
        np.testing.assert_allclose(pixels[15, :3], expected, atol=8)
        np.testing.assert_allclose(np.delete(pixels, 15, 0)[:, :3], np.full((19, 3), [68, 1, 84]), atol=2)
        assert (pixels[15, 3] > np.delete(pixels[:, 3], 15)).all()
    assert frames.first.locator("canvas").evaluate("canvas => getComputedStyle(canvas).imageRendering") == "pixelated"
    assert "row 4 of 4, column 1 of 5" in frames.first.locator("canvas").get_attribute("aria-label")
    page.get_by_label("Where it fires").uncheck()
    expect(page.locator("canvas")).to_have_count(0)


def test_the_overlay_scales_with_a_shrunken_image(open_tab, site):
    page = open_tab(site, viewport={"width": 300, "height": 700}).open(f"#/feature/{SET}/seer@0/0/0?overlay=yes")
    frame = page.locator(".thumbnail").first
    image, canvas = frame.locator("img").bounding_box(), frame.locator("canvas").bounding_box()
    assert image["width"] < 140
    assert image["height"] == pytest.approx(image["width"] / 2, abs=1)
    assert canvas["width"] == pytest.approx(image["width"] / 2, abs=0.6)
    assert canvas["x"] - image["x"] == pytest.approx(image["width"] / 4, abs=0.6)


def test_icons_are_magnified(open_tab, broken_site):
    """An image of a few pixels is shown large enough and keeps its aspect ratio."""
    details = read_data(broken_site, f"{layer_key('seer@0', 3)}/000")["features"][20]
    sample = details["top"][0][0]
    key = f"samples/{DATASET}/{sample // 500:03d}"
    samples = read_data(broken_site, key)
    samples["sizes"][sample % 500] = [6, 3]
    (broken_site / f"{key}.js").unlink()  # a hard link to the site of other tests
    write(broken_site, key, samples)
    page = open_tab(broken_site).open(f"#/feature/{SET}/seer@0/3/20")
    box = page.locator("section").first.locator("img").first.bounding_box()
    assert (box["width"], box["height"]) == pytest.approx((96, 48), abs=0.6)


def test_without_maps_there_is_no_overlay(tab):
    page = tab.open(f"#/feature/{SET}/seer@0/0/2?overlay=yes")
    assert page.get_by_label("Where it fires").count() == 0
    expect(page.locator("section").first.locator("img")).to_have_count(9)


def test_tokens_are_marked_by_strength(tab, site):
    page = tab.open(f"#/feature/{SET}/reader@0/5/21")
    tokens = read_data(site, f"{layer_key('reader@0', 5)}/000")["features"][21]["tokens"]
    first = page.locator("section").first.locator("figure").first
    assert seen(first.locator(".tokens bdi")) == [piece.strip() for piece in tokens[0]["text"]]
    assert first.locator(".tokens bdi").all_text_contents()[1] == " "  # also marked
    assert seen(first.locator(".tokens")) == ["".join(tokens[0]["text"])]
    marks = first.locator("mark")
    assert marks.count() == sum(value > 0 for value in tokens[0]["values"])
    shown = marks.evaluate_all(
        """marks => marks.map(mark => {
            const style = getComputedStyle(mark);
            return [mark.title, parseFloat(style.textDecorationThickness), style.backgroundColor];
        })"""
    )
    above = [value for value in tokens[0]["values"] if value > 0]
    assert [float(title) for title, *_ in shown] == pytest.approx(above, abs=5.1e-3)
    thickness = [thick for _, thick, _ in shown]
    assert thickness[int(np.argmax(above))] == max(thickness) == pytest.approx(4, abs=0.1)
    assert len({background for *_, background in shown}) == len(set(above))
    last = page.locator("section").first.locator("figure").nth(8)  # without tokens
    assert last.locator("mark").count() == 0
    assert last.locator(".caption").count() == 1
    tab.open(f"#/feature/{SET}/reader@0/5/2")
    assert page.locator("mark").count() == 0
    expect(page.locator("section").first.locator(".caption")).to_have_count(9)


def test_a_feature_that_was_never_active(tab):
    page = tab.open(VIEWS["never active"])
    expect(page.locator("main")).to_contain_text("This feature was never active on these samples.")
    expect(page.locator(".facts")).not_to_contain_text("rank")
    assert page.get_by_role("heading", name="Weaker samples").count() == 0
    assert page.locator(".match", has_text="No match").count() == len(NAMES) - 1


def test_ranking(tab, site):
    page = tab.open(VIEWS["ranking"])
    study = read_data(site, "study")
    ranking, other = study["sharedness"]
    assert column(page, "Feature") == [str(n) for n in ranking["features"][:100]]
    assert column(page, "Rank")[:12] == [*(f"top 1% {n}" for n in range(1, 11)), "11", "12"]
    assert [float(text) for text in column(page, "ρ G")] == pytest.approx(ranking["rho_g"][:100], abs=5.1e-3)
    page.get_by_role("button", name="ρ H", exact=True).click()
    assert column(page, "Feature") == [str(ranking["features"][n]) for n in ordered(ranking["rho_h"])[:100]]
    # One point per feature; the top of the ranking is separate.
    dots = page.locator("path.dots").evaluate_all(
        "paths => paths.map(path => path.getAttribute('d').split('M').length - 1)"
    )
    assert dots == [FEATURES - 10, 10]
    more, less = (
        sum(sign * (g - h) > 0 for g, h in zip(ranking["rho_g"], ranking["rho_h"], strict=True)) for sign in (1, -1)
    )
    counts = (
        f"{more} above the diagonal (ρ G > ρ H), {less} below, 0 with both 0 (no match). Large dots: the top 1% by Δ."
    )
    expect(page.locator(".scatter figcaption")).to_have_text(counts)
    overlap = study["overlaps"][0]
    row = page.locator("section", has=page.get_by_role("heading", name="Overlap")).locator("tbody tr")
    texts = seen(row.locator("th, td"))
    assert texts[:5] == ["shared-with-vlms", "10", str(overlap["overlap"]), "0.769", "5.0 × 10⁻⁵"]
    both = [n for n in ranking["features"][:10] if n in other["features"][:10]]
    assert both
    assert texts[5].split() == [str(n) for n in both]


def test_the_samples_that_fit_worst_and_best(tab, site):
    page = tab.open()
    page.get_by_role("link", name="captions").click()
    expect(page.locator("h1")).to_have_text("Fit of samples: captions")
    expect(page.locator(".lead")).to_contain_text("by features of seer@0 (layer 5) and of reader@0 (layers 3, 5).")
    expect(page.locator("main")).to_contain_text("above 0.8 at global tokens: reader@0, layer 3.")
    (fit,) = read_data(site, "study")["samples"]
    for title in ("Worst", "Best"):
        shown = page.locator("section", has=page.get_by_role("heading", name=f"{title} fit")).locator(".specimen")
        expect(shown).to_have_count(6)
        values = [float(text.replace("−", "-")) for text in seen(shown.locator(".value"))]
        assert values == [value for _, value in fit[title.lower()]]
        sources = shown.locator("img").evaluate_all("images => images.map(image => image.src)")
        assert all(f"{n:06d}.webp" in source for (n, _), source in zip(fit[title.lower()], sources, strict=False))


def test_marked_features_are_kept_exported_and_imported(tab, tmp_path):
    page = tab.open(VIEWS["image"])
    link = page.locator("#marks")
    expect(link).to_have_text("Marked (0)")
    page.get_by_role("button", name="☆ Mark").click()
    page.get_by_label("Note on feature 20 of seer@0, layer 3").fill("<b>wheels</b>")
    page.keyboard.press("Tab")
    page.reload()
    page.get_by_role("link", name="Marked (1)").click()
    expect(page.locator("h1")).to_have_text("Marked features")
    expect(page.get_by_role("link", name="seer@0, layer 3, feature 20")).to_be_visible()
    expect(page.locator("tbody .thumbnail")).to_have_count(3)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    marks = json.loads(Path(download.value.path()).read_text())
    assert [(mark["member"], mark["layer"], mark["feature"], mark["note"]) for mark in marks] == [
        ("seer@0", 3, 20, "<b>wheels</b>")
    ]
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("main")).to_contain_text("No feature is marked. Mark one on its page.")
    others = [marks[0] | {"dataset": "../elsewhere"}, marks[0] | {"feature": FEATURES}, marks[0] | {"layer": "3/x"}, 7]
    for written, words in (
        (
            json.dumps([*marks, *others, marks[0] | {"feature": 5}]),
            "2 marked features read from list.json; 4 of other studies left out.",
        ),
        (json.dumps(others), "list.json has no marked features of this study. Choose a file that “Export” wrote."),
        ("nothing", "list.json has no marked features of this study. Choose a file that “Export” wrote."),
    ):
        (tmp_path / "list.json").write_text(written)
        page.get_by_label("Import").set_input_files(tmp_path / "list.json")
        expect(page.get_by_role("status")).to_have_text(words)
    expect(page.locator("tbody tr")).to_have_count(2)
    page.go_back()
    expect(page.get_by_role("button", name="★ Marked")).to_have_attribute("aria-pressed", "true")


def test_a_sample_shows_the_features_that_fire_for_it_in_every_member(tab):
    page = tab.open(VIEWS["image"])
    first = page.locator(".specimen a").first
    first.click()
    expect(page.locator("h1")).to_contain_text("Sample")
    page = tab.open(VIEWS["sample"])
    expect(page.locator("h1")).to_have_text("Sample 7")
    expect(page.locator("main > .samples .specimen")).to_have_count(1)
    for member in NAMES:
        card = page.locator(".match", has=page.get_by_role("heading", name=member, exact=True))
        card.scroll_into_view_if_needed()
        expect(card.locator(".fired")).to_have_count(3)
        assert seen(card.locator("a")) == ["Feature 7", "Feature 8", "Feature 9"]
        assert seen(card.locator(".fired p > .quiet")) == ["(strongest)", "(strongest but 1)", "(strongest but 2)"]
    card = tab.open(f"#/sample/{SET}/0").locator(".match").first
    card.scroll_into_view_if_needed()
    expect(card).to_contain_text("None has these among its strongest samples.")


def test_search_finds_samples_by_words_and_the_features_that_fire_for_them(tab, site):
    captions = [text for n in range(2) for text in read_data(site, f"samples/{DATASET}/{n:03d}")["captions"]]
    page = tab.open(f"#/search/{SET}")
    expect(page.locator("main")).to_contain_text("Type what captions should say.")
    page.get_by_label("Words or a sentence").fill(f"{captions[505]}!")
    samples = page.locator("section", has=page.get_by_role("heading", name="Samples", exact=True))
    expect(samples).to_contain_text("whose captions have the most of these words.")
    found = [int(n) for n in samples.locator(".specimen a").evaluate_all("a => a.map(a => a.href.split('/').pop())")]
    assert 505 in found
    assert set(captions[found[0]].split()) == set(captions[505].split())
    card = page.locator(".match").first
    card.scroll_into_view_if_needed()
    expect(card.locator(".fired")).to_have_count(6)
    count = Counter((n + k) % FEATURES for n in found if n for k in range(3))
    numbers = [int(text.split()[1]) for text in seen(card.locator(".fired a"))]
    cosines = {n: count[n] / (1 + n % 9) ** 0.5 for n in count}
    assert [cosines[n] for n in numbers] == sorted(cosines.values(), reverse=True)[:6]
    assert f"({count[numbers[0]]} of these, {1 + numbers[0] % 9} in all)" in seen(card.locator(".fired p > .quiet"))
    page.get_by_label("Words or a sentence").fill("zzz")
    expect(page.locator("main")).to_contain_text("No caption has any of these words.")


def test_the_reader_switches_a_ranking_to_its_calibrated_form(tab, site):
    page = tab.open(VIEWS["ranking"])
    ranking = read_data(site, "study")["sharedness"][0]
    assert ranking["features"] != ranking["calibrated"]["features"]
    shares = [float(text.removesuffix("%")) / 100 for text in column(page, "Top share")]
    assert shares == pytest.approx(ranking["share"][:100], rel=6e-3)
    page.get_by_label("Value").select_option("calibrated")
    assert column(page, "Feature") == [str(n) for n in ranking["calibrated"]["features"][:100]]
    (overlap,) = read_data(site, "study")["overlaps"]
    row = page.locator("section", has=page.get_by_role("heading", name="Overlap")).locator("tbody td")
    assert seen(row)[1:4] == [str(overlap["calibrated_overlap"]), "0.769", "0.050"]
    shown = [float(text) for text in column(page, "e H")]
    assert shown == pytest.approx(ranking["calibrated"]["rho_h"][:100], abs=5.1e-3)
    expect(page.locator(".scatter figcaption")).to_contain_text("e G > e H")
    topics = page.locator("section", has=page.get_by_role("heading", name="Words of the top"))
    assert seen(topics.locator("tbody th, tbody td")) == ["flag", "4", "50%", "2%", "0.003"]
    page.get_by_label("Value").select_option("published")
    assert column(page, "Feature") == [str(n) for n in ranking["features"][:100]]
    expect(topics).to_contain_text("No word in the captions")
    page.go_back()
    assert column(page, "Feature") == [str(n) for n in ranking["calibrated"]["features"][:100]]


def test_unclear_names_are_grey_and_searchable(tab, site):
    table = read_data(site, layer_key("seer@0", 3))
    some = [n for n, words in enumerate(table["candidate"]) if words]
    page = tab.open(f"#/layer/{SET}/seer@0/3?sort=feature&q=perhaps")
    assert column(page, "Feature") == [str(n) for n in some]
    assert column(page, "Name") == [f"perhaps perhaps-{n}" for n in some]
    ink, grey = (
        page.locator(f"{place} >> nth=0").evaluate("element => getComputedStyle(element).color")
        for place in ("tbody td", "tbody th .quiet")
    )
    assert ink != grey
    page.get_by_label("Named only").check()
    expect(page.get_by_role("status")).to_have_text(f"0 of {FEATURES} features")
    page = tab.open(f"#/feature/{SET}/seer@0/3/{some[0]}")
    expect(page.locator(".called")).to_have_text(f"perhaps perhaps-{some[0]} (no clear name)")


def test_typology_counts_words(tab, site):
    """Each of the top features is listed under the most common word of its name."""
    page = tab.open(VIEWS["ranking"])
    ranking = read_data(site, "study")["sharedness"][0]
    names = read_data(site, layer_key("seer-clip@1", 5))["name"]
    words = [sorted(set(names[n].lower().split(", "))) if names[n] else [] for n in ranking["features"][:10]]
    frequent = Counter(word for some in words for word in some)
    groups = Counter(min(some, key=lambda word: (-frequent[word], word)) if some else "no clear name" for some in words)
    shown = dict(
        zip(
            seen(page.locator("summary bdi, summary .quiet")),
            map(int, seen(page.locator("summary .tally"))),
            strict=True,
        )
    )
    assert shown == {BLANK.sub(" ", word).strip(): count for word, count in groups.items()}
    page.locator("summary").first.click()
    page.locator("details[open] a").first.click()
    expect(page.locator("h1")).to_contain_text("of seer-clip@1, layer 5")


def test_the_scatter_names_and_opens_points(tab, site):
    page = tab.open(VIEWS["ranking"])
    ranking = read_data(site, "study")["sharedness"][0]
    box = page.locator("path.axes").bounding_box()
    x = box["x"] + ranking["rho_h"][0] * box["width"]
    y = box["y"] + (1 - ranking["rho_g"][0]) * box["height"]
    page.mouse.move(x, y)
    expect(page.locator(".said")).to_contain_text(f"Feature {ranking['features'][0]}:")
    page.mouse.click(x, y)
    expect(page.locator("h1")).to_have_text(f"Feature {ranking['features'][0]} of seer-clip@1, layer 5")


def test_jump(tab):
    page = tab.open()
    page.get_by_label("Member").select_option("reader@0")
    page.get_by_label("Layer", exact=True).select_option("5")
    page.get_by_label("Feature number").fill("77")
    page.get_by_label("Feature number").press("Enter")
    expect(page.locator("h1")).to_have_text("Feature 77 of reader@0, layer 5")
    page.get_by_role("navigation", name="Breadcrumbs").get_by_role("link", name="reader@0, layer 5").click()
    expect(page.locator("h1")).to_have_text("Features of reader@0, layer 5")
    expect(page.get_by_label("Member", exact=True)).to_have_value("reader@0")


def test_remembers_the_dark_theme(tab):
    page = tab.open()
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    button = page.get_by_role("button", name="Dark")
    expect(button).to_have_attribute("aria-pressed", "false")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(paper)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    tab.open(VIEWS["table"])
    assert page.evaluate(paper) == dark
    button.click()
    assert page.evaluate(paper) == light


def test_follows_the_systems_theme_without_storage(open_tab, site):
    opened = open_tab(site, color_scheme="dark")
    opened.page.add_init_script(
        """Object.defineProperty(window, 'localStorage', {
            get() { throw new DOMException('denied', 'SecurityError'); },
        })"""
    )
    page = opened.open()
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Dark").click()
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "false")


def focused(page):
    return page.evaluate(
        "document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()"
    )


def tab_to(page, text, limit=60):
    """Press Tab until the focused element has this text."""
    for _ in range(limit):
        page.keyboard.press("Tab")
        if focused(page) == text:
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
            return
    raise AssertionError(f"Tab does not lead to {text!r}")


def test_keyboard_alone(tab, site):
    """From the overview to a feature: past the header, over the cells of a heatmap, a sort, and a row."""
    page = tab.open()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to content"
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_be_focused()
    assert page.url.endswith("#/")
    wmppc = read_data(site, "study")["layerwise"][0]["pairs"][0]["wmppc"]
    tab_to(page, f"wMPPC from seer@0 layer 5 to reader@0 layer 0: {wmppc[2][0]:.2f}, by chance 0.07")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert focused(page) == f"wMPPC from seer@0 layer 3 to reader@0 layer 0: {wmppc[1][0]:.2f}, by chance 0.07"
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_be_focused()
    expect(page.locator("h1")).to_have_text("seer@0 layer 3 → reader@0 layer 0")
    tab_to(page, "seer@0")
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort=ascending]")).to_have_text("seer@0")
    assert focused(page) == "seer@0"
    shown = page.locator("tbody a").all_text_contents()
    name = next(name for name in page.locator("tbody th a").all_text_contents()[10:] if shown.count(name) == 1)
    tab_to(page, name)
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_contain_text("of seer@0, layer 3")


def test_arrow_keys_skip_cells_without_a_value(tab):
    page = tab.open()
    page.get_by_role("link", name="wMPPC from seer-clip@1 to seer@0").focus()
    page.keyboard.press("ArrowRight")
    assert focused(page).startswith("wMPPC from seer-clip@1 to reader@0")
    assert page.locator("table.heat").first.locator('a[tabindex="0"]').count() == 1
    page.get_by_role("link", name="wMPPC from seer@0 to reader-clip@1").focus()
    for place in ("seer-clip@1 to seer@0", "seer-clip@1 to reader@0"):  # from row to row
        page.keyboard.press("ArrowRight")
        assert focused(page).startswith(f"wMPPC from {place}")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # the first row is the last upwards
    assert focused(page).startswith("wMPPC from seer@0 to reader@0")


def test_hostile_texts_are_escaped(open_tab, site):
    opened = open_tab(site)
    page = opened.open(f"#/feature/{SET}/seer@0/0/0")
    captions = page.locator("section").first.locator(".caption bdi").all_text_contents()
    assert captions == HOSTILE[:9]
    opened.open(f"#/layer/{SET}/reader-clip@1/0?sort=feature")
    rows = page.locator("tbody tr")
    assert rows.locator("th bdi").all_text_contents()[:9] == HOSTILE[:9]
    expect(rows.nth(9).locator("th")).to_have_text("no clear name")  # an empty name has no text
    for number in range(len(HOSTILE)):
        opened.open(f"#/feature/{SET}/reader-clip@1/0/{number}")
        expect(page.locator(".called")).to_have_text(HOSTILE[number] or "no clear name")
        assert page.locator("main script, main svg[onload], main img[src=x]").count() == 0
    # Direction overrides end with the text.
    isolated = page.locator("bdi").first.evaluate("element => getComputedStyle(element).unicodeBidi")
    assert isolated == "isolate"
    assert not page.evaluate(
        """[...document.querySelectorAll('[title],[alt],[aria-label]')].some(element =>
            /[\\u202e\\u0007]/.test(element.title + element.alt + element.ariaLabel))"""
    )


@pytest.mark.parametrize(
    "route",
    [
        "#/nothing/here",
        f"#/layer/{SET}/nobody@0/3",
        f"#/layer/{SET}/seer@0/99",
        f"#/layer/{SET}/seer@0",
        f"#/layer/..%2F../{SAE}/seer@0/3",
        f"#/feature/{SET}/seer@0/3/{FEATURES}",
        f"#/feature/{SET}/seer@0/3/-1",
        f"#/feature/{SET}/seer@0/3/%3Cimg%20src=x%20onerror=window.pwned=9%3E",
        f"#/pair/{SET}/seer@0/0/seer-clip@1/0",
        f"#/ranking/{SET}/__proto__",
        "#/constructor",
        "#/%E0%A4%A",
    ],
)
def test_unknown_routes(tab, route):
    page = tab.open(route)
    expect(page.locator("h1")).to_have_text("Not found")
    page.get_by_role("link", name="Back to the overview").click()
    expect(page.locator("h1")).to_have_text("made-up")


def test_missing_thumbnails_leave_a_placeholder(open_tab, site):
    opened = open_tab(site)
    page = opened.open(f"#/feature/{SET}/seer@0/0/0")
    captions = read_data(site, f"samples/{DATASET}/000")["captions"]
    page.get_by_role("heading", name="Around the 90th percentile").scroll_into_view_if_needed()
    gone = page.locator(".band").first.locator(".gone")
    expect(gone).to_have_count(2)  # one file is missing, the other was never written
    box = gone.first.bounding_box()
    assert (box["width"], box["height"]) == pytest.approx(SIZES[MISSING_THUMBNAIL % 3], abs=0.6)
    for at, sample in enumerate((MISSING_THUMBNAIL, UNRENDERED)):
        figure = page.locator(".band").first.locator("figure").nth(2 + at)
        expect(figure.locator(".caption")).to_have_text(captions[sample])
        assert figure.locator("img").count() == 0


@pytest.mark.parametrize(
    ("file", "route", "harm"),
    [
        ("study.js", "#/", "missing"),
        ("study.js", f"#/layer/{SET}/seer@0/3", "missing"),
        ("study.js", "#/", "other"),
        (f"{layer_key('seer@0', 3)}.js", f"#/layer/{SET}/seer@0/3", "missing"),
        (f"{layer_key('seer@0', 3)}.js", f"#/layer/{SET}/seer@0/3", "torn"),
        (f"{layer_key('seer@0', 3)}/000.js", f"#/feature/{SET}/seer@0/3/20", "missing"),
        (f"data/{SET}/pairs/seer@0__reader@0/layer-00.js", VIEWS["pair"], "missing"),
    ],
)
def test_names_a_missing_data_file(open_tab, broken_site, file, route, harm):
    opened = open_tab(broken_site)
    path = broken_site / file
    path.unlink()
    if harm == "missing":
        opened.allowed.append(file)
    else:
        path.write_text(
            'conceptshare.add("other", {});\n' if harm == "other" else f'conceptshare.add("{file[:-3]}", "eJw=");'
        )
    page = opened.open(route)
    expect(page.locator("h1")).to_have_text("A file is missing" if harm == "missing" else "A file cannot be read")
    expect(page.locator("main .error")).to_contain_text(file)
    if file != "study.js":
        page.get_by_role("link", name="Back to the overview").click()
        expect(page.locator("h1")).to_have_text("made-up")


def test_a_missing_part_leaves_the_rest(open_tab, broken_site):
    opened = open_tab(broken_site)
    captions = f"samples/{DATASET}/000.js"
    opened.allowed += [captions, "reader@0/layer-"]
    (broken_site / captions).unlink()
    for layer in LAYERS:
        shutil.rmtree(broken_site / layer_key("reader@0", layer))
    (broken_site / f"{layer_key('seer@0', 3)}/maps-000.js").unlink()
    opened.allowed.append("maps-000")
    page = opened.open(f"#/feature/{SET}/seer@0/3/20?overlay=yes")
    expect(page.locator(".key .error")).to_contain_text("maps-000.js")
    expect(page.locator(".samples .error").first).to_contain_text(captions)
    expect(page.locator(".histogram rect")).to_have_count(20)
    card = page.locator(".match", has=page.get_by_role("heading", name="reader@0", exact=True))
    card.scroll_into_view_if_needed()
    expect(card.locator(".samples .error")).to_contain_text("reader@0/layer-")


def test_a_large_layer(open_tab, large_site):
    """8,192 features and their matches in nine others: all are sorted, and a hundred are in the document."""
    folder, table = large_site
    page = open_tab(folder).open(f"#/layer/{SET}/member-0@0/0")
    expect(page.get_by_role("status")).to_have_text("8,192 features")
    assert column(page, "Feature") == [str(n) for n in ordered(table["strength"])[:100]]
    page.get_by_role("button", name="ρ member-5@0").click()
    order = ordered(table["best"]["member-5@0"]["rho"])
    assert column(page, "Feature") == [str(n) for n in order[:100]]
    page.get_by_role("button", name="Last").click()
    expect(page.locator(".pager")).to_contain_text("Page 82 of 82")
    assert column(page, "Feature") == [str(n) for n in order[8100:]]
    page.get_by_label("Name or number").fill("cat")
    kept = sum("cat" in (name or "") for name in table["name"])
    expect(page.get_by_role("status")).to_have_text(f"{kept:,} of 8,192 features")
    assert page.locator("tbody tr").count() == 100
    assert page.evaluate("document.querySelectorAll('*').length") < 5000


@pytest.mark.parametrize("view", ["#/", f"#/layer/{SET}/member-0@0/0?images=no"])
@pytest.mark.parametrize("size", [SIZE, NARROW])
def test_long_names_stay_in_their_cells(view, size, open_tab, large_site):
    page = open_tab(large_site[0]).open(view)
    page.set_viewport_size(size)
    places = page.locator("table th").evaluate_all("""heads => heads.map((head) => {
        const text = document.createRange();
        text.selectNodeContents(head);
        return [head, text].map((one) => one.getBoundingClientRect());
    })""")
    assert len(places) > 15
    for cell, text in places:
        assert cell["left"] - 1 <= text["left"] <= text["right"] <= cell["right"] + 1
    rows = page.locator("table.heat tbody th").evaluate_all("heads => heads.map((head) => head.clientWidth)")
    assert max(rows, default=0) <= size["width"] / 2


def test_reads_only_visible_rows(open_tab, large_site):
    """Of 128 files of details, only those of visible rows are read, and others on scrolling."""
    opened = open_tab(large_site[0])
    asked = []
    opened.page.on("request", lambda request: asked.append(request.url))
    page = opened.open(f"#/layer/{SET}/member-0@0/0?sort=feature")
    expect(page.locator(".strip img").first).to_be_visible()
    assert sum("layer-00/" in url for url in asked) == 1
    page.locator("tbody tr").last.scroll_into_view_if_needed()
    expect(page.locator("tbody tr").last.locator(".strip .thumbnail")).to_have_count(3)
    assert sum("layer-00/" in url for url in asked) == 2
    asked.clear()
    opened.open(f"#/layer/{SET}/member-0@0/0?images=no")
    assert not [url for url in asked if "layer-00/" in url]


def test_over_http(open_tab, site):
    """The same files from a server, under the same policy."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        root = f"http://127.0.0.1:{server.server_port}"
        opened = open_tab(site)
        opened.allowed.append("favicon.ico")  # which browsers request from every server
        opened.address = lambda route: f"{root}/{route}"
        opened._on_request = lambda url: url.startswith(f"{root}/") or opened.wrong.append(f"outside: {url}")
        page = opened.open(f"#/feature/{SET}/seer@0/3/20")
        images = page.locator("section").first.locator("img")
        expect(images).to_have_count(9)
        for image in images.all():
            expect(image).to_have_js_property("complete", True)
            assert image.evaluate("image => image.naturalWidth") > 0
    finally:
        server.shutdown()
        server.server_close()


def test_the_policy_refuses_scripts_and_markup(open_tab, site):
    opened = open_tab(site)
    page = opened.open()
    refused = page.evaluate(
        """() => {
            const tries = {
                markup: () => { document.body.innerHTML = '<p>markup'; },
                script: () => { document.createElement('script').text = 'window.pwned = 1'; },
            };
            const refused = ([, run]) => { try { run(); return false; } catch { return true; } };
            return Object.entries(tries).filter(refused).map(([name]) => name);
        }"""
    )
    assert refused == ["markup", "script"]
    opened.wrong = [what for what in opened.wrong if "TrustedScript" not in what and "TrustedHTML" not in what]


def luminance(colour):
    share = np.array(colour[:3]) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


# Every element with text: its colour, and the backgrounds of it and its ancestors, innermost first.
COLOURS = """
() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const known = new Map();
    const parse = (colour) => {
        if (!known.has(colour)) known.set(colour, measure(colour));
        return known.get(colour);
    };
    const measure = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    return [...document.querySelectorAll('body *')].filter((element) =>
        element.checkVisibility() && !element.matches(':disabled, option')
        && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
    ).map((element) => {
        const behind = [];
        for (let at = element; at; at = at.parentElement) behind.push(parse(getComputedStyle(at).backgroundColor));
        const style = getComputedStyle(element);
        const name = element.className.baseVal ?? element.className;
        return [`${element.tagName}.${name} ${element.textContent.slice(0, 30)}`,
                parse(element instanceof SVGElement ? style.fill : style.color), behind];
    });
}
"""


def scroll(page):
    """Scroll through the page so that lazy content loads."""
    page.evaluate(
        """async () => {
            for (let y = 0; y < Math.min(document.documentElement.scrollHeight, 9000); y += 600) {
                scrollTo(0, y);
                await new Promise((done) => setTimeout(done, 30));
            }
        }"""
    )


@pytest.mark.parametrize("name", VIEWS)
def test_every_view(open_tab, site, name):
    """Checks the structure and contrast of the whole view, and that it fits a narrow screen."""
    page = open_tab(site).open(VIEWS[name])
    scroll(page)
    check_structure(page)
    check_contrast(page)
    page.set_viewport_size(NARROW)
    scroll(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= NARROW["width"]


def check_contrast(page):
    """All texts reach the 4.5 to 1 of WCAG's AA."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(COLOURS)
        assert len(found) > 5
        for what, colour, behind in found:
            ground = np.array([255.0, 255, 255])
            for layer in reversed(behind):
                share = layer[3] / 255
                ground = (1 - share) * ground + share * np.array(layer[:3])
            assert contrast(colour, ground) >= 4.5, (scheme, what, colour, ground)


def check_structure(page):
    """One h1, headings in order, landmarks, names for all controls, alternatives for all pictures, no id twice."""
    assert page.locator("html").get_attribute("lang") == "en"
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(heading => Number(heading.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert page.evaluate("['header', 'main'].map(name => document.querySelectorAll(`body > ${name}`).length)") == [1, 1]
    needed = ["alt", "width", "height"]
    images = page.evaluate(
        """needed => [...document.images].map(image =>
            [image.loading, ...needed.filter(name => image.hasAttribute(name))])""",
        needed,
    )
    assert all(image == ["lazy", *needed] for image in images)
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every(element => element.ariaLabel)")
    unnamed = page.evaluate(
        """[...document.querySelectorAll('a[href], button, input, select, summary')].filter(element =>
            !(element.ariaLabel || element.textContent.trim() || element.labels?.[0]?.textContent.trim())
            || (element.matches('input, select') && !element.labels.length && !element.ariaLabel)
        ).map(element => element.outerHTML)"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.querySelectorAll('th')].every(head => head.scope)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


def test_every_member_and_layer_opens(tab):
    """Every link of the overview's list of layers has its table."""
    page = tab.open()
    links = page.locator(".members a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
    assert len(links) == len(MEMBERS) * len(LAYERS)
    for link in links:
        tab.open(f"{link}?images=no")
        expect(page.get_by_role("status")).to_have_text(f"{FEATURES} features")
