"""Runs commands on a machine where the N-th change to the disk goes wrong."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PATH_MAX, MOST = 4096, 1 << 16
MODES = ("count", "count flushes", "kill", "torn", "full", "broken")
PATIENCE_SECONDS = 120.0


class Plan(ctypes.Structure):
    """`struct plan` of faults.c."""

    _fields_ = (
        ("count", ctypes.c_long),
        ("dead", ctypes.c_long),
        ("at", ctypes.c_long),
        ("mode", ctypes.c_long),
        ("root", ctypes.c_char * PATH_MAX),
        ("met", ctypes.c_char * (PATH_MAX + 64)),
        ("kinds", ctypes.c_char * MOST),
        ("last", ctypes.c_char * PATH_MAX),
    )


@dataclass(frozen=True)
class Command:
    """What a user types, in the folder of the disk."""

    argv: tuple[str, ...]
    """A script and its arguments, or a module's name and its."""
    module: bool = False
    """Whether it is started as `python -m`."""
    ranks: int = 1
    """Processes that do it together."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """Exit code; below 0: the signal that ended it. Of several ranks the first that is not 0."""
    output: str
    """What it printed, both streams."""
    kinds: str
    """A letter for each change to the disk, see faults.c."""
    met: str
    """The change that went wrong; empty if none did."""
    hung: bool
    """Whether it had to be ended."""
    left: int
    """Processes of it that were still there after it had ended."""


def build(folder: Path) -> Path:
    """Compile the preload library. Raises if the machine has no C compiler: see `compiler`."""
    library = folder / "faults.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "faults.c"), "-ldl"]
    subprocess.run(command, check=True)
    return library


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class Machine:
    """A disk below `root`, and a server that runs commands there (server.py)."""

    def __init__(self, scratch: Path, root: Path):
        self.scratch, self.root = scratch, root
        self.plan_file = scratch / "plan"
        self.plan_file.write_bytes(bytes(ctypes.sizeof(Plan)))
        with self.plan_file.open("r+b") as file:
            self.plan = Plan.from_buffer(mmap.mmap(file.fileno(), 0))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment = os.environ | quiet | {"LD_PRELOAD": str(build(scratch))}
        self.server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

    def _ask(self, **request) -> dict:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, command: Command, mode: str = "count", at: int = 0) -> Outcome:
        """Run it; in the modes other than the counting ones the change number `at` (from 1) goes wrong."""
        output = self.scratch / "output"
        output.unlink(missing_ok=True)
        ctypes.memset(ctypes.addressof(self.plan), 0, ctypes.sizeof(Plan))
        self.plan.root, self.plan.mode, self.plan.at = str(self.root).encode(), MODES.index(mode), at
        pids = self._ask(
            plan=str(self.plan_file),
            argv=list(command.argv),
            module=command.module,
            ranks=command.ranks,
            folder=str(self.root),
            output=str(output),
        )["pids"]
        hung = not self._until_ended(pids)
        codes = [os.waitstatus_to_exitcode(self._ask(wait=pid)["status"]) for pid in pids]
        left = 0 if hung or self.plan.dead else self._left(pids)
        _end(pids)
        kinds = self.plan.kinds[: self.plan.count].decode()
        met = self.plan.met.decode()
        code = next((code for code in codes if code), 0)
        return Outcome(code, output.read_text(errors="replace"), kinds, met, hung, left)

    def _until_ended(self, pids: list[int]) -> bool:
        """Wait for the processes. When the machine is dead all of them die. False: they did not end."""
        until = time.monotonic() + PATIENCE_SECONDS
        while any(_state(pid) not in ("Z", None) for pid in pids):
            if self.plan.dead:
                _end(pids)
            if time.monotonic() > until:
                _end(pids)
                return False
            time.sleep(0.002)
        return True

    def _left(self, pids: list[int], seconds: float = 10.0) -> int:
        """Processes that a command has left behind: they are given some seconds to go."""
        until = time.monotonic() + seconds
        while (left := len(_sessions(pids))) and time.monotonic() < until:
            time.sleep(0.02)
        return left


def _stat(pid: str | int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _state(pid: int) -> str | None:
    fields = _stat(pid)
    return fields and fields[0]


def _sessions(pids: list[int]) -> list[int]:
    """Processes, living ones, whose session one of these has begun."""
    found = []
    for name in os.listdir("/proc"):
        fields = _stat(name) if name.isdecimal() else None
        if fields and int(fields[3]) in pids and fields[0] != "Z":
            found.append(int(name))
    return found


def _end(pids: list[int]) -> None:
    for pid in {*pids, *_sessions(pids)}:
        with contextlib.suppress(ProcessLookupError):
            if _state(pid) is not None:
                os.kill(pid, signal.SIGKILL)
