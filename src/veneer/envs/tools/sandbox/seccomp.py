"""A filter of system calls: those that holes in kernels are made of, and those that keep memory where no limit counts it.

Classic BPF as in https://docs.kernel.org/userspace-api/seccomp_filter.html; the numbers are those of the kernel's tables
(arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import errno
import os
import platform
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SHARED = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
"""io_uring_setup, _enter, _register, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd, mount_setattr, memfd_secret."""
REFUSED = {
    "x86_64": {
        **{"mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308},
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "userfaultfd": 323, "open_by_handle_at": 304},
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298},
        **{"init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320},
        **{"memfd_create": 319, "shmget": 29, "msgget": 68, "mq_open": 240},
    },
    "aarch64": {
        **{"mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268},
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "userfaultfd": 282, "open_by_handle_at": 265},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241},
        **{"init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294},
        **{"memfd_create": 279, "shmget": 194, "msgget": 186, "mq_open": 180},
    },
}
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET together."""
X32 = 0x40000000
"""Numbers from here on are another ABI's on x86_64."""
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def program() -> bytes | None:
    """The filter for this machine; None where the numbers are not known."""
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        return None
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    steps = [_step(_LOAD, _ARCH), _step(_EQUAL, AUDIT_ARCH[machine], 1, 0), refuse, _step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        steps += [_step(_AT_LEAST, X32, 0, 1), refuse]
    steps += [
        _step(_EQUAL, CLONE3, 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
    ]  # its flags lie in memory; the C library falls back on clone
    for number in (*REFUSED[machine].values(), *SHARED):
        steps += [_step(_EQUAL, number, 0, 1), refuse]
    steps += [_step(_EQUAL, CLONE[machine], 0, 3), _step(_LOAD, _FIRST_ARGUMENT), _step(_ANY_BIT, NEW_NAMESPACES, 0, 1), refuse]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def in_memory(content: bytes) -> int:
    """A file descriptor that reads ``content``."""
    fd = os.memfd_create("veneer")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
