"""How much a sandboxed program may use."""

from __future__ import annotations

import resource
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of one run."""

    seconds: float = 10.0
    """Wall-clock time, and processor time (rounded up)."""
    memory: int = 4096 * MIB
    """Bytes of address space."""
    disk: int = 64 * MIB
    """Bytes of all files in the folder together (of each one alone where the folder is not in memory)."""
    output: int = 1 * MIB
    """Bytes of standard output and standard error together; a program that writes more is stopped."""
    threads: int = 64
    """Threads and processes of the sandbox's user."""
    open_files: int = 64
    """Open files."""

    def resources(self) -> dict[str, int]:
        """Names of `resource` and their values."""
        values = {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_FSIZE": self.disk,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.threads,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_MEMLOCK": 64 * 1024,
        }
        kept = {}
        for name, value in values.items():
            if hasattr(resource, name):
                most = resource.getrlimit(getattr(resource, name))[1]
                kept[name] = value if most == resource.RLIM_INFINITY else min(value, most)
        return kept
