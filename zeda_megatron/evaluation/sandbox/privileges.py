"""A process of root becomes nobody's. Stands alone: standard library only."""

from __future__ import annotations

import ctypes
import os
import struct

_FIRST_USER = 2_000_000_000
"""User ids from here on belong to no one: each sandbox takes its own, so that the kernel counts its tasks alone."""
_KEEP_CAPABILITIES, _AMBIENT, _RAISE, _READ_SEARCH = 8, 47, 2, 2


def sandbox_user() -> tuple[int, int]:
    """User and group id that the program will have."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    user = _FIRST_USER + os.getpid() % 100_000_000
    return user, user


def drop(user: int, group: int) -> None:
    """Give up root for good; no effect for others. Raises `OSError` if the system refuses.

    One right is kept: to reach files whatever the modes of their folders, for the interpreter may lie in root's home.
    Landlock says which files those are.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    bit = 1 << _READ_SEARCH
    header, data = struct.pack("<Ii", 0x20080522, 0), struct.pack("<IIIIII", bit, bit, bit, 0, 0, 0)
    if libc.capset(header, data) or libc.prctl(_AMBIENT, _RAISE, _READ_SEARCH, 0, 0):
        raise OSError(ctypes.get_errno(), "capset")
