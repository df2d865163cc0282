"""Run a Python program behind walls, within limits, and say how it ended."""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import site
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .folder import SandboxFolder

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


_HEADER = struct.Struct(">Q")
_ROOT = Path(__file__).resolve().parents[3]
_LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from zeda_megatron.evaluation.sandbox.launcher import main; main()"
)
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/cpuinfo",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_STARTING = 20.0
"""Seconds that putting up the walls may take."""
_ENDING = 5.0
"""Seconds that a killed program may take to be gone."""


@dataclass(frozen=True)
class Ways:
    """Which ways to build walls may be tried; tests and weaker systems lack some."""

    namespaces: bool = True
    landlock: bool = True
    seccomp: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    reason: str
    """`exit`, `time` (killed at the limit), `output` (killed for writing too much) or `sandbox` (never started)."""
    code: int | None
    """Exit code; 128 + n after signal n. None if it was killed from here."""
    stdout: str
    stderr: str
    seconds: float
    """Wall-clock time, walls included."""
    walls: dict[str, str] = field(default_factory=dict)
    """`files`, `network`, `processes`, `disk`: how each is enforced; a missing key is a missing wall."""


class Ended(Exception):
    """A program that gave no reply.

    Args:
        reason: as in `Outcome`. code: its exit code, if it has one. said: its standard error.
    """

    def __init__(self, reason: str, code: int | None, said: str):
        super().__init__(reason)
        self.reason, self.code, self.said = reason, code, said


def run_program(
    files: dict[str, str],
    arguments: list[str],
    limits: Limits = Limits(),  # noqa: B008  frozen
    ways: Ways = Ways(),  # noqa: B008  frozen
) -> Outcome:
    """Run `python ARGUMENTS` in a new folder that holds `files` (name to text) and is gone afterwards.

    The program sees no environment of ours, no input, and only what this interpreter needs of the file system. Never
    raises for what the program does.
    """
    with Program(files, arguments, limits, ways) as program:
        return program.rest()


