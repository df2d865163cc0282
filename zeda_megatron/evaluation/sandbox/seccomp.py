"""A system-call filter (seccomp-bpf): no new processes, no sockets, no hand on other processes or on the kernel.

Threads stay allowed. Stands alone: imports the standard library only, for it runs before the sandboxed program.
Source: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers from the kernel's system-call tables.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_DENIED = {
    "x86_64": {
        # processes and signals to others
        "fork": 57, "vfork": 58, "kill": 62, "tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
        "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "process_mrelease": 448,
        "setsid": 112, "setpgid": 109,
        # the processor and memory of others
        "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "sched_setattr": 314,
        "sched_setaffinity": 203, "ioprio_set": 251, "migrate_pages": 256, "move_pages": 279, "io_setup": 206,
        # network, and memory that no limit counts
        "socket": 41, "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64,
        "mq_open": 240, "connect": 42, "bind": 49, "listen": 50, "sendmsg": 46, "sendmmsg": 307,
        # what happens to files outside
        "inotify_init": 253, "inotify_init1": 294, "fanotify_init": 300,
        # names and rights of files: what neither Landlock nor a size limit covers
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
        "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "open_by_handle_at": 304,
        # the kernel's own doors
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "keyctl": 250, "add_key": 248,
        "request_key": 249, "init_module": 175, "finit_module": 313, "kexec_load": 246, "kexec_file_load": 320,
        "reboot": 169, "syslog": 103, "acct": 163, "quotactl": 179, "swapon": 167, "swapoff": 168, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    },
    "aarch64": {
        "kill": 129, "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_open": 434,
        "pidfd_getfd": 438, "pidfd_send_signal": 424, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "process_madvise": 440, "process_mrelease": 448, "setsid": 157, "setpgid": 154,
        "setpriority": 140, "sched_setparam": 118, "sched_setscheduler": 119, "sched_setattr": 274,
        "sched_setaffinity": 122, "ioprio_set": 30, "migrate_pages": 238, "move_pages": 239, "io_setup": 0,
        "connect": 203, "bind": 200, "listen": 201, "sendmsg": 211, "sendmmsg": 269,
        "inotify_init1": 26, "fanotify_init": 262,
        "socket": 198, "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190,
        "mq_open": 180,
        "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchownat": 54, "fchown": 55, "setxattr": 5,
        "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "utimensat": 88,
        "open_by_handle_at": 265,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "keyctl": 219, "add_key": 217,
        "request_key": 218, "init_module": 105, "finit_module": 273, "kexec_load": 104, "kexec_file_load": 294,
        "reboot": 142, "syslog": 116, "acct": 89, "quotactl": 60, "swapon": 224, "swapoff": 225, "open_tree": 428,
        "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442,
    },
}  # fmt: skip
_CHECKED = {"x86_64": (56, 435, 302, 234), "aarch64": (220, 435, 261, 131)}
"""clone, clone3, prlimit64, tgkill: decided by an argument."""
_REFUSED = {
    "x86_64": {72: (1, (8, 10, 15, 1024, 1026)), 16: (1, (0x8901, 0x8902, 0x5412, 0x541C)), 157: (0, (1,))},
    "aarch64": {25: (1, (8, 10, 15, 1024, 1026)), 29: (1, (0x8901, 0x8902, 0x5412, 0x541C)), 167: (0, (1,))},
}
"""Number: which argument may not have which values. fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX (signals to others),
F_SETLEASE, F_NOTIFY; ioctl: FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX; prctl: PR_SET_PDEATHSIG (so that it ends with its
parent)."""
_SOCKETPAIR, _SENDTO = {"x86_64": 53, "aarch64": 199}, {"x86_64": 44, "aarch64": 206}
"""A pair of streams is what event loops need; a datagram socket, or an address, would lead outside."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN, _AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = _ERRNO | 1, _ERRNO | 38
_CLONE_THREAD = 0x10000
_X32 = 0x40000000


def supported() -> bool:
    """This machine's system-call numbers are known here."""
    return platform.machine() in _DENIED


def program(machine: str, own_pid: int) -> bytes:
    """The filter as BPF instructions. `own_pid` is the one process that may be signalled."""
    clone, clone3, prlimit, tgkill = _CHECKED[machine]
    out = [
        _op(_LOAD, 4),
        _op(_EQUAL, _AUDIT_ARCH[machine], 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, 0),
        _op(_AT_LEAST, _X32, 0, 1),
        _op(_RETURN, _KILL),
    ]
    for number in _DENIED[machine].values():
        out += [_op(_EQUAL, number, 0, 1), _op(_RETURN, _EPERM)]
    # Flags of clone3 lie in memory, out of reach: libraries fall back to clone when it is missing.
    out += [_op(_EQUAL, clone3, 0, 1), _op(_RETURN, _ENOSYS)]
    first_argument = _argument(0)
    out += [_op(_EQUAL, clone, 0, 4), first_argument, _op(_BITS, _CLONE_THREAD, 1, 0)]
    out += [_op(_RETURN, _EPERM), _op(_RETURN, _ALLOW)]
    for number, allowed in ((prlimit, 0), (tgkill, own_pid)):
        out += [_op(_EQUAL, number, 0, 4), first_argument, _op(_EQUAL, allowed, 1, 0)]
        out += [_op(_RETURN, _EPERM), _op(_RETURN, _ALLOW)]
    for number, (argument, values) in _REFUSED[machine].items():
        block = [_argument(argument)]
        for value in values:
            block += [_op(_EQUAL, value, 0, 1), _op(_RETURN, _EPERM)]
        out += _for(number, block)
    only_streams = [_argument(1), _op(_AND, 0xF), _op(_EQUAL, 1, 1, 0), _op(_RETURN, _EPERM)]
    no_address = [_argument(4), _op(_EQUAL, 0, 1, 0), _op(_RETURN, _EPERM)]
    no_address += [_argument(4, high=True), _op(_EQUAL, 0, 1, 0), _op(_RETURN, _EPERM)]
    out += _for(_SOCKETPAIR[machine], only_streams) + _for(_SENDTO[machine], no_address)
    return b"".join([*out, _op(_RETURN, _ALLOW)])


def _for(number: int, block: list[bytes]) -> list[bytes]:
    """Instructions for one system call, which is allowed where they do not return."""
    return [_op(_EQUAL, number, 0, len(block) + 1), *block, _op(_RETURN, _ALLOW)]


def _argument(place: int, high: bool = False) -> bytes:
    """Load an argument's low or high half."""
    return _op(_LOAD, 16 + 8 * place + 4 * high)


def install() -> None:
    """Filter this process and what it becomes, for good. Raises `OSError`; needs no rights."""
    code = program(platform.machine(), os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    count = len(code) // 8
    filters = struct.pack("@HP", count, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
