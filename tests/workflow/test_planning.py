"""Only the affected jobs are planned after a change."""

import os
import re
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest
from PIL import Image

from .conftest import CLONE, LAYERS, Project, encoder_entry

ALWAYS = {"all": 1}
CHANGED_STUDY = {"provenance": 1, **ALWAYS}
SAE_REPORT = {"metrics_saes": 1, "figures_saes": 1}
MATRIX = dict.fromkeys(
    ["metrics_matrix", "metrics_averages", "metrics_formats", "metrics_seeds", "metrics_retrieval"], 1
) | {f"figures_{part}": 1 for part in ("matrix", "averages", "intervals", "similarity", "strength")}
WITH_SIMILARITY = {job: n for job, n in MATRIX.items() if job not in {"metrics_seeds", "metrics_retrieval"}}
LAYERWISE = {"metrics_layerwise": 1, "figures_layerwise": 1}
SHAREDNESS = {
    "metrics_sharedness": 2,
    "metrics_topics": 2,
    "figures_sharedness": 2,
    "figures_top_samples": 2,
    "figures_scatter": 2,
    "metrics_overlaps": 1,
}
SAMPLES = {"metrics_samples": 1, "figures_samples": 1}
SITE = {"pages_member": 3, "pages_index": 1}
SHOWN = {"names": 3, "examples": 3, "pages_pair": 2, **SITE}
TABLES_AND_FIGURES = {"metrics_pair": 2, **MATRIX, **LAYERWISE, **SHAREDNESS, **SAMPLES, **SAE_REPORT}


def test_a_finished_study_plans_nothing(study):
    assert study.plan() == {}


def test_a_fresh_study_plans_one_job_per_stage_and_part(new_study):
    assert new_study.plan() == {
        "dataset": 1,
        "weights": 2,
        "activations": 2,
        "sae": 3 * LAYERS,
        "features": 3,
        "correlations": 2,
        "similarity": 1,
        "pages_samples": 1,
        **SHOWN,
        **TABLES_AND_FIGURES,
        **CHANGED_STUDY,
    }


def test_a_study_of_the_fit_of_samples_compares_no_members(new_study):
    config = new_study.config
    config["analyses"] = {"samples": config["analyses"]["samples"]}
    new_study.config = config
    assert new_study.plan() == {
        "dataset": 1,
        "weights": 2,
        "activations": 2,
        "sae": 2 * LAYERS,
        "features": 2,
        "pages_samples": 1,
        "names": 2,
        "examples": 2,
        "pages_member": 2,
        "pages_index": 1,
        **SAMPLES,
        **SAE_REPORT,
        **CHANGED_STUDY,
    }


def test_touching_every_source_file_plans_nothing(study):
    later = time.time() + 60
    for path in [*study.folder.glob("src/**/*.py"), *study.folder.glob("workflow/**/*"), study.folder / "Snakefile"]:
        os.utime(path, (later, later))
    assert study.plan() == {}


def test_changed_provenance_plans_nothing(study):
    accounts = list(study.folder.glob("results/**/*provenance.json"))
    # Data set, encoders, activations, tokens, SAEs, features, correlations, similarities, names, examples and study.
    assert len(accounts) == 1 + 2 + 2 + 2 + 3 * LAYERS + 3 + 2 + 1 + 3 + 3 + 1
    for path in accounts:
        path.write_text("{}")
    assert study.plan() == {}


def test_identical_new_data_set_and_weights_plan_nothing(study):
    remade = ["results/squares/data/manifest.json", "results/weights/reader.json"]
    before = {path: (study.folder / path).read_bytes() for path in remade}
    result = study.run("--cores", "2", "--force", *remade)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path: (study.folder / path).read_bytes() for path in remade} == before
    assert study.plan() == {}


def test_reordering_encoders_plans_nothing(study):
    config = study.config
    config["encoders"] = dict(reversed(config["encoders"].items()))
    study.config = config
    assert study.plan() == {}


