"""Runs code in processes of their own, which start at once: forks of one that has imported what is slow to import."""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

FORKS = multiprocessing.get_context("forkserver")
# torch._dynamo is what an optimiser imports when it is made.
FORKS.set_forkserver_preload(
    [
        "datasets",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_pdf",
        "snakemake.cli",
        "torch._dynamo",
        "transformers.models.bert.modeling_bert",
        "transformers.models.siglip.modeling_siglip",
        *("conceptshare.encoders._transformers", "conceptshare.weights"),
        *(f"conceptshare.{stage}" for stage in ("sae", "features", "correlations", "similarity", "figures", "formats")),
    ]
)


def run_forked(code, *arguments, folder=".", environment=None):
    """Run code with command-line arguments in a folder, as ``python -c`` does, and tell how it ended."""
    with TemporaryDirectory() as said:
        output, errors = Path(said, "output"), Path(said, "errors")
        job = (code, [str(argument) for argument in arguments], folder, environment or {}, output, errors)
        process = FORKS.Process(target=_run, args=job)
        process.start()
        process.join()
        return CompletedProcess(code, process.exitcode, output.read_text(), errors.read_text())


def _run(code, arguments, folder, environment, output, errors):
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv[1:] = arguments
    os.chdir(folder)
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})
