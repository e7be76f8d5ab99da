"""Runs code in separate processes that start quickly: forks of one that has already done the slow imports."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from threading import Thread

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.preloaded"])
# Forwards its arguments and exits with the job's status: 137 if the job was killed.
_CLIENT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    job = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(job).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(job)
    ended = server.recv(1)
os._exit(ended[0] if ended else 137)
"""


def run_forked(code, *arguments, folder=".", environment=None):
    """Run code with command-line arguments in a folder, like ``python -c``, and return the result."""
    with TemporaryDirectory() as outputs:
        output, errors = Path(outputs, "output"), Path(outputs, "errors")
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


@contextmanager
def forked_python():
    """A ``python`` program whose ``-m`` runs a module in such a process, for programs that start many."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as jobs:
        client, python, address = (Path(folder, name) for name in ("client.py", "python", "jobs"))
        client.write_text(_CLIENT)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SEs "{client}" "{address}" "$@"\n')
        python.chmod(0o755)
        jobs.bind(str(address))
        jobs.listen()
        Thread(target=_accept, args=(jobs, str(python)), daemon=True).start()
        yield python
        jobs.shutdown(socket.SHUT_RDWR)


def _accept(jobs, python):
    while True:
        try:
            job, _ = jobs.accept()
        except OSError:  # shut down
            return
        with job:
            FORKS.Process(target=_answer, args=(job, python)).start()


def _answer(job, python):
    """Run a job and send its exit status. If it is killed, the connection just ends."""
    ended = 1
    try:
        _run_module(job, python)
        ended = 0
    except SystemExit as end:
        ended = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    job.sendall(bytes([ended]))


def _end_with(client):
    """End this process if its client is killed."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _run_module(job, python):
    length, streams, _, _ = socket.recv_fds(job, 4, 3)
    with job.makefile("rb") as file:
        (flag, module, *arguments), folder, environment = json.loads(file.read(int.from_bytes(length, "big")))
    assert flag == "-m"
    Thread(target=_end_with, args=(job,), daemon=True).start()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdin = open(0)  # noqa: SIM115 - multiprocessing had closed it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    reimport("conceptshare")
    if module != "conceptshare":  # Snakemake, whose jobs run its own Python
        sys.executable = python
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def reimport(package):
    """Import a package from ``PYTHONPATH``, which may have another copy than the one already imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
