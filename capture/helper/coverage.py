"""Which processes go unmetered, why, and whether they talk to a provider: lines of `status`.

What is known of a TLS stack that cannot be probed is little: that the process has it, that it has
a connection to port 443, and, where its names are looked up by the C library, that it asked for a
provider's address (`on_lookup` in probe.bpf.c tells; the kernel keeps every other name to itself).
A line names a host only then; otherwise its host is None, which is "not known", not "none".
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from capture.functions import libraries
from capture.functions.elf import ElfError
from capture.helper import loader
from capture.helper.family import Family
from capture.helper.files.attachments import File
from capture.helper.files.placement import RESOLVER_FUNCTION, refusal
from capture.processes import proc
from halton_meter.model import Process

if TYPE_CHECKING:
    from capture.helper.discovery import Discovery

PROCESSES_MAX = 4096
HOSTS_A_PROCESS_MAX = 8
LINES_MAX = 500
UNNAMED_ADVICE = (
    "HTTP/2 to a host that was named before the probes came: metered once two new connections have "
    "shown where its TLS library keeps the name, or start the program again"
)
RECENT_MAX = 200  # metered processes remembered after they ended


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
        """The hosts, for people; None when there are none that we know of."""
        return ", ".join(self._hosts[pid]) if self._hosts.get(pid) else None


class Coverage:
    """What is known of each process that uses TLS: was it metered, and if not, why not."""

    def __init__(self, discovery: Discovery, family: Family) -> None:
        self._discovery = discovery
        self._family = family
        self._recent: dict[int, dict[str, Any]] = {}

    def lines(self) -> list[dict[str, Any]]:
        """One line a process, those that were metered first."""
        files_by_id = self._discovery.files.files
        lines: list[dict[str, Any]] = [
            line | {"advice": self._advice(pid) or line["advice"]}
            for pid, line in self._recent.items()
        ]
        for pid, watched in self._discovery.watched.items():
            if len(lines) >= LINES_MAX:
                break
            files = [
                file
                for each in watched.files
                if (file := files_by_id.get(each)) and not file.is_linker
            ]
            if any(file.doubted for file in files):  # its connections were opened, then left out
                lines = [each for each in lines if each["process"]["pid"] != pid]
            elif pid in self._recent:
                continue
            line = unmetered(pid, watched.java, files, self._discovery.lookups.hosts(pid))
            if line is None and pid in self._discovery.unnamed:
                line = _unnamed(files, self._discovery.lookups.hosts(pid))
            if line and (process := self._discovery.identities.of(pid)):
                process = self._family.with_run(process, self._family.run_of(pid))
                lines.append({"process": proc.to_json(process), **line})
        return lines

    def _advice(self, pid: int) -> str | None:
        if pid in self._discovery.unnamed:
            return f"one of its connections is not metered: {UNNAMED_ADVICE}"
        seconds = self._discovery.late_by_pid.get(pid)
        if seconds is None:
            return None
        return f"probes came {seconds:.1f} s after its start: what it sent before is not metered"

    def metered(self, process: Process, host: str) -> None:
        """Note that a process was metered, whatever becomes of it."""
        files_by_id = self._discovery.files.files
        self._recent.pop(process.pid, None)
        if len(self._recent) >= RECENT_MAX:
            self._recent.pop(next(iter(self._recent)))
        watched = self._discovery.watched.get(process.pid)
        known = [files_by_id.get(each) for each in (watched.files if watched else ())]
        file = next((each for each in known if each and each.probes and not each.is_linker), None)
        self._recent[process.pid] = {
            "process": proc.to_json(process),
            "host": host,
            "stack": file.library.stack if file and file.library else "OpenSSL",
            "library": file.path if file else None,
            "state": "metered",
            "advice": _advice_beside(file) if file else None,
        }


def attach_resolver(program: int) -> int | None:
    """Hear of provider names that are looked up through this machine's C library; None: cannot.

    Closing the descriptor ends it. A container's own C library is not heard.
    """
    path = next((path for path in libraries.own_libraries() if "/libc.so" in path), None)
    with contextlib.suppress(ElfError, OSError, TypeError), open(path or "", "rb") as file:
        fd = file.fileno()
        found = libraries.find_function(fd, RESOLVER_FUNCTION, "C library", "on_lookup")
        if found is not None and refusal(fd, found) is None:
            (probe,) = found.probes
            return loader.attach_uprobe(
                program, f"/proc/self/fd/{fd}", probe.offset, at_return=False
            )
    return None


def unmetered(pid: int, java: bool, files: list[File], host: str | None) -> dict[str, Any] | None:
    """Why a process that maps these files goes unmetered; None when there is nothing to say.

    `host` is what it looked up. Without one it must have a connection to port 443 now.
    """
    line = _stack_line(java, files)
    if line is not None:
        told = host or any(file.doubted for file in files) or talks_tls(pid)
        return line | {"host": host} if told else None
    if host and not any(file.probes or file.searching for file in files) and talks_tls(pid):
        line = {"stack": "unknown", "library": None, "state": "not_recognised", "host": host}
        return line | {"advice": f"its TLS code was not found: {libraries.INSTEAD}"}
    return None


def _unnamed(files: list[File], host: str | None) -> dict[str, Any]:
    probed = next((file for file in files if file.probes), None)
    return {
        "stack": probed.library.stack if probed and probed.library else "OpenSSL",
        "library": probed.path if probed else None,
        "state": "not_recognised",
        "host": host,
        "advice": UNNAMED_ADVICE,
    }


def _stack_line(java: bool, files: list[File]) -> dict[str, Any] | None:
    for file in files:
        if file.failure or (file.library and not file.library.probes):
            stack = file.library.stack if file.library else "unknown"
            state = "not_recognised" if stack in ("BoringSSL", "OpenSSL") else "unsupported"
            advice = file.failure or (file.library.reason if file.library else None)
            if file.library and file.library.build_id:
                advice = f"{advice} (build id {file.library.build_id})"
            return {"stack": stack, "library": file.path, "state": state, "advice": advice}
    for file in files:
        if file.library and (advice := _advice_beside(file)):
            line = {"stack": file.library.beside, "library": file.path, "state": "unsupported"}
            return line | {"advice": advice}
    if java:
        line = {"stack": "JSSE", "library": None, "state": "unsupported"}
        return line | {"advice": libraries.ADVICE["JSSE"]}
    return None


def _advice_beside(file: File) -> str | None:
    """What is unseen although the file has probes: what it says through its other stack."""
    if not file.library or not file.library.beside or not file.probes:
        return None
    return f"it has {file.library.beside} as well: {libraries.ADVICE[file.library.beside]}"


def talks_tls(pid: int) -> bool:
    """Has the process an established connection to port 443? To which host, nothing here knows."""
    inodes = set()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as f:
            for row in f:
                fields = row.split()
                if fields[3:4] == ["01"] and fields[2].endswith(":01BB") and fields[9] in inodes:
                    return True
    return False
