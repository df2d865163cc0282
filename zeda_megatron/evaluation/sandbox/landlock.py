"""Landlock: a process gives up every file but those it names, for good; no rights are needed.

Stands alone: imports the standard library only. Source: Linux, Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _READ_DIR, _REFER = 1 << 0, 1 << 2, 1 << 3, 1 << 13
_FILE_BITS = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14) | (1 << 15)
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_PATH_BENEATH = 1


def abi() -> int:
    """Version of Landlock in this kernel; 0: none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)), 0)


def restrict(read: list[str], write: list[str]) -> None:
    """From here on: read and run what lies beneath `read`, also write beneath `write`, nothing else.

    Paths that do not exist are left out. TCP is given up too where the kernel can (ABI 4), signals to and abstract
    sockets of processes outside as well (ABI 6). Raises `OSError`.
    """
    version = abi()
    if not version:
        raise OSError("this kernel has no Landlock")
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0
    attributes = struct.pack("<QQQ", files, network, scoped)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = _checked(libc, _CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for paths, rights in ((read, _READING), (write, files & ~_EXECUTE & ~_REFER)):
            for path in paths:
                _add(libc, ruleset, path, rights & files)
        if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
            raise OSError(ctypes.get_errno(), "no_new_privs")
        _checked(libc, _RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _add(libc, ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            rights &= _FILE_BITS
        rule = struct.pack("<Qi", rights, beneath)
        _checked(libc, _ADD, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(beneath)


def _checked(libc, number: int, *arguments) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
