"""A process of root becomes nobody's. Stands alone: standard library only."""

from __future__ import annotations

import ctypes
import os
import struct

_FIRST_USER, _NOBODY = 2_000_000_000, 65_534
"""User ids from the first on belong to no one: each sandbox takes its own, so that the kernel counts its tasks alone.
Containers that know fewer ids have the other."""
_BECOME = 1 << 0 | 1 << 6 | 1 << 7
"""CAP_CHOWN, CAP_SETGID, CAP_SETUID."""
_KEEP_CAPABILITIES, _DROP_FROM_BOUNDS, _AMBIENT, _RAISE, _CLEAR, _READ_SEARCH = 8, 24, 47, 2, 4, 2
_HEADER = struct.pack("<Ii", 0x20080522, 0)


def sandbox_user() -> tuple[int, int]:
    """User and group id that the program will have: root's own only where there is no other."""
    if os.geteuid() != 0 or not _may_become_another():
        return os.geteuid(), os.getegid()
    for user in (_FIRST_USER + os.getpid() % 100_000_000, _NOBODY):
        if _known(user, "uid") and _known(user, "gid"):
            return user, user
    return 0, os.getegid()


def _may_become_another() -> bool:
    """Root in a container may have lost the rights to give files away and to change its ids."""
    with open("/proc/self/status") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return effective & _BECOME == _BECOME


def _known(number: int, kind: str) -> bool:
    """Whether this user namespace has the id."""
    with open(f"/proc/self/{kind}_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def drop(user: int, group: int, keep_reading: bool) -> None:
    """Give up root, and all capabilities, for good. Raises `OSError` if the system refuses.

    With `keep_reading` one right is kept for who was root: to reach files whatever the modes of their folders, for the
    interpreter may lie in root's home. Only for where Landlock says which files those are.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if user == os.geteuid():
        _no_capabilities(libc)
        return
    libc.prctl(_KEEP_CAPABILITIES, int(keep_reading), 0, 0, 0)
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    if not keep_reading:
        _no_capabilities(libc)
        return
    bit = 1 << _READ_SEARCH
    data = struct.pack("<IIIIII", bit, bit, bit, 0, 0, 0)
    if libc.capset(_HEADER, data) or libc.prctl(_AMBIENT, _RAISE, _READ_SEARCH, 0, 0):
        raise OSError(ctypes.get_errno(), "capset")


def _no_capabilities(libc) -> None:
    """Who made a user namespace has all of them in it, and root without other ids keeps its own; the bounding set
    and no_new_privs see to it that they do not come back."""
    for capability in range(64):
        libc.prctl(_DROP_FROM_BOUNDS, capability, 0, 0, 0)
    libc.prctl(_AMBIENT, _CLEAR, 0, 0, 0)
    if libc.capset(_HEADER, struct.pack("<IIIIII", 0, 0, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