class Program:
    """The same as a context manager, for a program that replies: frames of bytes, a length of eight bytes before each,
    come on its standard input and go to its standard output.

    Args: as for `run_program`. `limits.seconds` bounds its whole life.
    """

    def __init__(
        self,
        files: dict[str, str],
        arguments: list[str],
        limits: Limits = Limits(),  # noqa: B008  frozen
        ways: Ways = Ways(),  # noqa: B008  frozen
    ):
        self.files, self.arguments, self.limits, self.ways = files, arguments, limits, ways

    def __enter__(self) -> Program:
        self.started, self._folder = time.monotonic(), SandboxFolder()
        self._process, self.walls = None, None
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        (order_read, order_write), (report_read, report_write) = os.pipe(), os.pipe()
        try:
            command = [
                sys.executable,
                "-I",
                "-S",
                "-c",
                _LAUNCH,
                str(_ROOT),
                str(order_read),
                str(report_write),
            ]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(order_read, report_write),
                start_new_session=True,
                env={},
                cwd="/",
            )
            os.close(order_read)
            os.close(report_write)
            order_read = report_write = None
            order = _order(self._folder.path, self.files, self.arguments, self.limits, self.ways)
            with os.fdopen(order_write, "wb") as stream, suppress(BrokenPipeError):
                order_write = None
                stream.write(json.dumps(order).encode())
            self.walls = _walls(report_read, self.started + _STARTING)
        finally:
            for descriptor in (order_read, order_write, report_read, report_write):
                if descriptor is not None:
                    os.close(descriptor)
        os.set_blocking(self._process.stdin.fileno(), False)
        self._deadline = time.monotonic() + (1.0 if self.walls is None else self.limits.seconds)
        self._out, self._err = bytearray(), bytearray()

    def __exit__(self, *_) -> None:
        if self._process is not None:
            _kill(self._process, self._own_processes())
        self._folder.remove()

    def ask(self, message: bytes, deadline: float, most: int) -> bytes:
        """Send a frame and wait for one. Raises `Ended` if none comes.

        Args:
            deadline: on the clock of `time.monotonic`; the end of its whole life may come sooner.
            most: bytes that the reply may have.
        """

        def reply() -> bool:
            if len(self._out) >= _HEADER.size and _HEADER.unpack_from(self._out)[0] > most:
                raise Ended("output", None, self._said())
            return len(self._out) >= _HEADER.size and len(self._out) - _HEADER.size >= self._length()

        reason = self._pump(_HEADER.pack(len(message)) + message, min(deadline, self._deadline), most, reply)
        if reason is not None:
            code = self._code(_ENDING) if reason == "exit" else None
            raise Ended("sandbox" if self.walls is None else reason, code, self._said())
        end = _HEADER.size + self._length()
        made = bytes(self._out[_HEADER.size : end])
        del self._out[:end]
        return made

    def rest(self) -> Outcome:
        """End its input, and read all that it says until it ends."""
        self._process.stdin.close()
        reason = self._pump(b"", self._deadline, self.limits.output, lambda: False)
        code = self._code(self._deadline - time.monotonic()) if reason == "exit" else None
        if reason == "exit" and code is None:  # it closed its streams and went on
            reason = "time"
        if self.walls is None:
            reason, code = "sandbox", None
        _kill(self._process, self._own_processes())
        took, most = time.monotonic() - self.started, self.limits.output
        out = bytes(self._out[:most]).decode("utf-8", "replace")
        err = bytes(self._err[: most - min(len(self._out), most)]).decode("utf-8", "replace")
        return Outcome(reason, code, out, err, took, self.walls or {})

    def _pump(self, pending: bytes, deadline: float, most: int, done: Callable[[], bool]) -> str | None:
        """Write what is pending and read both streams until `done` (None), or the reason why that cannot be: they
        end, the time is over, or together they hold more than `most` bytes beyond a reply's header."""
        stdin, rest = self._process.stdin, memoryview(pending)
        buffers = {self._process.stdout: self._out, self._process.stderr: self._err}
        with selectors.DefaultSelector() as ready:
            for stream in buffers:
                ready.register(stream, selectors.EVENT_READ)
            if rest:
                ready.register(stdin, selectors.EVENT_WRITE)
            while not done():
                left = deadline - time.monotonic()
                if left <= 0:
                    return "time"
                if not any(stream in buffers for stream in (key.fileobj for key in ready.get_map().values())):
                    return "exit"
                for key, _ in ready.select(left):
                    if key.fileobj is stdin:
                        try:
                            rest = rest[os.write(key.fd, rest[: 1 << 20]) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:
                            rest = memoryview(b"")
                        if not rest:
                            ready.unregister(stdin)
                        continue
                    part = os.read(key.fd, 1 << 16)
                    if not part:
                        ready.unregister(key.fileobj)
                    buffers[key.fileobj] += part
                if len(self._out) + len(self._err) > most + _HEADER.size and not done():
                    return "output"
        return None

    def _length(self) -> int:
        return _HEADER.unpack_from(self._out)[0]

    def _code(self, seconds: float) -> int | None:
        """Exit code, if it ends within `seconds`."""
        try:
            return self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return None

    def _said(self) -> str:
        return bytes(self._err[: self.limits.output]).decode("utf-8", "replace").strip()

    def _own_processes(self) -> bool:
        return bool(self.walls) and "namespace" in self.walls.get("processes", "")


def _order(folder: str, files, arguments, limits: Limits, ways: Ways) -> dict:
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    return {
        "folder": folder,
        "files": files,
        "argv": [sys.executable, "-I", *arguments],
        "environment": {
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        "read": [
            *_SYSTEM,
            *sorted(prefixes),
            *_package_folders(),
            os.path.dirname(os.path.realpath(sys.executable)),
        ],
        "devices": list(_DEVICES),
        "limits": limits.resources(),
        "disk": limits.disk,
        "namespaces": ways.namespaces,
        "landlock": ways.landlock,
        "seccomp": ways.seccomp,
    }


@cache
def _package_folders() -> list[str]:
    """Folders that .pth files add to the interpreter's packages: an environment on top of another has its packages
    there. This project's own (an editable installation) is none of the program's business."""
    found = []
    for folder in map(Path, site.getsitepackages()):
        for file in sorted(folder.glob("*.pth")):
            with suppress(OSError, UnicodeDecodeError):
                lines = (line.strip() for line in file.read_text().splitlines())
                paths = (folder / line for line in lines if line and not line.startswith(("#", "import")))
                found += [str(path) for path in paths if path.is_dir() and not _ROOT.is_relative_to(path)]
    return found


def _walls(descriptor: int, deadline: float) -> dict[str, str] | None:
    """What the launcher reports just before the program starts; None if it never came so far."""
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        if not ready.select(max(deadline - time.monotonic(), 0)):
            return None
    text = os.read(descriptor, 65536)
    return json.loads(text) if text else None


def _kill(process, own_processes: bool = False) -> None:
    """End launcher, program and all that it started; when this returns they are gone."""
    if process.stdout.closed:
        return
    if own_processes:
        process.terminate()  # the launcher ends the namespace, and waits for that
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        with suppress(ProcessLookupError):
            end()
    process.wait(_ENDING)
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()
