"""A study's free text and a user's secrets in real runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import models
from tests.helpers.hub import TOKEN, environment, running

from .conftest import new_clone, write_dataset

TOKEN_IN_FILE = "hf_another_that_stays_in_its_file"
AWKWARD = "a b'c\";$(touch pwned)`touch pwned`& { é"


def test_free_text_of_a_study_does_not_reach_a_shell(new_study):
    config = new_study.config
    (new_study.folder / "squares.parquet").unlink()
    write_dataset(new_study.folder / f"{AWKWARD}.parquet", columns=(AWKWARD, f"words {AWKWARD}"))
    (new_study.folder / "models/reader").rename(new_study.folder / "models" / AWKWARD)
    config["datasets"]["squares"] = {
        "source": f"./{AWKWARD}.parquet",
        "image": AWKWARD,
        "caption": f"words {AWKWARD}",
        "note": AWKWARD,
    }
    config["encoders"]["reader"] |= {"model": f"./models/{AWKWARD}", "note": AWKWARD}
    new_study.config = config
    shown = new_study.run("--cores", "2", "-n", "-p")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "touch pwned" in shown.stdout
    made = ["results/squares/data/manifest.json", "results/weights/reader.json"]
    result = new_study.run("--cores", "2", *made)
    assert result.returncode == 0, result.stdout + result.stderr
    # This rule runs last, when all results exist: its command is sufficient.
    command = re.search(r"python -m conceptshare provenance .*", shown.stdout)[0]
    made += ["results/studies/miniature/provenance.json"]
    (new_study.folder / "results/logs/studies/miniature").mkdir(parents=True)
    surroundings = new_study.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=new_study.folder, env=surroundings, check=True)
    assert all((new_study.folder / path).is_file() for path in made)
    assert not list(new_study.folder.rglob("pwned"))


def test_refuses_a_path_with_a_wildcard(new_study):
    config = new_study.config
    (new_study.folder / "squares.parquet").rename(new_study.folder / "{dataset}.parquet")
    (new_study.folder / "squares.parquet").touch()
    config["datasets"]["squares"]["source"] = "./{dataset}.parquet"
    new_study.config = config
    result = new_study.run("--cores", "2", "-n")
    assert result.returncode != 0
    assert "{dataset}.parquet: Snakemake treats text in braces as a wildcard" in result.stdout + result.stderr


def test_refuses_a_name_that_is_not_utf_8(new_study):
    (new_study.folder / "set").mkdir()
    (new_study.folder / "squares.parquet").rename(new_study.folder / "set" / os.fsdecode(b"caf\xe9.parquet"))
    config = new_study.config
    config["datasets"]["squares"]["source"] = "./set"
    new_study.config = config
    result = new_study.run("--cores", "2", "-n")
    assert result.returncode != 0
    assert r"'set/caf\udce9.parquet': Snakemake cannot handle this name" in result.stdout + result.stderr
    assert "UnicodeEncodeError" not in result.stdout + result.stderr


def test_no_file_of_a_run_contains_the_token(tmp_path):
    project = new_clone(tmp_path / "clone")
    write_dataset(tmp_path / "squares.parquet")
    models.bert(tmp_path / "reader")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "token").write_text(TOKEN_IN_FILE)
    with running() as hub:
        for name in ("reader", "refused", "broken"):
            hub.add(f"us/{name}", tmp_path / "reader")
        hub.add("us/squares", {"train.parquet": (tmp_path / "squares.parquet").read_bytes()}, kind="dataset")
        hub.fail(401, 99, "us/refused")
        hub.fail(500, 99, "us/broken")
        spec = {"library": "transformers", "modality": "text", "kind": "language", "layers": 3, "width": 16}
        names = ("reader", "refused", "broken")
        project.config = {
            "study": "secrets",
            "datasets": {"squares": {"source": "us/squares", "image": "picture", "caption": "words"}},
            "encoders": {name: {**spec, "model": f"us/{name}", "global_token": "first"} for name in names},
            "saes": {"tiny": {"k": 4}},
            "analyses": {"matrices": {"all": None}},
        }
        surroundings = environment(hub.endpoint, cache, HF_TOKEN=TOKEN, PYTHONPATH=str(project.folder / "src"))
        snakemake = [Path(sys.executable).with_name("snakemake"), "--cores", "3", "--keep-going"]
        found = subprocess.run(
            [*snakemake, "--until", "dataset", "weights"],
            cwd=project.folder,
            env=surroundings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert {request.token for request in hub.log} == {TOKEN}  # otherwise it would prove nothing
    assert found.returncode != 0
    logs = project.folder / "results/logs"
    assert "access is refused (401)" in (logs / "weights/refused.log").read_text()
    assert "the hub answered 500" in (logs / "weights/broken.log").read_text()
    made = ["results/squares/data/provenance.json", "results/weights/reader.provenance.json"]
    made += ["results/logs/squares/dataset.log"]
    assert [path for path in made if not (project.folder / path).is_file()] == []
    files = [path for path in project.folder.rglob("*") if path.is_file()]
    assert len([path for path in files if ".snakemake" in path.parts]) > 3
    for token in (TOKEN, TOKEN_IN_FILE):
        assert token not in found.stdout + found.stderr
        assert [path for path in files if token.encode() in path.read_bytes()] == []
