"""Which walls stand on this machine, found by running a program that leans against each of them."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from .folder import sweep
from .run import MIB, Limits, Ways, run_program

NEEDED = ("files", "network", "processes", "memory")
"""Without one of them code benchmarks are refused."""

_PROBE = """
import json, os, socket, sys, time
found = {}
def stands(name, attempt, refusal=(OSError, MemoryError)):
    try:
        attempt()
        found[name] = False
    except refusal:
        found[name] = True
    except OSError:
        found[name] = False
def write():
    for folder in (%(outside)r, "/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~/..")):
        try:
            path = os.path.join(folder, "zeda-probe-" + str(os.getpid()))
            open(path, "w").close()
            os.unlink(path)
            return
        except OSError:
            pass
    raise OSError
def read():
    for path in %(secrets)r:
        try:
            if open(path).read():
                return
        except OSError:
            pass
    raise OSError
def connect(kind):
    with socket.socket(socket.AF_INET, kind) as s:
        s.settimeout(1)
        try:
            s.connect(("127.0.0.1", 9))
        except ConnectionRefusedError:
            return
def fork():
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(5)
        os._exit(0)
def multiply():
    for _ in range(%(many)d):
        fork()
stands("writing", write)
stands("reading", read)
stands("tcp", lambda: connect(socket.SOCK_STREAM))
stands("udp", lambda: connect(socket.SOCK_DGRAM))
stands("memory", lambda: bytearray(2 << 30))
stands("alone", fork, PermissionError)
stands("few", multiply)
print(json.dumps(found))
sys.stdout.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Walls:
    """What holds a program here."""

    how: dict[str, str]
    """Wall to how it is enforced, as the launcher reports."""
    stand: dict[str, bool]
    """Wall to whether the probe ran into it."""
    note: str = ""
    """Why the sandbox, or a part of it, does not work."""

    @property
    def missing(self) -> list[str]:
        return [name for name in NEEDED if not self.stand.get(name)]

    def line(self) -> str:
        """One line for people."""
        parts = []
        for name in NEEDED:
            how = self.how.get(name, "RLIMIT_AS" if name == "memory" else "")
            parts.append(f"{name} ({how or 'probe'})" if self.stand.get(name) else f"{name} MISSING")
        parts.append(f"disk ({self.how.get('disk') or 'each file alone: RLIMIT_FSIZE'})")
        parts += ["time (killed)", "output (capped)"]
        return f"sandbox: {', '.join(parts)}" + (f"; {self.note}" if self.note else "")


def find_walls(ways: Ways = Ways()) -> Walls:  # noqa: B008  frozen
    """Try them out. Takes a tenth of a second. Clears away the folders of sandboxes whose process is dead."""
    sweep()
    limits = Limits(seconds=10, memory=1024 * MIB, threads=16)
    with tempfile.TemporaryDirectory(prefix="zeda-probe-") as folder:
        os.chmod(folder, 0o755)
        secrets = [os.path.join(folder, name) for name in ("open", "closed")]
        for path, mode in zip(secrets, (0o644, 0o600)):
            Path(path).write_text("secret")
            os.chmod(path, mode)
        probe = _PROBE % {"outside": "/", "many": 2 * limits.threads, "secrets": secrets}
        outcome = run_program({"probe.py": probe}, ["probe.py"], limits, ways)
    try:
        met = json.loads(outcome.stdout)
    except json.JSONDecodeError:
        last = (outcome.stderr.strip().splitlines() or ["the probe said nothing"])[-1]
        return Walls(outcome.walls, {}, f"it does not start here: {last}")
    # Processes that can be started must be few, and end with the namespace.
    ended_together = met["few"] and "namespace" in outcome.walls.get("processes", "")
    notes = [outcome.walls.get("note", "")]
    notes += [f"{what} files outside is possible" for what in ("reading", "writing") if not met[what]]
    stand = {
        "files": met["reading"] and met["writing"],
        "network": met["tcp"] and met["udp"],
        "processes": met["alone"] or ended_together,
        "memory": met["memory"],
    }
    return Walls(outcome.walls, stand, "; ".join(filter(None, notes)))


def require_walls(allow_weak: bool, ways: Ways = Ways()) -> Walls:  # noqa: B008  frozen
    """The walls of this machine; `UserError` if one that is needed is missing and `allow_weak` is not set."""
    walls = find_walls(ways)
    if walls.missing and not (allow_weak and walls.stand):
        raise UserError(
            f"code that a model wrote is not run here: {walls.line()}; a kernel with seccomp and Landlock (5.13) "
            "has all walls" + ("; --allow-weak-sandbox runs it all the same" if walls.stand else "")
        )
    return walls


def main(argv: list[str]) -> int:
    """`zeda evaluate sandbox`: says which walls stand here; exit code 1 if one is missing."""
    if argv in (["-h"], ["--help"]):
        print(
            "usage: zeda evaluate sandbox: which walls stand on this machine; exit code 1 if one is missing"
        )
        return 0
    if argv:
        raise UserError(f"zeda evaluate sandbox takes no flags, got {' '.join(argv)}")
    walls = find_walls()
    print(walls.line())
    return 1 if walls.missing else 0
