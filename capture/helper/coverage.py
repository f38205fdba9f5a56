"""Which processes are not metered, why, and whether they talk to a provider: lines of `status`.

Little is known of a TLS stack that cannot be probed: that a process has it, that the process has a
connection to port 443, and, where the C library resolves its names, that it asked for a provider's
address (`lookups.py`). A line names a host only then; otherwise its host is None, which means "not
known", not "none".
"""

from __future__ import annotations

from typing import Any

from capture.functions.stacks import INSTEAD, STACKS, Stack
from capture.helper.discovery import Discovery
from capture.helper.files.attachments import File
from capture.helper.process_tree import ProcessTree
from capture.processes import proc
from capture.processes.proc import talks_tls
from halton_meter.model import Process

LINES_MAX = 500
UNNAMED_ADVICE = (
    "an HTTP/2 connection is older than the probes, and its host is unknown: restart the program, "
    "or wait; it is metered after two new connections"
)
SEARCHED_ADVICE = (
    "its TLS library was still being searched; the search goes on: what you run next is metered"
)
UNKNOWN = "unknown"
RECENT_MAX = 200  # metered processes remembered after they ended


class Coverage:
    """What is known of each process that uses TLS: was it metered, and if not, why not."""

    def __init__(self, discovery: Discovery, tree: ProcessTree) -> None:
        self._discovery = discovery
        self._tree = tree
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
            if any(file.not_http for file in files):  # its connections were opened, then left out
                lines = [each for each in lines if each["process"]["pid"] != pid]
            elif pid in self._recent:
                continue
            line = unmetered(pid, watched.java, files, self._discovery.lookups.hosts(pid))
            if line is None and pid in self._discovery.unnamed:
                line = _unnamed(files, self._discovery.lookups.hosts(pid))
            if line and (process := self._discovery.identities.of(pid)):
                process = self._tree.with_run(process, self._tree.run_of(pid))
                lines.append({"process": proc.to_json(process), **line})
        return lines

    def _advice(self, pid: int) -> str | None:
        if pid in self._discovery.unnamed:
            return f"partly metered: {UNNAMED_ADVICE}"
        seconds = self._discovery.late_by_pid.get(pid)
        if seconds is None:
            return None
        return f"probed {seconds:.1f} s after its start: what it sent before that is not metered"

    def metered(self, process: Process, host: str) -> None:
        """Note that a process was metered: it stays listed after its end."""
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
            "stack": _stack_of(file),
            "library": file.path if file else None,
            "state": "metered",
            "advice": _advice_beside(file) if file else None,
        }


def unmetered(pid: int, java: bool, files: list[File], host: str | None) -> dict[str, Any] | None:
    """Why a process that maps these files is not metered; None when it is, or uses no TLS.

    `host` is what it looked up. Without one it must have a connection to port 443 now.
    """
    line = _stack_line(java, files)
    if line is not None:
        is_used = host or any(file.not_http for file in files) or talks_tls(pid)
        return line | {"host": host} if is_used else None
    searched = next((file for file in files if file.searching), None)
    if searched and (host or talks_tls(pid)):
        line = {"stack": UNKNOWN, "library": searched.path, "state": "not_recognised"}
        return line | {"host": host, "advice": SEARCHED_ADVICE}
    if host and not any(file.probes for file in files) and talks_tls(pid):
        line = {"stack": UNKNOWN, "library": None, "state": "not_recognised", "host": host}
        return line | {"advice": f"its TLS code was not found: {INSTEAD}"}
    return None


def _unnamed(files: list[File], host: str | None) -> dict[str, Any]:
    probed = next((file for file in files if file.probes), None)
    return {
        "stack": _stack_of(probed),
        "library": probed.path if probed else None,
        "state": "not_recognised",
        "host": host,
        "advice": UNNAMED_ADVICE,
    }


def _stack_line(java: bool, files: list[File]) -> dict[str, Any] | None:
    for file in files:
        if file.failure or (file.library and not file.library.probes):
            library = file.library
            partly_known = library is not None and STACKS[library.stack].partly_known
            state = "not_recognised" if partly_known else "unsupported"
            advice = file.failure or (library.reason if library else None)
            if library and library.build_id:
                advice = f"{advice} (build id {library.build_id})"
            stack = library.stack.value if library else UNKNOWN
            return {"stack": stack, "library": file.path, "state": state, "advice": advice}
    for file in files:
        if file.library and file.library.beside and (advice := _advice_beside(file)):
            stack = file.library.beside.value
            state = "unsupported"
            return {"stack": stack, "library": file.path, "state": state, "advice": advice}
    if java:
        advice, state = STACKS[Stack.JSSE].advice, "unsupported"
        return {"stack": Stack.JSSE.value, "library": None, "state": state, "advice": advice}
    return None


def _advice_beside(file: File) -> str | None:
    """What is not metered although the file has probes: traffic of its other stack."""
    if not file.library or not file.library.beside or not file.probes:
        return None
    beside = file.library.beside
    return f"it also uses {beside.value}: {STACKS[beside].advice}"


def _stack_of(file: File | None) -> str:
    """The stack in a file that is probed; where the file is forgotten, the usual one."""
    return (file.library.stack if file and file.library else Stack.OPENSSL).value
