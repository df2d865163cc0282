"""Who a process is, told so that another host, or a later job, can judge whether it still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Owner:
    """A process of a run."""

    host: str
    """Name of its host, for people."""
    machine: str
    """Boot and process-id namespace: equal for processes that see each other's ids."""
    pid: int
    """Its id."""
    started: float
    """When it started, in a unit of its machine: ids are used again."""
    job: str | None = None
    """Cluster and id of its Slurm job."""
    restarts: int = 0
    """How often Slurm had requeued that job."""

    def __str__(self) -> str:
        job = f", Slurm job {self.job.rpartition('/')[2]}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    def why_gone(self) -> str | None:
        """Why this process cannot be alive, as far as it can be told from here; None if it may be."""
        here = this_process()
        if self.job and self.job == here.job and self.restarts < here.restarts:
            return "the same Slurm job, before it was requeued"
        if self.machine == here.machine and not self._lives():
            return "that process is gone"
        return None

    def _lives(self) -> bool:
        try:
            return (
                _started(self.pid) == self.started
                and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return False
        except (psutil.Error, OSError):
            return True


def this_process() -> Owner:
    """The process that asks."""
    env = os.environ
    job = f"{env.get('SLURM_CLUSTER_NAME', '')}/{env['SLURM_JOB_ID']}" if env.get("SLURM_JOB_ID") else None
    count = env.get("SLURM_RESTART_COUNT", "0")
    restarts = int(count) if count.isdecimal() else 0
    return Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), job, restarts)


def _started(pid: int) -> float:
    if not os.path.exists("/proc/self/stat"):
        return psutil.Process(pid).create_time()
    with open(f"/proc/{pid}/stat") as file:  # ticks since the boot: setting the clock does not change them
        return float(file.read().rpartition(")")[2].split()[19])


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: the name must do
        return socket.gethostname()
