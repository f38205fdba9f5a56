"""Which processes are not metered, why, and whether they talk to a provider: lines of `status`.

Little is known of a TLS stack that cannot be probed: that a process has it, that the process has a
connection to port 443, and, where the C library resolves its names, that it asked for a provider's
address (`lookups.py`). A line names a host only then; otherwise its host is None, which means "not
known", not "none".
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from capture.functions.stacks import INSTEAD, STACKS, Stack
from capture.helper.discovery import Discovery, Watched
from capture.helper.files.file import File
from capture.helper.process_tree import ProcessTree
from capture.helper.sockets import LATE, PASSED_BY, SEARCHED, Cause
from capture.processes import proc
from capture.processes.proc import talks_tls
from capture.protocol import RUSTLS_ID
from halton_meter.model import Process, is_own_proxy

LINES_MAX = 500
UNNAMED_ADVICE = (
    "an HTTP/2 connection is older than the probes, and its host is unknown: restart the program, "
    "or wait; it is metered after two new connections"
)
NOT_TOLD_ADVICE = (
    "an HTTP/2 connection through rustls does not tell its host (over TLS 1.2 it never does): "
    f"{INSTEAD}"
)
NAMELESS_ADVICE = (
    "an HTTP/2 connection named no server (SNI): have it connect by the host's name, not by an "
    "address"
)
SEARCHED_ADVICE = "its TLS library was still being searched; the search goes on: run it again"
FOUND_LATE_ADVICE = "its TLS library was found only after it had ended: run it again"
UNKNOWN = "unknown"
# Why a connection was not metered, of a process that is known.
REFUSED, NOT_PROBED, UNKNOWN_LIBRARY = "functions_not_found", "stack_not_probed", "stack_unknown"
# A connection that is used so soon after the probes came may have been made ready before: calls
# that were under way then are not seen.
LATE_SLACK_NS = 1_000_000_000
GONE_MAX = 1000  # processes that have ended, of which connections may end yet
RECENT_MAX = 200  # metered processes remembered after they ended


_NOTHING = Watched(None)
_FORGOTTEN = (Stack.OPENSSL,)


class Coverage:
    """What is known of each process that uses TLS: was it metered, and if not, why not."""

    def __init__(self, discovery: Discovery, tree: ProcessTree) -> None:
        self._discovery = discovery
        self._tree = tree
        self._recent: dict[int, dict[str, Any]] = {}
        self._ended: dict[int, dict[str, Any]] = {}  # what was not metered of them
        self._gone: OrderedDict[int, Watched] = OrderedDict()
        self._ended_early: dict[int, Watched] = {}  # of those, before the search in a file did
        # Whether a connection that a process opened under the probes named no server.
        self.named_no_server: Callable[[int], bool] = lambda pid: False
        discovery.on_gone = self._note_ended

    def lines(self) -> list[dict[str, Any]]:
        """One line a process, those that were metered first."""
        lines = [self._metered_line(pid, line) for pid, line in self._recent.items()]
        lines += [
            self._ended_line(pid, line)
            for pid, line in self._ended.items()
            if pid not in self._discovery.watched
        ]
        for pid, watched in self._discovery.watched.items():
            if len(lines) >= LINES_MAX:
                break
            files = self._files_of(watched)
            if any(map(_was_not_http, files)):  # its connections were opened, then left out
                lines = [each for each in lines if each["process"]["pid"] != pid]
            elif pid in self._recent:
                continue
            if (line := self._unmetered_line(pid, watched)) is not None:
                lines.append(line)
        return lines

    def _unmetered_line(self, pid: int, watched: Watched) -> dict[str, Any] | None:
        files, host = self._files_of(watched), self._discovery.lookups.hosts(pid)
        line = unmetered(pid, watched.java, files, host)
        if line is None and pid in self._discovery.unnamed:
            line = _unnamed(files, host, self._unnamed_advice(pid))
        process = self._discovery.identities.of(pid) if line else None
        if line is None or process is None or is_own_proxy(process):
            return None
        process = self._tree.with_run(process, self._tree.run_of(pid))
        return {"process": proc.to_json(process), **line}

    def _note_ended(self, pid: int, watched: Watched) -> None:
        """Keep what is known of a process that is gone."""
        self._gone[pid] = watched
        if len(self._gone) > GONE_MAX:
            self._gone.popitem(last=False)
        line = None if pid in self._recent else self._unmetered_line(pid, watched)
        if line is not None:
            self._ended.pop(pid, None)
            if len(self._ended) >= RECENT_MAX:
                oldest = next(iter(self._ended))
                del self._ended[oldest]
                self._ended_early.pop(oldest, None)
            self._ended[pid] = line
            if any(file.searching for file in self._files_of(watched)):
                self._ended_early[pid] = watched

    def _ended_line(self, pid: int, line: dict[str, Any]) -> dict[str, Any]:
        """What is known by now of a process that ended before the search in its file did."""
        if (watched := self._ended_early.get(pid)) is None:
            return line
        files = self._files_of(watched)
        if any(file.searching for file in files):
            return line
        found = _stack_line(watched.java, files) or {"advice": FOUND_LATE_ADVICE}
        return line | found

    def waits_for_searches(self) -> bool:
        """Whether a search is under way that tells why a process was not metered."""
        lookups = self._discovery.lookups
        asked = [
            watched
            for pid, watched in self._discovery.watched.items()
            if lookups.hosts(pid) or talks_tls(pid)
        ]
        files = (
            file for each in (*asked, *self._ended_early.values()) for file in self._files_of(each)
        )
        return any(file.searching for file in files)

    def _files_of(self, watched: Watched) -> list[File]:
        files_by_id = self._discovery.files.files
        known = (files_by_id.get(each) for each in watched.files)
        return [file for file in known if file and not file.is_linker]

    def _metered_line(self, pid: int, line: dict[str, Any]) -> dict[str, Any]:
        """The line of a process that was metered, with what of it is not."""
        if (watched := self._discovery.watched.get(pid)) is not None:
            files = self._files_of(watched)
            # It stays for when the process has ended.
            line["advice"] = _beside(watched.java, files) or line["advice"]
        return line | {"advice": self._advice(pid) or line["advice"]}

    def _advice(self, pid: int) -> str | None:
        if pid in self._discovery.unnamed:
            return f"partly metered: {self._unnamed_advice(pid)}"
        seconds = self._discovery.late_by_pid.get(pid)
        if seconds is None:
            return None
        return f"probed {seconds:.1f} s after its start: what it sent before that is not metered"

    def _unnamed_advice(self, pid: int) -> str:
        if any(each & RUSTLS_ID for each in self._discovery.unnamed.get(pid, ())):
            return NOT_TOLD_ADVICE
        return NAMELESS_ADVICE if self.named_no_server(pid) else UNNAMED_ADVICE

    def cause(self, pid: int, at_ns: int) -> Cause:
        """Why a connection that a process used at that (monotonic) time was not metered."""
        watched = self._watched(pid)
        files = self._files_of(watched)
        probed_at_ns = max(
            (self._discovery.probed_at_ns.get(each, 0) for each in watched.files), default=0
        )
        probed = next((file for file in files if file.probes), None)
        # A program that has two stacks was not metered for one reason or the other.
        is_one = probed and all(each.probes for each in probed.libraries) and not _unprobed(probed)
        if is_one and probed_at_ns and probed_at_ns + LATE_SLACK_NS > at_ns:
            return Cause(LATE, _stack_of(probed))
        line = _stack_line(watched.java, files)
        if line is not None and line["stack"] != Stack.OTHER.value:
            refused = line["state"] == "not_recognised"
            return Cause(REFUSED if refused else NOT_PROBED, line["stack"])
        if searched := next((file for file in files if file.searching), None):
            return Cause(SEARCHED, searched.library.stack.value if searched.library else UNKNOWN)
        return Cause(PASSED_BY if probed else UNKNOWN_LIBRARY, UNKNOWN)

    def metered_stack(self, pid: int, connection: int = 0) -> str | None:
        """The stack of a metered connection (what stands for its SSL object): the first that is
        probed in a process's files, where the connection is not known; None when none is known."""
        if connection & RUSTLS_ID:
            return Stack.RUSTLS.value
        probed = (file for file in self._files_of(self._watched(pid)) if file.probes)
        return _stack_of(first) if (first := next(probed, None)) else None

    def _watched(self, pid: int) -> Watched:
        """What is known of a process, or was when it ended."""
        return self._discovery.watched.get(pid) or self._gone.get(pid) or _NOTHING

    def metered(self, process: Process, host: str, connection: int) -> None:
        """Note that a process was metered, on a connection (what stands for its SSL object): it
        stays listed after its end. Our own proxy is not listed: its clients are."""
        if is_own_proxy(process):
            return
        self._recent.pop(process.pid, None)
        if len(self._recent) >= RECENT_MAX:
            self._recent.pop(next(iter(self._recent)))
        watched = self._watched(process.pid)  # it may have ended by now
        files = self._files_of(watched)
        wanted = Stack.RUSTLS if connection & RUSTLS_ID else None
        of_stack = (each for each in files if wanted in _probed_stacks(each))
        file = next(of_stack, next((each for each in files if each.probes), None))
        self._recent[process.pid] = {
            "process": proc.to_json(process),
            "host": host,
            "stack": wanted.value if wanted else _stack_of(file),
            "library": file.path if file else None,
            "state": "metered",
            "advice": _beside(watched.java, files),
        }


