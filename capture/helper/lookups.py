"""Which provider hosts a process asked the address of: reported by a probe in the C library.

The kernel keeps every other name to itself (`on_lookup` in probe.bpf.c). It is how a process whose
TLS stack cannot be probed is known to talk to a provider.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict

from capture import bpf
from capture.functions.library import probe_offset
from capture.processes.mappings import offset_in_file

PROCESSES_MAX = 4096
HOSTS_A_PROCESS_MAX = 8
_libc = ctypes.CDLL(None)


class Lookups:
    """The provider hosts whose addresses a process asked for, by pid."""

    def __init__(self) -> None:
        self._hosts: OrderedDict[int, list[str]] = OrderedDict()

    def note(self, pid: int, host: str) -> None:
        """A process asked for the address of a provider's host."""
        hosts = self._hosts.setdefault(pid, [])
        if host and host not in hosts and len(hosts) < HOSTS_A_PROCESS_MAX:
            hosts.append(host)
        if len(self._hosts) > PROCESSES_MAX:
            self._hosts.popitem(last=False)

    def forget(self, pid: int) -> None:
        """It runs another program now, or is another process."""
        self._hosts.pop(pid, None)

    def hosts(self, pid: int) -> str | None:
        """The hosts, for people; None when none is known."""
        return ", ".join(self._hosts[pid]) if self._hosts.get(pid) else None


def attach_resolver(program: int, *, at_return: bool = False) -> int | None:
    """Probe `getaddrinfo`, or its return, of this machine's C library; None where that fails.

    Our own process maps that library, so the dynamic linker has resolved the function already: no
    symbols are read. Closing the descriptor detaches. Containers have a C library of their own,
    which is not probed.
    """
    function = ctypes.cast(_libc.getaddrinfo, ctypes.c_void_p).value or 0
    try:
        found = offset_in_file(function)
        if found is None or "/libc.so" not in found[0]:
            return None
        path, offset = found
        with open(path, "rb") as file:  # in memory there may be another helper's breakpoint
            code = os.pread(file.fileno(), 8, offset)
        if not at_return:
            offset += probe_offset(code, os.uname().machine)
        return bpf.attach_uprobe(program, path, offset, at_return=at_return)
    except OSError:
        return None
