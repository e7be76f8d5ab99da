"""Runs code in processes of their own, which start at once: forks of one that has imported what is slow to import."""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

_FORKS = multiprocessing.get_context("forkserver")
# The last is what an optimiser imports when it is made.
_FORKS.set_forkserver_preload(
    [
        "conceptshare.correlations",
        "conceptshare.encoders._transformers",
        "conceptshare.sae",
        "transformers.models.bert.modeling_bert",
        "transformers.models.siglip.modeling_siglip",
        "torch._dynamo",
    ]
)


def run_forked(code, *arguments):
    """Run code with command-line arguments, as ``python -c`` does, and tell how it ended."""
    with TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = _FORKS.Process(target=_run, args=(code, [str(argument) for argument in arguments], output, errors))
        process.start()
        process.join()
        return CompletedProcess(code, process.exitcode, output.read_text(), errors.read_text())


def _run(code, arguments, output, errors):
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv[1:] = arguments
    exec(code, {"__name__": "__main__"})
