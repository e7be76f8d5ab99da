"""Runs code in separate processes that start quickly: forks of one that has already done the slow imports."""

import atexit
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory, mkdtemp

# Names the folder of the server in the environment of the processes that use it.
_FOLDER = "CONCEPTSHARE_TESTS_FORKS"
# Forwards its arguments and exits with the job's status, like a shell if a signal ended it.
_CLIENT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    job = json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(job).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(job)
    status = int.from_bytes(server.recv(4), "big", signed=True)
os._exit(status if status >= 0 else 128 - status)
"""
_started: list[subprocess.Popen] = []
_CALL = "import pickle, sys; function, arguments = pickle.loads(bytes.fromhex(sys.argv[1])); function(*arguments)"


def run_forked(code, *arguments, folder=".", environment=None):
    """Run code with command-line arguments in a folder, like ``python -c``, and return the result."""
    job = [["-c", code, *map(str, arguments)], str(Path(folder).absolute()), os.environ | (environment or {})]
    content = json.dumps(job).encode()
    with TemporaryDirectory() as outputs, socket.socket(socket.AF_UNIX) as server:
        output, errors = Path(outputs, "output"), Path(outputs, "errors")
        server.connect(str(_server() / "jobs"))
        with Path(os.devnull).open() as nothing, output.open("w") as out, errors.open("w") as err:
            streams = [file.fileno() for file in (nothing, out, err)]
            socket.send_fds(server, [len(content).to_bytes(4, "big")], streams)
        server.sendall(content)
        status = int.from_bytes(server.recv(4), "big", signed=True)
        return CompletedProcess(code, status, output.read_text(), errors.read_text())


def call_forked(function, *arguments):
    """Call a function of a module, and return the result of its process."""
    return run_forked(_CALL, pickle.dumps((function, arguments)).hex())


def forked_python():
    """A ``python`` program whose ``-c`` and ``-m`` run in such a process, for programs that start many."""
    return _server() / "python"


@cache
def _server():
    """The folder of the server that forks; it ends with the process that started it."""
    if _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder)
    client, python = folder / "client.py", folder / "python"
    client.write_text(_CLIENT)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SEs "{client}" "{folder}/jobs" "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as jobs:
        jobs.bind(str(folder / "jobs"))
        jobs.listen(100)
        command = [sys.executable, "-m", "tests.helpers.forks", str(jobs.fileno()), str(python)]
        # It reads the end of this pipe when this process ends.
        _started.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2], pass_fds=[jobs.fileno()])
        )
    os.environ[_FOLDER] = str(folder)
    return folder


def _serve(jobs, python):
    """Fork a process for each job, send its status, and kill it if its client ends."""
    import tests.helpers.preloaded  # noqa: F401

    for number in (signal.SIGINT, signal.SIGTERM):  # which a terminal or `timeout` sends to all processes at once
        signal.signal(number, signal.SIG_IGN)
    clients = {}
    while True:
        ready = wait([0, jobs, *clients.values(), *(process.sentinel for process in clients)])
        if 0 in ready:
            break
        for process, client in list(clients.items()):
            if process.sentinel in ready:
                process.join()
                with suppress(BrokenPipeError):
                    client.sendall(process.exitcode.to_bytes(4, "big", signed=True))
                client.close()
                del clients[process]
            elif client in ready:
                process.kill()
        if jobs in ready:
            client, _ = jobs.accept()
            with suppress(ValueError, OSError):  # of a client that ended before it sent its job
                job, streams = _receive(client)
                given = (*job, streams, python, [jobs, client, *clients.values()])
                process = multiprocessing.get_context("fork").Process(target=_run, args=given)
                process.start()
                clients[process] = client
                for stream in streams:
                    os.close(stream)
    for process in clients:
        process.kill()


def _receive(client):
    """A job's arguments, folder and environment, and its standard streams."""
    length, streams, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as file:
        return json.loads(file.read(int.from_bytes(length, "big"))), streams


def _run(arguments, folder, environment, streams, python, connections):
    for connection in connections:
        connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing had closed it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    flag, code, *sys.argv[1:] = arguments[1:] if arguments[0] == "-u" else arguments
    if flag == "-c":
        exec(code, {"__name__": "__main__"})
        return
    assert flag == "-m"
    reimport("conceptshare")
    if code != "conceptshare":  # Snakemake, whose jobs run its own Python
        sys.executable = python
    runpy.run_module(code, run_name="__main__", alter_sys=True)


def reimport(package):
    """Import a package from ``PYTHONPATH``, which may have another copy than the one already imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as listening:
        _serve(listening, sys.argv[2])
