"""What stands between the caller and the program: puts up the walls, says which, and becomes the program.

Started as a process of its own with `python -I -S`: imports the standard library and its neighbours only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

from . import landlock, namespaces, privileges, seccomp

_PDEATHSIG = 1
_NOT_FOUND = 127


def main() -> None:
    """argv: the descriptor to read the order from (JSON, see `run.py`), and the one to report the walls to."""
    order_fd, report_fd = int(sys.argv[-2]), int(sys.argv[-1])
    _end_with_parent()
    with os.fdopen(order_fd, "rb") as stream:
        order = json.load(stream)
    walls: dict[str, str] = {}
    folder, user, group, before = order["folder"], *privileges.sandbox_user(), os.geteuid()
    own_processes = order["namespaces"] and namespaces.enter()
    if own_processes:
        walls |= {"processes": "process namespace", "network": "network namespace"}
        try:
            namespaces.mount_work_folder(folder, order["disk"], user, group)
            walls |= {"files": "read-only mounts", "disk": "folder in memory"}
        except OSError as error:
            walls["note"] = str(error)
    _write_files(folder, order["files"])
    if user != before:
        for path in (folder, *Path(folder).iterdir()):
            os.chown(path, user, group)
    if not own_processes:
        _become(order, walls, user, group, report_fd)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    first = os.fork()
    if first == 0:
        _first_process(order, walls, user, group, report_fd)
    os.close(report_fd)
    # The caller's wish to end: when process 1 has been waited for, all of its namespace is gone.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _close_others()
    sys.exit(_wait(first))


def _first_process(order, walls, user, group, report_fd) -> None:
    """Process 1 of the namespace: when it ends, the kernel ends all others in it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    _end_with_parent()
    namespaces.mount_own_processes()
    program = os.fork()
    if program == 0:
        _become(order, walls, user, group, report_fd)
    os.close(report_fd)
    _close_others()
    while True:
        ended, status = os.wait()
        if ended == program:
            os._exit(_code(status))


def _become(order, walls, user, group, report_fd) -> None:
    """Take the limits, lose the rights, report, and run the program. Does not return."""
    try:
        os.chdir(order["folder"])
        confined = order["landlock"] and landlock.abi() > 0
        keep_reading = confined or not _open_to_all(order["argv"][0])
        privileges.drop(user, group, keep_reading)
        if keep_reading and not confined:
            _add(walls, "note", f"{order['argv'][0]} lies where others may not look: no file mode holds")
        _end_with_parent()  # the change of user has undone it
        for name, value in order["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        if confined:
            landlock.restrict(order["read"], [*order["devices"], order["folder"]])
            _add(walls, "files", f"Landlock {landlock.abi()}")
        if order["seccomp"] and seccomp.supported():
            seccomp.install()
            _add(walls, "network", "seccomp")
            _add(walls, "processes", "seccomp")
        os.write(report_fd, json.dumps(walls).encode())
        os.close(report_fd)
        os.execve(order["argv"][0], order["argv"], order["environment"])
    except BaseException as error:
        print(f"sandbox: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(_NOT_FOUND)


def _open_to_all(file: str) -> bool:
    """Whether anybody may read a file: its own mode, and those of the folders above it."""
    path = Path(os.path.realpath(file))
    return bool(path.stat().st_mode & 0o004) and all(part.stat().st_mode & 0o001 for part in path.parents)


def _end_with_parent() -> None:
    """Be killed when the process (in the caller: the thread) that started this one ends, even if it is killed."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _add(walls: dict[str, str], name: str, how: str) -> None:
    walls[name] = ", ".join(filter(None, [walls.get(name), how]))


def _write_files(folder: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8", errors="surrogatepass")


def _close_others() -> None:
    """Let go of the program's streams: the caller sees their end when the program is gone."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)


def _wait(process: int) -> int:
    return _code(os.waitpid(process, 0)[1])


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