def test_changing_a_note_plans_nothing(study):
    config = study.config
    config["encoders"]["viewer"]["note"] = "looks at squares"
    study.config = config
    assert study.plan() == {}


@pytest.mark.parametrize("untrained", [False, True])
def test_an_added_encoder_plans_its_jobs_its_pairs_and_the_summaries(study, untrained):
    config = study.config
    model = "./models/reader" if untrained else "./models/second-reader"
    config["encoders"]["added"] = encoder_entry(model, "text", "language") | {"untrained": untrained}
    study.config = config
    assert study.plan() == {
        "weights": 1,
        "activations": 1,
        "sae": LAYERS,
        "features": 1,
        "correlations": 2,  # with reader@0 and viewer@0, the other members of the matrix
        "similarity": 2,
        "metrics_pair": 2,
        "names": 1,
        "examples": 1,
        **SITE,  # the pages of all three members of the matrix
        **MATRIX,
        **SAE_REPORT,
        **CHANGED_STUDY,
    }
    if untrained:
        result = study.run("--cores", "2", "results/studies/miniature/squares/tiny/matrices/all.png")
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_second_code_makes_its_features_and_comparisons_and_nothing_before_topk(study):
    stages = study.folder / "results/squares"
    made_at = {path: path.stat().st_mtime_ns for path in stages.rglob("*") if path.is_file()}
    study.config = study.config | {"features": ["before_topk", "after_topk"]}
    assert study.plan() == {
        "features": 3,
        "correlations": 2,
        "names": 1,  # of the source of the rankings, for their figures
        **TABLES_AND_FIGURES,
        "figures_matrix": 2,  # that of features before TopK shows both
        "pages_index": 1,  # which says so
        **CHANGED_STUDY,
    }
    result = study.run("--cores", "2", "--until", "figures_matrix", "names")
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path: path.stat().st_mtime_ns for path in made_at} == made_at
    new = {path.relative_to(stages).parts[:2] for path in stages.rglob("*") if path.is_file() and path not in made_at}
    assert new == {(stage, "tiny+after_topk") for stage in ("features", "correlations", "names")}
    assert not {"features", "correlations", "names", "metrics_matrix", "figures_matrix"} & study.plan().keys()
    made = study.folder / "results/studies/miniature/squares"
    for folder, code in (("tiny", "before_topk"), ("tiny+after_topk", "after_topk")):
        assert set(pd.read_csv(made / folder / "matrices/all.csv")["code"]) == {code}
    figures = [made / folder / "matrices/all.png" for folder in ("tiny", "tiny+after_topk")]
    heights = [Image.open(path).height for path in figures]
    assert heights[0] > 1.8 * heights[1]  # twice the panels


def test_an_encoders_changed_setting_plans_only_its_jobs(study):
    config = study.config
    config["encoders"]["viewer"]["image_size"] = 48
    study.config = config
    assert study.plan() == {
        "weights": 1,  # which tests that the encoder can be read with it
        "activations": 1,
        "sae": LAYERS,
        "features": 1,
        "correlations": 1,
        "similarity": 1,
        "metrics_pair": 1,
        "names": 1,
        "examples": 1,
        "pages_member": 2,  # its own, and those of the member it is compared with
        "pages_index": 1,
        **MATRIX,
        **SHAREDNESS,
        **SAMPLES,
        **SAE_REPORT,
        **CHANGED_STUDY,
    }


def test_an_added_seed_keeps_activations_and_other_seeds(study):
    config = study.config
    config["encoders"]["viewer"]["seeds"] = [0, 1]
    config["analyses"]["layerwise"]["viewer"] = {"pairs": [["viewer@0", "viewer@1"]]}
    study.config = config
    assert study.plan() == {
        "sae": LAYERS,
        "features": 1,
        "correlations": 2,  # with the first seed, and with the source of the rankings
        "metrics_pair": 2,
        "names": 1,
        "examples": 1,
        "pages_member": 3,
        "pages_pair": 2,
        "pages_index": 1,
        # The other seed is now its ceiling.
        **{job: n for job, n in MATRIX.items() if job != "metrics_retrieval"},
        **LAYERWISE,
        **SHAREDNESS,  # resampled over both seeds
        **SAE_REPORT,
        **CHANGED_STUDY,
    }


