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
        "process_vm_readv": 310, "process_vm_writev": 311,
        # network, and memory that no limit counts
        "socket": 41, "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64,
        "mq_open": 240,
        # names and rights of files: what neither Landlock nor a size limit covers
        "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
        "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "removexattr": 197,
        "lremovexattr": 198, "fremovexattr": 199, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
        "open_by_handle_at": 304,
        # the kernel's own doors
        "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "keyctl": 250, "add_key": 248,
        "request_key": 249, "init_module": 175, "finit_module": 313, "kexec_load": 246, "reboot": 169,
    },
    "aarch64": {
        "kill": 129, "tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_open": 434,
        "pidfd_getfd": 438, "pidfd_send_signal": 424, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271,
        "socket": 198, "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190,
        "mq_open": 180,
        "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchownat": 54, "fchown": 55, "setxattr": 5,
        "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16, "utimensat": 88,
        "open_by_handle_at": 265,
        "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "keyctl": 219, "add_key": 217,
        "request_key": 218, "init_module": 105, "finit_module": 273, "kexec_load": 104, "reboot": 142,
    },
}  # fmt: skip
_CHECKED = {"x86_64": (56, 435, 302, 234), "aarch64": (220, 435, 261, 131)}
"""clone, clone3, prlimit64, tgkill: decided by an argument."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
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
    first_argument = _op(_LOAD, 16)
    out += [_op(_EQUAL, clone, 0, 4), first_argument, _op(_BITS, _CLONE_THREAD, 1, 0)]
    out += [_op(_RETURN, _EPERM), _op(_RETURN, _ALLOW)]
    for number, allowed in ((prlimit, 0), (tgkill, own_pid)):
        out += [_op(_EQUAL, number, 0, 4), first_argument, _op(_EQUAL, allowed, 1, 0)]
        out += [_op(_RETURN, _EPERM), _op(_RETURN, _ALLOW)]
    return b"".join([*out, _op(_RETURN, _ALLOW)])


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
