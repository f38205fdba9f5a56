"""Gives up everything that a process does not need which only reads files handed to it.

`confine` makes this process nobody, without new privileges, undumpable, under limits, and has the
kernel refuse (EPERM) every system call but those that read an open file, take memory and answer: no
name is opened any more, no process started or signalled, no socket made. The filter is classic BPF
(seccomp(2)), one comparison a call. Where a kernel has no seccomp the rest still holds. What a
process imports, and what the memory killer should think of it, must be settled before.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import resource
import struct

from capture.unprivileged import give_up_privileges

_PR_SET_SECCOMP = 22
_SECCOMP_FILTER = 2

# Numbers from asm/unistd_64.h and asm-generic/unistd.h.
_CALLS = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "munmap": 11, "brk": 12},
        **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17},
        **{"sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "setitimer": 38},
        **{"sendto": 44, "sendmsg": 46, "recvmsg": 47, "exit": 60, "fcntl": 72, "getpid": 39},
        **{"gettimeofday": 96, "getrusage": 98, "sigaltstack": 131, "futex": 202},
        **{"preadv": 295, "preadv2": 327},
        **{"clock_gettime": 228, "exit_group": 231, "getrandom": 318, "restart_syscall": 219},
    },
    "aarch64": {
        **{"dup": 23, "fcntl": 25, "close": 57, "lseek": 62, "read": 63, "write": 64, "fstat": 80},
        **{"pread64": 67, "exit": 93, "exit_group": 94, "futex": 98, "setitimer": 103},
        **{"preadv": 69, "preadv2": 286},
        **{"clock_gettime": 113, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132},
        **{"rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "getrusage": 165},
        **{"gettimeofday": 169, "getpid": 172, "sendto": 206, "sendmsg": 211, "recvmsg": 212},
        **{"brk": 214, "munmap": 215, "mremap": 216, "madvise": 233, "getrandom": 278},
    },
}
_MMAP = {"x86_64": 9, "aarch64": 222}
_MPROTECT = {"x86_64": 10, "aarch64": 226}
_FSTATAT = {"x86_64": 262, "aarch64": 79}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_PROT_EXEC, _MAP_ANONYMOUS, _AT_EMPTY_PATH = 4, 0x20, 0x1000

_LOAD, _EQUAL, _SET, _GREATER, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_X32 = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def confine(*, cpu_seconds: int, memory_bytes: int) -> bool:
    """Give up all but reading and answering; False when this kernel has no seccomp.

    What the process may still use: CPU time, address space.
    """
    give_up_privileges()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return _filter_calls(_program(platform.machine()))


def _statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _program(machine: str) -> bytes:
    """Over `struct seccomp_data`: number at 0, architecture at 4, arguments from 16 on."""
    if machine not in _CALLS:
        return b""
    lines = [
        _statement(_LOAD, 4),
        _statement(_EQUAL, _ARCHITECTURE[machine], 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, 0),
        _statement(_GREATER, _X32, 0, 1),
        _statement(_RETURN, _REFUSE),
    ]
    for number in _CALLS[machine].values():
        lines += [_statement(_EQUAL, number, 0, 1), _statement(_RETURN, _ALLOW)]
    lines += _when(
        _MMAP[machine], argument=2, never=_PROT_EXEC, then_argument=3, always=_MAP_ANONYMOUS
    )
    lines += _when(_MPROTECT[machine], argument=2, never=_PROT_EXEC)
    lines += _when(_FSTATAT[machine], then_argument=3, always=_AT_EMPTY_PATH)
    return b"".join((*lines, _statement(_RETURN, _REFUSE)))


def _when(
    number: int, *, argument: int = 0, never: int = 0, then_argument: int = 0, always: int = 0
) -> list[bytes]:
    """Allow a call unless the bit `never` of one argument is set, or `always` of another is not."""
    inner: list[bytes] = []
    if never:
        inner += [_statement(_LOAD, 16 + 8 * argument), _statement(_SET, never, 0, 1)]
        inner.append(_statement(_RETURN, _REFUSE))
    if always:
        inner += [_statement(_LOAD, 16 + 8 * then_argument), _statement(_SET, always, 1, 0)]
        inner.append(_statement(_RETURN, _REFUSE))
    inner.append(_statement(_RETURN, _ALLOW))
    return [_statement(_EQUAL, number, 0, len(inner)), *inner]


def _filter_calls(program: bytes) -> bool:
    if not program:
        return False
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    filter_ = ctypes.create_string_buffer(header, len(header))
    done = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(filter_), 0, 0)
    return bool(done == 0)