def test_other_layers_of_an_encoder_plan_its_jobs_and_its_pairs(study):
    config = study.config
    config["encoders"]["viewer"]["use_layers"] = [1]
    study.config = config
    assert study.plan() == {
        "weights": 1,  # the encoder is checked again, as its entry has changed
        "activations": 1,
        "sae": 1,
        "features": 1,
        "correlations": 1,
        "similarity": 1,
        "metrics_pair": 1,
        "names": 1,
        "examples": 1,
        "pages_member": 2,
        "pages_index": 1,
        **MATRIX,
        **SHAREDNESS,
        **SAMPLES,
        **SAE_REPORT,
        **CHANGED_STUDY,
    }


def test_a_matrix_of_all_seeds_plans_the_pairs_of_other_seeds(study):
    config = study.config
    config["analyses"]["matrices"]["all"] = {"seeds": "all"}
    study.config = config
    assert study.plan() == {
        "correlations": 1,  # the reader's other seed with the viewer
        "metrics_pair": 1,
        "pages_member": 2,
        "pages_index": 1,
        **MATRIX,
        **CHANGED_STUDY,
    }


def without_tokens(study):
    """As after a run with ``keep_tokens: false``, which deletes them as soon as SAEs are trained."""
    shutil.rmtree(study.folder / "results/squares/tokens")
    study.config = study.config | {"keep_tokens": False}
    return study.config


def test_a_study_whose_tokens_are_deleted_plans_nothing(study):
    without_tokens(study)
    assert study.plan() == CHANGED_STUDY


def test_an_added_encoder_or_analysis_extracts_no_other_encoders_with_deleted_tokens(study):
    config = without_tokens(study)
    config["encoders"]["added"] = encoder_entry("./models/second-reader", "text", "language")
    config["analyses"]["layerwise"]["both"] = {"pairs": [["viewer", "reader@1"]]}
    study.config = config
    planned = study.plan()
    jobs = {"activations": 1, "sae": LAYERS, "features": 1, "similarity": 2, "correlations": 3}
    assert planned == planned | jobs


def test_an_added_seed_extracts_and_retrains_an_encoder_with_deleted_tokens(study):
    config = without_tokens(study)
    config["encoders"]["viewer"]["seeds"] = [0, 1]
    config["analyses"]["layerwise"]["viewer"] = {"pairs": [["viewer@0", "viewer@1"]]}
    study.config = config
    planned = study.plan()
    assert planned == planned | {"activations": 1, "sae": 2 * LAYERS, "features": 2}


def test_parts_of_an_extraction_are_separate_jobs(new_study):
    config = new_study.config
    config["encoders"]["reader"]["parts"] = 3
    new_study.config = config
    planned = new_study.plan()
    assert planned == planned | {"activations": 1, "activations_part": 3, "activations_join": 1, "sae": 3 * LAYERS}


def test_a_second_sae_setting_keeps_the_results_of_the_first(study):
    config = study.config
    config["saes"]["batched"] = config["saes"]["tiny"] | {"activation": "batchtopk", "matryoshka": [8]}
    study.config = config
    new = {"sae": 3 * LAYERS, "features": 3, "correlations": 2, **SHOWN}
    assert study.plan() == {**new, **TABLES_AND_FIGURES, **CHANGED_STUDY}


@pytest.mark.parametrize("changed", [{"k": 3}, {"activation": "batchtopk"}], ids=str)
def test_a_changed_sae_setting_plans_training_and_later_stages(study, changed):
    config = study.config
    config["saes"]["tiny"] |= changed
    study.config = config
    made = {"sae": 3 * LAYERS, "features": 3, "correlations": 2}
    assert study.plan() == {**made, **SHOWN, **TABLES_AND_FIGURES, **CHANGED_STUDY}


