"""A real local Slurm: one node with two devices of a fictitious GPU type, on loopback, without accounting.

All files of munged, slurmctld and slurmd are in one folder. Not every Slurm program has an option for its
configuration, so ``SLURM_CONF`` names it, and ``PATH`` starts with a `srun` that sets it, as Snakemake's job steps
drop variables that begin with ``SLURM_``.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
GPUS = 2
CPUS = 32
MEMORY_MB = 64_000

_CONFIG = """
ClusterName=conceptshare
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
# more cores and memory than there are, so that jobs run side by side
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# a job that takes more memory than it asked for is killed, without cgroups
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
MinJobAge=3600
KillWait=30
ReturnToService=2
DefMemPerCPU=500
# a machine that is busy answers late
MessageTimeout=100
TCPTimeout=60
BatchStartTimeout=600
SlurmdTimeout=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:fake:{gpus}
PartitionName=main Nodes={host} Default=YES MaxTime=2-0
"""


@dataclass(frozen=True)
class Job:
    """A job as reported by the controller."""

    id: int
    rule: str
    state: str
    minutes: int
    memory_mb: int
    cpus: int
    gpus: int
    start: str
    end: str


class Cluster:
    """A Slurm whose files lie in ``folder``."""

    def __init__(self, folder):
        self._folder = folder
        path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"], "/usr/sbin"])
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def start(self):
        for name in ("bin", "state", "spool", "devices"):
            (self._folder / name).mkdir(parents=True)
        self._folder.chmod(0o755)
        for number in range(GPUS):
            (self._folder / "devices" / f"gpu{number}").symlink_to("/dev/null")  # Slurm requires a character device
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        host, user = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
        values = {"host": host, "user": user, "folder": self._folder, "ports": _free_ports(2), "gpus": GPUS}
        (self._folder / "slurm.conf").write_text(_CONFIG.format(cpus=CPUS, memory=MEMORY_MB, **values))
        devices = f"NodeName={host} Name=gpu Type=fake File={self._folder}/devices/gpu[0-{GPUS - 1}]\n"
        (self._folder / "gres.conf").write_text(devices)
        srun = self._folder / "bin" / "srun"
        # Nodes compute on the CPU by default, as the devices are not real GPUs.
        chosen = 'export CONCEPTSHARE_DEVICE="${DEVICE_OF_NODES-cpu}"'
        call = f'SLURM_CONF={self._folder}/slurm.conf exec {shutil.which("srun")} "$@"'
        srun.write_text(f"#!/bin/sh\n{chosen}\n{call}\n")
        srun.chmod(0o755)
        munge = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        places = [f"--{option}={self._folder / name}" for option, name in munge.items()]
        self.run("munged", "--force", *places, f"--seed-file={self._folder}/munge.seed")
        self.start_controller()
        self.run("slurmd")
        self._wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t", check=False))

    def start_controller(self):
        self.run("slurmctld")

    def stop_controller(self):
        self._stop("slurmctld")

    def stop(self):
        for daemon in ("slurmd", "slurmctld", "munged"):
            self._stop(daemon)

    def run(self, *command, check=True):
        result = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout

    def jobs(self):
        """All jobs so far, in order of submission."""
        records = self.run("scontrol", "show", "job", "--details", "--oneliner").splitlines()
        return sorted((_job(record) for record in records if record.startswith("JobId=")), key=lambda job: job.id)

    def cancel_all(self):
        """End every job that is running, waiting or suspended."""
        self._wait(self._nothing_left_to_cancel)

    def _nothing_left_to_cancel(self):
        unfinished = self.run("squeue", "--noheader", "--format=%i").split()
        if unfinished:
            self.run("scancel", *unfinished, check=False)
        return not unfinished

    def _stop(self, daemon):
        file = self._folder / f"{daemon}.pid"
        if not file.exists():
            return
        process = file.read_text().strip()
        name = Path("/proc", process, "comm")
        if name.exists() and name.read_text().strip() == daemon:
            os.kill(int(process), 15)
            self._wait(lambda: not name.exists())

    def _wait(self, done, seconds=600):
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-2000:] for path in self._folder.glob("*.log"))
                raise RuntimeError(f"Slurm did not get there in {seconds} s:\n{logs}")
            time.sleep(0.1)


def missing():
    """The programs of a Slurm that this machine lacks."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def _job(record):
    fields = dict(re.findall(r"(\S+?)=(\S*)", record))
    comment = re.search(r"Comment=(.*?) \S+=", record)[1]
    gpus = re.search(r" JOB_GRES=gpu:fake:(\d+) ", record)
    days, clock = fields["TimeLimit"].rpartition("-")[::2]
    hours, minutes, _ = map(int, clock.split(":"))
    granted = dict(re.findall(r"([\w/]+)=([^,]+)", fields["TRES"]))
    return Job(
        id=int(fields["JobId"]),
        rule=comment.strip().removeprefix("rule_").partition("_wildcards_")[0],
        state=fields["JobState"],
        minutes=int(days or 0) * 24 * 60 + hours * 60 + minutes,
        memory_mb=_megabytes(granted["mem"]),
        cpus=int(granted["cpu"]),
        gpus=int(gpus[1]) if gpus else 0,
        start=fields["StartTime"],
        end=fields["EndTime"],
    )


def _megabytes(text):
    return round(float(text[:-1]) * {"M": 1, "G": 1024, "T": 1024**2}[text[-1]])


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
