"""After a change of the study, exactly the new jobs run, and existing results keep their bytes and times."""

import pytest

from ..workflow.conftest import encoder_entry, write_dataset
from .conftest import LAYER, WITHOUT_PAGES, contents, jobs_done

STUDY = "studies/pocket/squares/tiny"
SAES = {"metrics_saes": 1, "figures_saes": 1}
LAYERWISE = {"metrics_layerwise": 1, "figures_layerwise": 1}
# Summaries over the encoders and pairs of a study.
SUMS = (f"{STUDY}/layerwise", f"{STUDY}/saes")


def add_an_encoder(config, _):
    config["encoders"]["added"] = encoder_entry("./models/second-reader", "text", "language", use_layers=[LAYER])
    config["analyses"]["layerwise"]["both"]["pairs"].append(["added", "viewer"])


def add_a_ranking(config, _):
    config["analyses"]["sharedness"] = {
        "said": {"source": "reader", "shared_with": ["added"], "not_shared_with": ["viewer"]}
    }


def add_a_dataset_whose_tokens_are_deleted(config, folder):
    config["keep_tokens"] = False
    write_dataset(folder / "more.parquet", rows=20)
    config["datasets"]["more"] = config["datasets"]["squares"] | {"source": "./more.parquet"}


AN_ENCODER = (
    add_an_encoder,
    {"activations": 1, "sae": 1, "features": 1, "correlations": 1, "similarity": 1},
    {"weights": 1, "metrics_pair": 1, **LAYERWISE, **SAES},
    SUMS,
)
A_RANKING = (
    add_a_ranking,
    {"correlations": 1},
    {
        "metrics_pair": 1,
        "metrics_sharedness": 1,
        "metrics_topics": 1,
        "figures_scatter": 1,
    },
    (),
)
A_DATASET = (
    add_a_dataset_whose_tokens_are_deleted,
    {"activations": 2, "sae": 2, "features": 2, "correlations": 1, "similarity": 1},
    {"dataset": 1, "metrics_pair": 1, **LAYERWISE, **SAES},
    (),
)


@pytest.mark.parametrize(
    "changes",
    [(AN_ENCODER, A_RANKING), (A_DATASET,)],
    ids=["an encoder and a ranking", "a data set"],
)
def test_a_change_runs_only_its_own_jobs(pocket, changes):
    for change, queued, local, renewed in changes:
        before = contents(pocket)
        config = pocket.config
        change(config, pocket.folder)
        pocket.config = config
        output = pocket.submit()
        submitted = pocket.submitted()
        assert {rule: sum(job.rule == rule for job in submitted) for rule in {job.rule for job in submitted}} == queued
        assert jobs_done(output) == queued | local
        after = contents(pocket)
        lost_or_renewed = {name for name, found in before.items() if after.get(name) != found}
        assert all(name.startswith(renewed) for name in lost_or_renewed), lost_or_renewed
        assert len(after) > len(before)
        extracted = {name.split("/")[0] for name in after.keys() - before.keys() if "/activations/" in name}
        kept = {name.split("/")[0] for name in after.keys() - before.keys() if "/tokens/" in name}
        assert kept == (extracted if config.get("keep_tokens", True) else set())
    assert pocket.plan(*WITHOUT_PAGES) == {}
