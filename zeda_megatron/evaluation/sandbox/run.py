"""Run a Python program behind walls and say how it ended."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .limits import Limits

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
    folder = tempfile.mkdtemp(prefix="zeda-sandbox-")
    try:
        return _run(folder, files, arguments, limits, ways)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: str, files, arguments, limits: Limits, ways: Ways) -> Outcome:
    order_read, order_write = os.pipe()
    report_read, report_write = os.pipe()
    started = time.monotonic()
    command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(_ROOT), str(order_read), str(report_write)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
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
    try:
        order = _order(folder, files, arguments, limits, ways)
        try:
            with os.fdopen(order_write, "wb") as stream:
                stream.write(json.dumps(order).encode())
        except BrokenPipeError:
            pass
        walls = _walls(report_read, started + _STARTING)
        deadline = time.monotonic() + (1.0 if walls is None else limits.seconds)
        reason, streams = _read(process, deadline, limits.output)
        if reason == "exit":
            try:
                code = process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:  # it closed its streams and went on
                reason = "time"
        _kill(process, bool(walls) and "namespace" in walls.get("processes", ""))
        out, err = (bytes(part).decode("utf-8", "replace") for part in streams)
        if walls is None:
            reason = "sandbox"
        took = time.monotonic() - started
        return Outcome(reason, code if reason == "exit" else None, out, err, took, walls or {})
    finally:
        os.close(report_read)
        _kill(process)


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
        "read": [*_SYSTEM, *sorted(prefixes), os.path.dirname(os.path.realpath(sys.executable))],
        "devices": list(_DEVICES),
        "limits": limits.resources(),
        "disk": limits.disk,
        "namespaces": ways.namespaces,
        "landlock": ways.landlock,
        "seccomp": ways.seccomp,
    }


def _walls(descriptor: int, deadline: float) -> dict[str, str] | None:
    """What the launcher reports just before the program starts; None if it never came so far."""
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        if not ready.select(max(deadline - time.monotonic(), 0)):
            return None
    text = os.read(descriptor, 65536)
    return json.loads(text) if text else None


def _read(process, deadline: float, most: int) -> tuple[str, list[bytearray]]:
    """Read both streams until they end, the time is over, or together they hold more than `most` bytes."""
    streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    reason, held = "exit", 0
    with selectors.DefaultSelector() as ready:
        for stream in streams:
            ready.register(stream, selectors.EVENT_READ)
        while ready.get_map() and reason == "exit":
            left = deadline - time.monotonic()
            for key, _ in ready.select(left) if left > 0 else ():
                part = os.read(key.fd, 65536)
                if not part:
                    ready.unregister(key.fd)
                streams[key.fd] += part[: max(most - held, 0)]
                held += len(part)
            if held > most:
                reason = "output"
            elif left <= 0:
                reason = "time"
    return reason, list(streams.values())


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
    process.stdout.close()
    process.stderr.close()
