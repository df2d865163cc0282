"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, in a folder of their own."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NODES = ("node1", "node2")
PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_CONF = """\
ClusterName=zeda
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
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
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=1,defer
SlurmdParameters=config_overrides
KillWait={kill_wait}
MinJobAge=3600
SlurmdTimeout=300
InactiveLimit=0
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of Slurm is not installed here."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """Starts the daemons; a context manager, which stops what it started and nothing else.

    Args:
        folder: for sockets, state and logs; short, since the path of a socket has at most 107 characters.
        kill_wait: seconds between SIGTERM and SIGKILL when a job is cancelled.
    """

    def __init__(self, folder: Path, kill_wait: int = 300):
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._daemons: list[subprocess.Popen] = []
        self._kill_wait = kill_wait

    def __enter__(self) -> Cluster:
        ports = _free_ports(1 + len(NODES))
        (self.folder / "state").mkdir(parents=True)
        self.folder.chmod(0o755)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
            for name, port in zip(NODES, ports[1:])
        )
        values = {"ports": ports, "user": getpass.getuser(), "folder": self.folder, "nodes": nodes}
        (self.folder / "slurm.conf").write_text(_CONF.format(kill_wait=self._kill_wait, **values))
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *self._munge_files())
            self._wait_for(lambda: (self.folder / "munge.socket").exists(), 60, "munged")
            self._start("slurmctld", "-D", "-c")
            for name in NODES:
                self._start("slurmd", "-D", "-N", name)
            self._wait_for(lambda: self.node_states() == ["idle"] * len(NODES), 120, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(subprocess.SubprocessError, RuntimeError):
            for job in self.run("squeue", "-h", "-o", "%A").split():
                self.run("scancel", job)
                self.run("scancel", "--signal=KILL", "--full", job)
            self._wait_for(lambda: not self.run("squeue", "-h"), 60, "the last job's end")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._end_steps()

    def _end_steps(self) -> None:
        """Jobs that would not end: their keepers outlive slurmd, and name this cluster's configuration."""
        ours = f"\0SLURM_CONF={self.environment['SLURM_CONF']}\0".encode()
        for keeper in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = b"\0" + Path(f"/proc/{keeper.pid}/environ").read_bytes() + b"\0"
                if keeper.name().startswith("slurmstepd") and ours in environment:
                    for process in [*keeper.children(recursive=True), keeper]:
                        process.kill()

    def _munge_files(self) -> list[str]:
        kinds = {
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        return [f"--{kind}={self.folder / name}" for kind, name in kinds.items()]

    def _start(self, *command: str) -> None:
        log = self.folder / f"{command[0]}-{len(self._daemons)}.out"
        with open(log, "ab") as file:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],  # tests that are killed leave no daemons
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )

    def _wait_for(self, true, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            ended = [d.args[3] for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > end:
                logs = "".join(
                    f"\n{f.name}: {f.read_text()[-1500:]}" for f in self.folder.glob("*.[lo][ou]*")
                )
                raise RuntimeError(f"waited for {what}; ended: {ended}{logs}")
            time.sleep(0.3)

    def run(self, *command: str) -> str:
        """A command of Slurm, or one that uses it; what it prints. Questions are asked three times: the daemons may be
        busy."""
        command = tuple(map(str, command))
        for left in range(
            2 if command[:2] == ("scontrol", "show") or command[0] in ("squeue", "sinfo") else 0, -1, -1
        ):
            done = subprocess.run(
                command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120
            )
            if not done.returncode:
                return done.stdout.strip()
            time.sleep(left)
        raise subprocess.SubprocessError(
            f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}"
        )

    def node_states(self) -> list[str]:
        """Of all nodes, such as `idle` or `drained`."""
        try:
            return self.run("sinfo", "-h", "-N", "-o", "%T").split()
        except subprocess.SubprocessError:
            return []

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job)))

    def state(self, job: str) -> str:
        """State of a job, such as `RUNNING`."""
        return self.job(job)["JobState"]

    def states_of_array(self, job: str) -> list[str]:
        """States of all tasks of an array, when they have ended."""

        def states() -> list[str]:
            return re.findall(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))

        self.until(lambda: set(states()) <= set(ENDED), 400, f"array {job}")
        return states()

    def minutes_run(self, job: str) -> int:
        """Whole minutes since the job was started."""
        days, hours, minutes, _ = re.fullmatch(
            r"(?:(\d+)-)?(\d+):(\d+):(\d+)", self.job(job)["RunTime"]
        ).groups()
        return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)

    def wait(self, job: str, seconds: float = 400) -> str:
        """Wait until a job has ended; its state."""
        self.until(lambda: self.state(job) in ENDED, seconds, f"job {job}")
        return self.state(job)

    def until(self, true, seconds: float, what: str) -> None:
        """Wait until something is true. Raises `TimeoutError` with the queue."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {seconds} s\n{self.run('squeue')}")
            time.sleep(0.5)