def test_detects_swapped_settings_of_two_encoders(study):
    config = study.config
    reader, viewer = config["encoders"]["reader"], config["encoders"]["viewer"]
    reader["batch_size"], viewer["batch_size"] = 16, 8
    study.config = config
    first = study.plan()
    assert first["activations"] == 2
    assert first["sae"] == 3 * LAYERS


@pytest.mark.parametrize(
    ("source", "planned"),
    [
        ("figures/_style.py", {job: n for job, n in TABLES_AND_FIGURES.items() if job.startswith("figures")}),
        ("metrics.py", TABLES_AND_FIGURES | SITE),
        (
            "analysis/similarity.py",
            {"similarity": 1, "pages_index": 1, **WITH_SIMILARITY},
        ),
        ("analysis/seeds.py", {"metrics_seeds": 1, **SAE_REPORT}),
        ("analysis/retrieval.py", {"metrics_retrieval": 1, "pages_index": 1, **SAMPLES}),
        ("analysis/samples.py", {"pages_index": 1, **SAMPLES}),
        ("pages/assets/app/page.js", {"pages_index": 1}),
        (
            "concepts/names.py",
            {"names": 3, "metrics_topics": 2, "figures_sharedness": 2, "figures_top_samples": 2, **SITE},
        ),
        ("concepts/topics.py", {"metrics_topics": 2, "pages_index": 1}),
        (
            "correlations/_engine.py",
            {
                "correlations": 2,
                "pages_pair": 2,
                **SITE,
                **TABLES_AND_FIGURES,
            },
        ),
        ("sae/features.py", {"features": 3, "correlations": 2, **SHOWN, **TABLES_AND_FIGURES}),
        ("sae/_train.py", {"sae": 3 * LAYERS, "features": 3, "correlations": 2, **SHOWN, **TABLES_AND_FIGURES}),
        (
            "encoders/_transformers.py",
            {
                "activations": 2,
                "sae": 3 * LAYERS,
                "features": 3,
                "correlations": 2,
                "similarity": 1,
                **SHOWN,
                **TABLES_AND_FIGURES,
            },
        ),
        ("io/progress.py", {}),
        ("analysis/ask.py", {}),
    ],
)
def test_an_edited_stage_plans_that_stage_and_later_ones(study, source, planned):
    path = study.folder / "src" / "conceptshare" / source
    path.write_text(path.read_text() + "\n")
    assert study.plan() == (planned | CHANGED_STUDY if planned else {})


def test_a_changed_data_set_plans_everything_but_weights(study):
    config = study.config
    config["datasets"]["squares"]["limit"] = 30
    study.config = config
    assert study.plan() == {
        "dataset": 1,
        "activations": 2,
        "sae": 3 * LAYERS,
        "features": 3,
        "correlations": 2,
        "similarity": 1,
        "pages_samples": 1,
        **SHOWN,
        **TABLES_AND_FIGURES,
        **CHANGED_STUDY,
    }


@pytest.mark.parametrize("listed", [5000, 2], ids=["listed", "digest"])
def test_a_changed_image_of_a_table_is_read_again(new_study, listed):
    source = new_study.folder / "src/conceptshare/data/rows.py"
    source.write_text(source.read_text().replace("LISTED = 5000", f"LISTED = {listed}"))
    colours = ["red", "lime", "blue", "black"]
    for colour in colours:
        Image.new("RGB", (8, 8), colour).save(new_study.folder / f"{colour}.png")
    lines = ["picture,words", *(f"{colour}.png,{colour}" for colour in colours)]
    (new_study.folder / "squares.csv").write_text("\n".join(lines))
    config = new_study.config
    config["datasets"]["squares"]["source"] = "./squares.csv"
    new_study.config = config
    manifest = "results/squares/data/manifest.json"
    assert new_study.run("--cores", "1", manifest).returncode == 0
    assert new_study.plan(manifest) == {}
    Image.new("RGB", (8, 8), "white").save(new_study.folder / "red.png")
    assert new_study.plan(manifest) == {"dataset": 1}
    job = ["--mode", "remote", "--force", "--nolock", "--target-jobs", "pages_samples:study=miniature,dataset=squares"]
    assert new_study.plan(*job) == {"pages_samples": 1}  # and not within a later job


