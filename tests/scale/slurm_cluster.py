"""A SLURM cluster on this machine for the tests, from Debian's packages (slurm-wlm, munge).

All of it (key, sockets, state, logs) lies in one folder; nothing of /etc is used.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NUM_NODES = 2
_CONFIGURATION = """\
ClusterName=h5traces
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=30
KillWait=2
MinJobAge=300
InactiveLimit=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=1440 State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime=20
PartitionName=high Nodes=ALL MaxTime=1440 State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4096 "
    "State=UNKNOWN"
)


def reason_to_skip() -> str | None:
    """Why SLURM cannot be started here."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting SLURM takes root"


class SlurmCluster:
    """Two nodes with two cores each; `low` may be pre-empted by `high`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons; returns when all nodes are idle."""
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        (folder / "state").mkdir()
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port, *ports = _free_ports(1 + NUM_NODES)
        nodes = [_NODE.format(number=n, host=host, port=each) for n, each in enumerate(ports)]
        text = _CONFIGURATION.format(folder=folder, host=host, port=port, nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        files = [f"--{what}={folder}/{name}" for what, name in _MUNGE_FILES.items()]
        self.run("munged", "--force", *files, "--num-threads=2")
        self.run("slurmctld", "-c", "-f", f"{folder}/slurm.conf")
        _wait("slurmctld", lambda: "UP" in self.run("scontrol", "ping", check=False))
        for number in range(NUM_NODES):
            self.run("slurmd", "-f", f"{folder}/slurm.conf", "-N", f"n{number}")
        listing = ("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N")
        _wait("nodes", lambda: len(self.run(*listing).split()) == NUM_NODES)

    def stop(self) -> None:
        """Stop the daemons that were started, by their numbers."""
        for state in ("RUNNING", "PENDING"):
            self.run("scancel", f"--state={state}", check=False)
        for file in [*sorted(self.folder.glob("slurmd-*.pid")), *map(self.folder.joinpath, _LAST)]:
            if file.exists():
                _end(int(file.read_text()))

    def run(self, *command: str, check: bool = True) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
        """The number of a new job."""
        file = self.folder / f"job-{len(list(self.folder.glob('job-*.sh')))}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={self.folder}/%A_%a.out"
        return self.run(
            "sbatch", "--parsable", output, "--open-mode=append", *options, str(file), *arguments
        ).strip()

    def wait(self, *jobs: str, seconds: float = 90) -> None:
        """Return when jobs are no longer waiting or running."""
        listing = ("squeue", "-h", "-t", "PD,R,CG,S,RQ", "-o", "%A %T %r", "-j", ",".join(jobs))
        _wait(f"end of {jobs}", lambda: not self.run(*listing, check=False).strip(), seconds)

    def output(self) -> str:
        """What all jobs printed."""
        return "\n".join(each.read_text() for each in sorted(self.folder.glob("*.out")))


_MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.socket",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munged.seed",
}
_LAST = ("slurmctld.pid", "munged.pid")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait(what: str, is_so: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"SLURM: {what} did not come within {seconds} s"
        time.sleep(0.1)


def _end(number: int) -> None:
    try:
        os.kill(number, signal.SIGTERM)
        for _ in range(400):
            if not Path(f"/proc/{number}").exists():
                return
            time.sleep(0.02)
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        pass
