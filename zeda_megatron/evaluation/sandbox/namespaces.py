"""Namespaces: a process's own view of processes, network and mounts. Stands alone: standard library only.

root makes them with its own rights; others inside a user namespace, where the system allows those.
"""

from __future__ import annotations

import ctypes
import os
import struct
from contextlib import suppress

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, -100, 0x8000, 1, 2


def enter() -> bool:
    """Leave the system's namespaces for new ones; children are in the process namespace. False: not allowed."""
    user, group = os.geteuid(), os.getegid()
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    if _libc().unshare(kinds) == 0:
        return True
    # A user namespace knows one id of ours; root's it may not even have without rights.
    if user == 0 or _libc().unshare(kinds | _NEWUSER):
        return False
    try:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def mount_work_folder(folder: str, size: int, user: int, group: int) -> None:
    """Everything becomes read-only except `folder`, which becomes an empty file system of `size` bytes in memory.

    Raises `OSError` (in a mount namespace only old kernels do, before 5.12).
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)
    options = f"size={size},nr_inodes=4096,mode=700,uid={user},gid={group}"
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _set_attributes("/", _AT_RECURSIVE, _ATTR_RDONLY | _ATTR_NOSUID, 0)
    _set_attributes(folder, 0, 0, _ATTR_RDONLY)


def mount_own_processes() -> None:
    """/proc shows the new process namespace only. What the system refuses here is no loss: Landlock hides /proc."""
    with suppress(OSError):
        _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    source, target, kind, options = (
        None if t is None else t.encode() for t in (source, target, kind, options)
    )
    if _libc().mount(source, target, kind, ctypes.c_ulong(flags), options):
        raise OSError(ctypes.get_errno(), f"mount {target!r}: {os.strerror(ctypes.get_errno())}")


def _set_attributes(path: str, flags: int, wanted: int, cleared: int) -> None:
    attributes = struct.pack("<QQQQ", wanted, cleared, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    if _libc().syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), ctypes.c_uint(flags), attributes, size):
        raise OSError(ctypes.get_errno(), f"mount_setattr {path}: {os.strerror(ctypes.get_errno())}")


def _libc():
    return ctypes.CDLL(None, use_errno=True)