def unmetered(pid: int, java: bool, files: list[File], host: str | None) -> dict[str, Any] | None:
    """Why a process that maps these files is not metered; None when it is, or uses no TLS.

    `host` is what it looked up. Without one it must have a connection to port 443 now.
    """
    line = _stack_line(java, files)
    if line is not None:
        is_used = host or any(map(_was_not_http, files)) or talks_tls(pid)
        return line | {"host": host} if is_used else None
    searched = next((file for file in files if file.searching), None)
    if searched and (host or talks_tls(pid)):
        line = {"stack": UNKNOWN, "library": searched.path, "state": "not_recognised"}
        return line | {"host": host, "advice": SEARCHED_ADVICE}
    if host and not any(file.probes for file in files) and talks_tls(pid):
        line = {"stack": UNKNOWN, "library": None, "state": "not_recognised", "host": host}
        return line | {"advice": f"its TLS code was not found: {INSTEAD}"}
    return None


def _unnamed(files: list[File], host: str | None, advice: str) -> dict[str, Any]:
    probed = next((file for file in files if file.probes), None)
    return {
        "stack": _stack_of(probed),
        "library": probed.path if probed else None,
        "state": "not_recognised",
        "host": host,
        "advice": advice,
    }


def _stack_line(java: bool, files: list[File]) -> dict[str, Any] | None:
    is_probed = any(file.probes for file in files)
    for file in files:
        if file.failure and not file.libraries:
            stack, state = UNKNOWN, "unsupported"
            return {"stack": stack, "library": file.path, "state": state, "advice": file.failure}
        for each in file.libraries:
            library, reason = each.library, file.failure or each.failure
            if is_probed and library.stack is Stack.OTHER:
                continue  # a part of what is probed, more likely than not
            if reason or not library.probes:
                state = "not_recognised" if STACKS[library.stack].partly_known else "unsupported"
                advice = reason or library.reason
                if library.build_id:
                    advice = f"{advice} (build id {library.build_id})"
                stack = library.stack.value
                return {"stack": stack, "library": file.path, "state": state, "advice": advice}
    for file in files:
        if (beside := _unprobed(file)) and (advice := _beside(java, [file])):
            stack, state = beside.value, "unsupported"
            return {"stack": stack, "library": file.path, "state": state, "advice": advice}
    if java:
        advice, state = STACKS[Stack.JSSE].advice, "unsupported"
        return {"stack": Stack.JSSE.value, "library": None, "state": state, "advice": advice}
    return None