@pytest.mark.parametrize(
    ("changes", "correlations"),
    [
        ({"memory_mb": 50}, 0),
        ({"precision": "float32"}, 2),
        ({"unexplained_layers": "leave_out"}, 2),
    ],
    ids=["memory", "precision", "unexplained"],
)
def test_correlation_settings_plan_only_the_affected_pairs(study, changes, correlations):
    config = study.config
    config["correlations"] |= changes
    study.config = config
    planned = study.plan()
    later = {"pages_pair": 2, **SITE, **TABLES_AND_FIGURES, **CHANGED_STUDY}
    for job in ("metrics_retrieval", *SAMPLES):
        del later[job]
    assert planned == ({"correlations": 2, **later} if correlations else CHANGED_STUDY)


def test_bounds_of_warnings_train_no_sae(study):
    config = study.config
    config["saes"]["tiny"]["max_dead"] = 0.1
    study.config = config
    assert study.plan() == CHANGED_STUDY


MARKED = {
    **WITH_SIMILARITY,  # all that is made from the matrix
    **LAYERWISE,
    **SHAREDNESS,
    **SAE_REPORT,
    **SAMPLES,
    **dict.fromkeys(["metrics_seeds", "metrics_retrieval"], 1),
    "pages_member": 1,  # of the source of the rankings
    "pages_index": 1,
}


@pytest.mark.parametrize("unexplained", ["mark", "leave_out"])
def test_another_bound_of_unexplained_layers_plans_what_marks_or_leaves_them_out(study, unexplained):
    config = study.config
    if unexplained == "leave_out":
        config["correlations"]["unexplained_layers"] = "leave_out"
        config["saes"]["tiny"]["max_fvu_global"] = 1e9
        study.config = config
        result = study.run("--cores", "2", "--until", "correlations")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "correlations" not in study.plan()
    config["saes"]["tiny"]["max_fvu_global"] = 1e8
    study.config = config
    planned = study.plan()
    later = {"correlations": 2, "pages_pair": 2, **SITE, **TABLES_AND_FIGURES}
    assert planned == (MARKED if unexplained == "mark" else later) | CHANGED_STUDY


def test_parsing_the_workflow_imports_no_compute_libraries(new_study):
    result = new_study.start("python", "-X", "importtime", "-m", "snakemake", "-n")
    assert result.returncode == 0, result.stdout + result.stderr
    imported = set(re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE))
    assert "conceptshare.config.study" in imported
    assert not imported & {"torch", "transformers", "datasets", "zarr", "scipy", "matplotlib"}


def test_refuses_a_config_with_countless_aliases_before_snakemake_expands_them(new_study):
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    (new_study.folder / "config.yaml").write_text("\n".join(lines))
    result = new_study.run("-n")
    assert result.returncode == 1
    assert "config.yaml: not valid YAML: more than 1,000,000 values" in result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [(), ("--cores", "2"), ("--profile", "slurm"), ("--profile", "gpu")])
