"""One run per folder: a lock file with its owner's name and a heartbeat, for shared file systems without flock.

The file is made with O_EXCL, which NFS, Lustre and GPFS do atomically. Its owner touches it every few seconds; a file
that has not been touched for `STALE_SECONDS` belongs to nobody. Ages are differences between times that the file
system gave, so clocks of hosts do not matter.

An owner is told so that another host, or a later job, can judge whether it still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from ..durable_file import write_atomically
from ..errors import UserError
from .agreement import from_rank0, rank


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


NAME = ".zeda.lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 300.0
SETTLE_SECONDS = 1.0
"""Two runs may find the same stale lock: the later writer wins, and both look again after this long."""


class LockLost(UserError):
    """Another run has taken the folder over: this one was held up so long that it seemed dead."""


@dataclass(frozen=True)
class Found:
    """A lock file that is there."""

    owner: Owner | None
    """None if the file cannot be read (it is being written, or broken)."""
    token: str
    """Which taking of the lock this is."""
    age: float
    """Seconds since its last heartbeat, by the clock of the file system."""


class LockFile:
    """The lock of one path, taken and kept by one process (rank 0 of a run).

    Args:
        path: the lock file; its folder is made.
        stale: seconds without a heartbeat after which the lock is anybody's.
        beat: seconds between heartbeats.
    """

    def __init__(self, path: Path, stale: float = STALE_SECONDS, beat: float = BEAT_SECONDS):
        self.path, self.stale, self.beat = path, stale, beat
        self.token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._made: list[Path] = []

    def take(self) -> str | None:
        """Take the lock, over from a dead owner if need be. Returns what to tell about that.

        Raises:
            UserError: somebody else holds it; says who, for how long silent, and what to do.
            OSError: the folder cannot be written.
        """
        folder = self.path.parent
        self._made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        told = None
        if not self._create():
            found = self.look()
            if found is None:  # it went just now
                if not self._create():
                    raise UserError(self._refusal(self.look()))
            else:
                why = self.abandoned(found)
                if why is None:
                    raise UserError(self._refusal(found))
                told = f"{self.path}: taken over from {found.owner or 'an unknown run'}: {why}"
                self._replace()
        self._thread = threading.Thread(target=self._keep_alive, name="lock-heartbeat", daemon=True)
        self._thread.start()
        return told

    def look(self) -> Found | None:
        """The lock file as it stands; None if there is none."""
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        try:
            text, touched = self.path.read_text(), self.path.stat().st_mtime
        except (FileNotFoundError, UnicodeDecodeError):
            if not self.path.exists():
                return None
            text, touched = "", self.path.stat().st_mtime
        owner, token = None, ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            fields = json.loads(text)
            token = fields.pop("token")
            owner = Owner(**fields)
        return Found(owner, token, now - touched)

    def abandoned(self, found: Found) -> str | None:
        """Why nobody can hold this lock any more; None if somebody may."""
        # A run that is alive writes its name at once, and a heartbeat later on.
        if found.age > self._patience(found):
            return f"no sign of life for {found.age:.0f} s"
        return found.owner.why_gone() if found.owner else None

    def is_mine(self) -> bool:
        """Whether this run still holds the lock. A file that somebody deleted is made again, if nobody else was faster.

        Raises `OSError` if that cannot be seen now.
        """
        try:
            return json.loads(self.path.read_text())["token"] == self.token
        except FileNotFoundError:
            return self._create()
        except (ValueError, KeyError, TypeError):
            return False

    def require(self) -> None:
        """Raise `LockLost` if another run has taken over."""
        if not self.is_mine():
            found = self.look()
            who = (found and found.owner) or "an unknown run"
            raise LockLost(
                f"{self.path} now belongs to {who}: this run was silent for more than {self.stale:.0f} s and ends "
                "without writing; the other goes on from the last checkpoint"
            )

    def release(self) -> None:
        """Give the lock back (nothing if it is not ours any more), and the folders made for it that stayed empty."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if self.path.exists() and self.is_mine():
                self.path.unlink()
                for folder in self._made:
                    folder.rmdir()

    def _text(self) -> str:
        return json.dumps(asdict(this_process()) | {"token": self.token}) + "\n"

    def _create(self) -> bool:
        """Make the file, if possible with its content in one step: a kill leaves no lock or one whose owner is seen to
        be dead."""
        try:
            handle = os.open(self.path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
        except (OSError, AttributeError):  # no file without a name here
            return self._create_in_two_steps()
        with open(handle, "w") as file:
            self._write(file)
            try:
                # Python follows the link only where a folder is given, which an absolute path does not need.
                os.link(f"/proc/self/fd/{handle}", self.path, src_dir_fd=handle, follow_symlinks=True)
            except FileExistsError:
                return False
            except OSError:
                return self._create_in_two_steps()
        return True

    def _create_in_two_steps(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(handle, "w") as file:
                self._write(file)
        except OSError:  # a full disk
            self.path.unlink()
            raise
        return True

    def _write(self, file: TextIO) -> None:
        file.write(self._text())
        file.flush()
        os.fsync(file.fileno())

    def _replace(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another run was faster with the same
            write_atomically(self.path, self._text())
        time.sleep(SETTLE_SECONDS)
        if not self.is_mine():
            raise UserError(self._refusal(self.look()))

    def _patience(self, found: Found) -> float:
        """Seconds without a heartbeat after which nobody holds it."""
        return self.stale if found.owner else min(BEAT_SECONDS, self.stale)

    def _refusal(self, found: Found | None) -> str:
        if found is None:
            return f"{self.path}: another run took and gave back this lock just now; start again"
        return (
            f"{self.path}: {found.owner or 'an unknown run'} works here, last sign of life {max(found.age, 0):.0f} s "
            f"ago; wait for its end or choose another folder. If it is dead, start again in "
            f"{max(self._patience(found) - found.age, 1):.0f} s (or delete that file)"
        )

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.beat):
            with contextlib.suppress(OSError):  # of a file system that is away for a while
                if not self.is_mine():
                    return
                os.utime(self.path)


class RunLock:
    """The lock of a whole run: rank 0 holds it, all ranks learn what becomes of it. All methods are collective."""

    def __init__(self, file: LockFile | None):
        self._file = file

    def require(self) -> None:
        """Raise `LockLost` on all ranks if another run has taken over. Call before writing what both would write."""
        problem = None
        if rank() == 0 and self._file is not None:
            try:
                self._file.require()
            except LockLost as error:
                problem = str(error)
            except OSError:
                pass  # cannot be seen now; what is written next will tell
        problem = from_rank0(problem)
        if problem:
            raise LockLost(problem)


@contextmanager
def locked(path: str | Path | None, flag: str, warn=print) -> Iterator[RunLock]:
    """Hold the lock file `path` (None: no lock) while a run works. All processes enter.

    Raises `UserError` on all ranks if another run holds it, or if it cannot be written; names `flag`.
    """
    if path is None:
        yield RunLock(None)
        return
    file, told, problem = None, None, None
    if rank() == 0:
        file = LockFile(Path(path))
        try:
            told = file.take()
        except UserError as error:
            problem = f"{flag} {error}"
        except OSError as error:
            problem = f"{flag} {Path(path).parent}: cannot be written ({error.strerror or error})"
    try:
        problem = from_rank0(problem)
        if problem:
            file = None  # never ours
            raise UserError(problem)
        if told:
            warn(told)
        yield RunLock(file)
    finally:
        if file is not None:
            file.release()
