"""Every stage as a command on tiny inputs, in a separate process that tests can interrupt or restrict.

Processes are forked from a server that has already imported the libraries, so they start quickly.
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from conceptshare.config.catalog import DatasetSpec
from tests.helpers.forks import call_forked
from tests.helpers.studies import study_file

STAGES = {
    "dataset": ["data"],
    "weights": ["vit.json"],
    "activations": ["activations/vit.zarr", "tokens/vit.zarr"],
    "sae": ["saes/vit/layer-01/seed-0"],
    "stream": ["streams/bert", "streams/bert.zarr"],
    "features": ["features/bert@0.zarr"],
    "correlations": ["correlations/bert@0__bert@1.zarr"],
    "similarity": ["similarity/bert__vit.csv", "similarity/bert__vit.parquet"],
    "metrics": ["tables/all.csv", "tables/all.parquet"],
    "formats": ["tables/all"],
    "figures": ["tables/saes.png", "tables/saes.pdf", "tables/saes"],
}
"""The output of each stage, in the order of their dependencies."""

SAMPLES = 40
SETTINGS = json.dumps({"expansion": 4, "k": 3, "batch_samples": 8, "batch_captions": 8, "learning_rate": 1e-2})


def write_inputs(folder):
    """A table of noisy images and captions, and two encoders."""
    from tests.helpers import models  # not at the top: each process imports this file and its imports
    from tests.helpers.samples import write_rows

    write_rows(folder / "rows.parquet", SAMPLES, models.WORDS)
    for make in (models.vit, models.bert):
        spec = make(folder / make.__name__).spec.model_copy(update={"batch_size": 5})
        (folder / f"{make.__name__}.entry").write_text(spec.model_dump_json(exclude_none=True))


def arguments(stage, made, out):
    """The command line of a stage that reads the results in ``made`` and writes its own to ``out``."""

    def entry(encoder):
        return ["--encoder", (made / f"{encoder}.entry").read_text()]

    def reads(encoder):
        return [*entry(encoder), "--weights", made / f"{encoder}.json", "--data", made / "data"]

    stores = ["--features", made / "features", "--correlations", made / "correlations"]
    source = DatasetSpec(source=str(made / "rows.parquet")).model_dump_json(exclude_none=True)
    bert = made / "streams" / "bert"
    given = {
        "dataset": ["dataset", "--dataset", source],
        "weights": ["weights", *entry("vit")],
        "activations": ["activations", *reads("vit")],
        "sae": ["sae", "train", "--tokens", made / "tokens/vit.zarr", "--layer", 1, "--settings", SETTINGS],
        "stream": ["stream", *reads("bert"), "--settings", SETTINGS, "--seed", 0, "--seed", 1],
        "features": ["features", "--activations", f"{bert}.zarr", "--saes", bert],
        "correlations": ["correlations", *(made / f"features/bert@{n}.zarr" for n in (0, 1)), "--full", "0:2"],
        "similarity": ["similarity", f"{bert}.zarr", made / "activations/vit.zarr"],
        "metrics": ["metrics", "matrix", "all", "--study", made / "study.json", *stores],
        "formats": ["metrics", "formats", "--table", made / "tables/all.parquet"],
        "figures": ["figures", "saes", "--table", made / "tables/members.parquet", "--saes", made / "streams"],
    }
    places = [out / name for name in STAGES[stage]]
    options = {"stream": ["--saes", "--activations"], "activations": ["--out", "--tokens"]}.get(stage, ["--out"])
    wanted = [text for option in zip(options, places, strict=False) for text in option]
    return [*map(str, [*given[stage], *wanted])]


def make_all(made):
    """Run every stage once without interruption."""
    write_inputs(made)
    members = [("bert@0", "text", "language"), ("bert@1", "text", "language")]
    study_file(made / "study.json", members, matrices={"all": {"members": ["bert@0", "bert@1"]}})
    for stage in STAGES:
        _done(run(arguments(stage, made, made), made))
        if stage == "weights":
            given = ["weights", "--encoder", (made / "bert.entry").read_text(), "--out", made / "bert.json"]
            _done(run(given, made))
        if stage == "features":
            given = arguments("features", made, made)
            given[given.index("--out") + 1] = made / "features/bert@1.zarr"
            _done(run([*given, "--seed", 1], made))
        if stage == "metrics":
            given = ["--table", made / "tables/all.parquet", "--correlations", made / "correlations"]
            _done(run(["metrics", "averages", *given, "--out", made / "tables/a.csv"], made))
            given = ["--study", made / "study.json", "--saes", made / "streams", "--features", made / "features"]
            _done(run(["metrics", "saes", *given, "--out", made / "tables/members.csv"], made))


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    """Exit status, or the negative number of the signal that ended it."""
    output: str
    touched: int
    """Number of times it opened a file for writing, or created, renamed or removed one, in the watched folder."""


def run(arguments, watched, at=0, sent=signal.SIGKILL, before=None):
    """Run the command line in a separate process.

    Args:
        arguments: of the command line.
        watched: the folder that it writes into.
        at: the process sends itself a signal before this number of changes to that folder; 0 for never.
        sent: the signal.
        before: called in the process first.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, touched = Path(folder) / "output", Path(folder) / "touched"
        touched.touch()
        job = (list(map(str, arguments)), str(watched), at, sent, before, output, touched)
        ended = call_forked(_conceptshare, *job)
        return Ended(ended.returncode, output.read_text(), touched.stat().st_size)


def _conceptshare(arguments, watched, at, sent, before, output, touched):
    import torch

    from conceptshare import cli
    from conceptshare.sae import _train

    for stream in (1, 2):
        os.dup2(os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    torch.set_num_threads(1)
    _train._SECONDS_BETWEEN_CHECKPOINTS = 0
    sys.argv = ["conceptshare", *arguments]
    if before is not None:
        before()
    count = os.open(touched, os.O_WRONLY | os.O_APPEND)
    done = 0

    def watch(event, details):
        nonlocal done
        if event == "open":
            touches = details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            touches = event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
        if touches and isinstance(details[0], str | os.PathLike) and os.fspath(details[0]).startswith(watched):
            done += 1
            os.write(count, b".")
            if done == at:
                os.kill(os.getpid(), sent)

    sys.addaudithook(watch)
    cli.main()


def _done(ended):
    assert ended.status == 0, ended.output