def test_the_default_study_plans_with_the_documented_commands(arguments):
    result = Project(CLONE).run("-n", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_compares_a_matrix_of_the_papers_encoders_with_the_paper(new_study):
    config = new_study.config
    config["datasets"] = {"coco": config["datasets"]["squares"], "squares": config["datasets"]["squares"]}
    config["encoders"] = {"bert-base": config["encoders"]["reader"], "vit-base": config["encoders"]["viewer"]}
    config["analyses"] = {"matrices": {"all": {"paper": "base"}}}
    del config["correlations"]
    new_study.config = config
    result = new_study.run("-n", "-p", "--until", "metrics_paper", "metrics_formats")
    assert result.returncode == 0, result.stdout + result.stderr
    commands = re.findall(r"python -m conceptshare metrics (\w+) .*", result.stdout)
    assert (commands.count("paper"), commands.count("formats")) == (1, 2)
    formats = re.findall(r"metrics formats .* --out (\S+)", result.stdout)
    compared = re.findall(r"metrics formats .* --dataset coco --size base --out (\S+)", result.stdout)
    assert len(formats) == 2
    assert compared == ["results/studies/miniature/coco/tiny/matrices/all"]


def test_a_new_figure_needs_only_its_module_its_caption_and_its_line(study):
    library = study.folder / "src" / "conceptshare"
    (library / "figures" / "_rows.py").write_text("def draw_rows(table, out):\n    out.write_text(str(len(table)))\n")
    (study.folder / "workflow/report/rows.rst").write_text("How many rows the matrix has.\n")
    lines = library / "config" / "products.py"
    line = '    Figure("rows", "matrix", "matrices/{name}.rows", "rows", "The number of rows."),\n'
    lines.write_text(lines.read_text().replace("FIGURES = (\n", f"FIGURES = (\n{line}"))
    planned = study.plan()
    assert planned["figures_rows"] == 1
    command = [sys.executable, "-m", "conceptshare", "figures", "rows"]
    table = study.folder / "results/studies/miniature/squares/tiny/matrices/all.parquet"
    out = study.folder / "rows.png"
    subprocess.run([*command, "--table", table, "--out", out], env=study.environment, check=True)
    assert out.read_text() == str(len(table.with_suffix(".csv").read_text().splitlines()) - 1)


def training_on_global_tokens(study):
    config = study.config
    config["saes"]["tiny"] |= {"train_on": "global", "standardise": True}
    study.config = config
    return config


def test_sae_settings_of_global_tokens_keep_stored_activations(study):
    """Neither the change nor a second study without tokens computes activations that exist."""
    training_on_global_tokens(study)
    made = {"sae": 3 * LAYERS, "features": 3, "correlations": 2}
    assert study.plan() == {**made, **SHOWN, **TABLES_AND_FIGURES, **CHANGED_STUDY}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_study_of_global_tokens_stores_no_others(new_study, streamed):
    new_study.config = training_on_global_tokens(new_study) | {"stream": streamed}
    planned = new_study.plan()
    assert planned == planned | ({"stream": 2} if streamed else {"activations": 2, "sae": 3 * LAYERS})
    result = new_study.run("--cores", "2", "--until", "features")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (new_study.folder / "results/squares/tokens").exists()
    config = new_study.config
    config["saes"]["others"] = {"k": 2}
    new_study.config = config
    planned = new_study.plan()
    # All tokens need another forward pass; a stream keeps the SAEs of global tokens.
    assert planned == planned | ({"stream": 2, "features": 3} if streamed else {"activations": 2, "features": 6})


def test_parts_of_a_study_of_global_tokens_store_no_others(new_study):
    config = new_study.config
    config["encoders"]["reader"]["parts"] = 2
    new_study.config = config
    made = ("--cores", "2", "--notemp", "--until", "activations_join")
    arrays = {}
    for train_on in ("all", "global"):
        config["saes"]["tiny"]["train_on"] = train_on
        new_study.config = config
        if train_on == "global":  # parts with more than global tokens are used as they are
            planned = new_study.plan()
            assert "sae" in planned
            assert not planned.keys() & {"activations_part", "activations_join"}
            shutil.rmtree(new_study.folder / "results/squares/activations")
            shutil.rmtree(new_study.folder / "results/squares/parts")
        result = new_study.run(*made)
        assert result.returncode == 0, result.stdout + result.stderr
        parts = sorted((new_study.folder / "results/squares/parts").glob("reader.*.zarr"))
        assert len(parts) == 2
        arrays[train_on] = {path.parent.name for part in parts for path in part.rglob("zarr.json")} - {"layer-00"}
    assert {"tokens", "offsets", "global_rows", "global"} <= arrays["all"]
    assert not arrays["global"] & {"tokens", "offsets", "global_rows"}
    assert "global" in arrays["global"]