def _beside(java: bool, files: list[File]) -> str | None:
    """What is not metered of a process that is metered: traffic of its other stacks."""
    for file in files:
        if (beside := _unprobed(file)) and file.probes:
            return f"it also uses {beside.value}: {STACKS[beside].advice}"
        for each in file.libraries:
            stack, reason = each.library.stack, file.failure or each.reason
            if not each.probes and stack is not Stack.OTHER and not each.not_http and reason:
                return f"it also uses {stack.value} ({os.path.basename(file.path)}): {reason}"
    return f"it also uses {Stack.JSSE.value}: {STACKS[Stack.JSSE].advice}" if java else None


def _stack_of(file: File | None) -> str:
    """The stack in a file that is probed; where the file is forgotten, the usual one."""
    return (_probed_stacks(file) if file else [*_FORGOTTEN])[0].value


def _probed_stacks(file: File) -> list[Stack]:
    """The stacks in a file that are probed; where none is, those that it has."""
    probed = [each.library.stack for each in file.libraries if each.probes]
    return probed or [each.library.stack for each in file.libraries] or [*_FORGOTTEN]


def _unprobed(file: File) -> Stack | None:
    """A stack beside one that is probed, in the same library: only its name is known."""
    return next((each.library.beside for each in file.libraries if each.library.beside), None)


def _was_not_http(file: File) -> bool:
    """Whether functions found in it passed what they cannot have."""
    return any(each.not_http for each in file.libraries)
