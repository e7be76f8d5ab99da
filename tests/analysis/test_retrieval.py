"""Retrieval by matched features against a direct computation, and what it gives for related and unrelated encoders."""

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from conceptshare.analysis import retrieval
from conceptshare.analysis.retrieval import matched_retrieval, retrieval_table, retrieved
from conceptshare.cli import app
from conceptshare.config.members import GroupedMember
from conceptshare.io.errors import NumericsError, StoreError
from tests.helpers.studies import study_file

MEMBERS = [
    GroupedMember("vit@0", "image", "vision"),
    GroupedMember("bert@0", "text", "language"),
    GroupedMember("clip-text@1", "text", "vlm"),
]


def related(rng, samples=60, common=12, noise=0.3):
    """Features of two encoders: common ones in another order, others of their own, and one that never varies."""
    shared = rng.exponential(1, (samples, common)) * (rng.random((samples, common)) < 0.4)
    a, b = (
        np.concatenate([shared, rng.exponential(1, (samples, n)), np.full((samples, 1), 2.0)], axis=1) for n in (5, 9)
    )
    a, b = (np.maximum(x + noise * rng.standard_normal(x.shape) * (x.std(0) > 0), 0) for x in (a, b))
    return [x[:, rng.permutation(x.shape[1])].astype(np.float16).astype(np.float64) for x in (a, b)]


def directly(a, b, half):
    """Matches of the first half, and expected recalls and median rank of the second in both directions."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(a[:half], b[:half], rowvar=False)[: a.shape[1], a.shape[1] :], nan=-1)
    pairs = {*enumerate(r.argmax(1)), *((i, j) for j, i in enumerate(r.argmax(0)))}
    pairs = [(i, j) for i, j in pairs if r[i, j] > 0]
    u, v = (
        np.stack(
            [
                r[i, j] ** 0.5 * (x[half:, c] - x[:half, c].mean()) / x[:half, c].std()
                for i, j in pairs
                for c in [(i, j)[side]]
            ]
        )
        for side, x in enumerate((a, b))
    )
    cosine = (u / np.linalg.norm(u, axis=0)).T @ (v / np.linalg.norm(v, axis=0))
    results = []
    for similarity in (cosine, cosine.T):
        rank = 1 + (similarity > np.diag(similarity)[:, None]).sum(1)
        results.append((np.mean(rank <= 1), np.mean(rank <= 10), np.median(rank)))
    return len(pairs), results


def test_retrieval_equals_a_direct_computation(rng, monkeypatch):
    monkeypatch.setattr(retrieval, "FEATURE_COLUMNS", 7)
    monkeypatch.setattr(retrieval, "CKA_SAMPLES", 50)
    a, b = related(rng)
    matches, found = matched_retrieval(a, b)
    expected_matches, expected = directly(a[:50], b[:50], 25)
    assert matches == expected_matches
    assert a.shape[1] - 1 < matches < a.shape[1] + b.shape[1] - 2
    for values, (first, ten, median) in zip(found, expected, strict=True):
        assert values == {
            "samples": 25,
            "recall_1": pytest.approx(first),
            "recall_10": pytest.approx(ten),
            "median_rank": median,
            "chance_1": 1 / 25,
            "chance_10": 0.4,
            "chance_rank": 13,
        }
    assert found[0]["recall_1"] > 0.3


def test_re_paired_samples_are_found_by_chance(rng):
    a, b = related(rng, 2000)
    _, found = matched_retrieval(a, b[rng.permutation(len(b))])
    for values in found:
        assert values["recall_10"] < 3 * values["chance_10"]
        assert values["median_rank"] == pytest.approx(values["chance_rank"], rel=0.1)


def test_equal_samples_are_in_random_order():
    to_b, to_a = retrieved(torch.eye(4)[:, [0, 1, 2, 2]])
    # Of the third row of A, two candidates are equally similar; of the fourth, all are.
    assert to_b["recall_1"] == pytest.approx((1 + 1 + 1 / 2 + 1 / 4) / 4)
    assert to_a["recall_1"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    assert to_a["median_rank"] == 1


def test_without_a_match_all_candidates_are_equal():
    x = np.ones((12, 3))
    matches, found = matched_retrieval(x, np.eye(12))
    assert matches == 0
    for values in found:
        assert (values["recall_1"], values["recall_10"]) == (values["chance_1"], 1)
        assert values["median_rank"] == values["chance_rank"]


def test_three_samples_cannot_be_halved():
    with pytest.raises(NumericsError, match="needs at least 2"):
        matched_retrieval(np.eye(3), np.eye(3))


@pytest.fixture(params=[True, False], ids=["kept", "recomputed"])
def folder(tmp_path, rng, write_features, request):
    """Features of one image encoder and two text encoders, of which one is unrelated."""
    image, text = related(rng)
    unrelated, _ = related(rng)
    for member, x in zip(MEMBERS, (image, text, unrelated), strict=True):
        write_features(tmp_path / "features", member.member, {0: unrelated, 3: x}, keep=request.param)
    return tmp_path / "features", (image, text, unrelated)


def test_the_table_has_both_directions_of_every_image_and_text_encoder(folder, tmp_path):
    features, (image, text, unrelated) = folder
    study = study_file(tmp_path / "study.json", [member[:3] for member in MEMBERS], matrices={"all": None})
    command = ["metrics", "retrieval", "all", "--study", study, "--features", features, "--out", tmp_path / "all.csv"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "all.csv")
    pairs = [("vit@0", "clip-text@1"), ("clip-text@1", "vit@0"), ("vit@0", "bert@0"), ("bert@0", "vit@0")]
    assert list(zip(table.source, table.target, strict=True)) == pairs
    assert (table.code == "before_topk").all()
    (_, of_unrelated), (_, of_text) = directly(image, unrelated, 30), directly(image, text, 30)
    expected = [*of_unrelated, *of_text]
    np.testing.assert_allclose(table[["recall_1", "recall_10", "median_rank"]], expected, atol=1e-5)


def test_refuses_features_of_other_samples(folder, write_features, rng):
    features, _ = folder
    write_features(features, "new@0", {0: rng.random((60, 4))}, content_hash="other samples")
    members = [MEMBERS[0], GroupedMember("new@0", "text", "language")]
    with pytest.raises(StoreError, match="different samples"):
        retrieval_table(members, features)
