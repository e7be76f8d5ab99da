"""The miniature study with `stream: true`: the same results without stored tokens, and still only new work runs."""

import pytest

from tests.helpers.samples import contents

from .conftest import LAYERS, encoder_entry
from .test_planning import CHANGED_STUDY, MATRIX, SAE_REPORT, SHOWN, SITE, TABLES_AND_FIGURES


@pytest.fixture(scope="module")
def streamed(fresh, tmp_path_factory):
    """The miniature study after a run that stores no tokens."""
    project = fresh.copy(tmp_path_factory.mktemp("streamed") / "clone")
    project.config = project.config | {"stream": True}
    result = project.run("--cores", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return project


@pytest.fixture
def stream(streamed, tmp_path):
    """A streamed miniature study to change."""
    return streamed.copy(tmp_path / "clone")


def test_a_fresh_study_plans_one_job_per_encoder(new_study):
    new_study.config = new_study.config | {"stream": True}
    rest = {"features": 3, "correlations": 2, "similarity": 1, "pages_samples": 1, **SHOWN}
    rest |= TABLES_AND_FIGURES | CHANGED_STUDY
    assert new_study.plan() == {"dataset": 1, "weights": 2, "stream": 2, **rest}


def test_all_results_equal_those_of_stored_tokens(finished, streamed):
    results = [project.folder / "results" for project in (finished, streamed)]
    saes = contents(results[0] / "squares/saes/tiny")
    assert len(saes) == 6 * 3 * LAYERS
    stamps = {f"{encoder}/.snakemake_timestamp": b"" for encoder in ("reader", "viewer")}
    assert contents(results[1] / "squares/streams/tiny/saes") == saes | stamps
    similarity = ("squares/similarity", "squares/streams/tiny/similarity")
    for places in (("studies",) * 2, ("squares/features",) * 2, similarity):
        one, other = (contents(folder / place) for folder, place in zip(results, places, strict=True))
        assert one == other
        assert one


def test_stores_no_tokens(streamed):
    assert list((streamed.folder / "results").rglob("tokens")) == []
    assert not (streamed.folder / "results/squares/activations").exists()
    assert not (streamed.folder / "results/squares/tokens").exists()


def test_a_finished_stream_plans_nothing(stream):
    assert stream.plan() == {}


def test_an_added_encoder_plans_its_jobs_its_pairs_and_the_summaries(stream):
    config = stream.config
    config["encoders"]["added"] = encoder_entry("./models/second-reader", "text", "language")
    stream.config = config
    assert stream.plan() == {
        "weights": 1,
        "stream": 1,
        "features": 1,
        "correlations": 2,
        "similarity": 2,
        "metrics_pair": 2,
        "names": 1,
        "examples": 1,
        **SITE,
        **MATRIX,
        **SAE_REPORT,
        **CHANGED_STUDY,
    }


def test_a_new_analysis_of_existing_members_trains_nothing(stream):
    config = stream.config
    config["analyses"]["layerwise"]["both"] = {"pairs": [["reader@1", "viewer"]]}
    stream.config = config
    planned = stream.plan()
    assert "stream" not in planned
    assert planned["correlations"] == 1


def test_an_added_seed_retrains_only_its_encoder(stream):
    config = stream.config
    config["encoders"]["viewer"]["seeds"] = [0, 1]
    stream.config = config
    assert stream.plan()["stream"] == 1


def test_a_changed_setting_retrains_all_and_an_added_one_keeps_the_first(stream):
    config = stream.config
    config["saes"]["tiny"]["k"] = 3
    stream.config = config
    changed = stream.plan()
    config["saes"]["tiny"]["k"] = 4
    config["saes"]["sparser"] = {"expansion": 2, "k": 2, "learning_rate": 1e-2}
    stream.config = config
    added = stream.plan()
    assert changed == added | {"similarity": 1}  # whose tokens are those of the first setting
    assert added["stream"] == 2
    result = stream.run("--cores", "2", "--until", "figures_similarity")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stream_cannot_be_split_into_parts(new_study):
    config = new_study.config | {"stream": True}
    config["encoders"]["viewer"]["parts"] = 2
    new_study.config = config
    result = new_study.run("-n")
    assert result.returncode != 0
    assert "encoders.viewer.parts: a stream is one job" in result.stdout + result.stderr


def test_switching_back_to_stored_tokens_extracts_them(stream):
    stream.config = stream.config | {"stream": False}
    planned = stream.plan()
    assert (planned["activations"], planned["sae"], planned["features"]) == (2, 3 * LAYERS, 3)
    assert "stream" not in planned
