"""Following processes, where what happens in the midst of a look decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from capture import protocol
from capture.helper import discovery as discovery_module
from capture.helper.discovery import Discovery
from capture.processes.mappings import FileMapping

PID = 4_000_000


def test_a_process_that_is_gone_once_it_was_looked_at_harms_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the look came the news of its next exec, and it had ended by then."""
    ring: Any = SimpleNamespace(
        records=lambda: iter(()), skip_discarded=lambda: None, filled=lambda: 0
    )
    files: Any = SimpleNamespace(
        search=list,
        take_attached=set,
        due=lambda now: math.inf,
        is_probed_linker=lambda linker: False,
    )
    scope: Any = SimpleNamespace()
    discovery = Discovery(ring, files, scope, lambda: None)
    discovery.sweep_at = math.inf
    looked: list[int] = []

    def look(pid: int) -> bool:
        looked.append(pid)
        discovery.watched.pop(pid, None)
        return True

    monkeypatch.setattr(discovery, "_look_at", look)
    discovery.schedule(PID)
    now = discovery.due(0.0)
    discovery.run_rescans(now)
    assert looked == [PID]
    assert discovery.due(now) > now  # it is looked at again, and found to be gone


def test_a_process_that_maps_thousands_of_files_lets_others_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look takes so much time and no more; the rest of its files come behind others' looks."""
    ring: Any = SimpleNamespace(records=lambda: iter(()), skip_discarded=lambda: None)
    looked: list[int] = []

    class Files:
        files: ClassVar[dict[Any, Any]] = {}

        def look_at(self, link: str, path: str) -> tuple[int, int, int]:
            clock[0] += 0.001
            looked.append(clock_pid[0])
            return (0, len(looked), 0)

        def __getattr__(self, name: str) -> Any:
            return {"search": list, "take_attached": set, "knows": lambda identity: True}.get(
                name, lambda *_: math.inf
            )

    clock, clock_pid = [1000.0], [0]
    monkeypatch.setattr(discovery_module.time, "monotonic", lambda: clock[0])

    def mappings(pid: int) -> Any:
        clock_pid[0] = pid
        count = 3000 if pid == PID else 3
        return (FileMapping(pid, inode, f"/{inode}", "") for inode in range(count))

    monkeypatch.setattr(discovery_module, "executable_mappings", mappings)
    scope: Any = SimpleNamespace(in_scope=lambda pid: True)
    files: Any = Files()
    discovery = Discovery(ring, files, scope, lambda: None)
    discovery.sweep_at = math.inf
    for pid in (PID, PID + 1, PID + 2):
        discovery.schedule(pid)
    turns = 0
    while looked.count(PID + 2) < 3:
        before = clock[0]
        discovery.run_rescans(clock[0])
        assert clock[0] - before < 0.05
        turns += 1
    assert turns <= 3
    assert looked.count(PID) < 40


class Ring:
    """A process ring that holds what a test puts there."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def records(self) -> Iterator[tuple[int, bytes]]:
        yield from enumerate(self.waiting)

    def release(self, _: int) -> None:
        self.waiting.clear()

    def skip_discarded(self) -> None:
        pass

    def filled(self) -> int:
        return len(self.waiting)


def exec_of(pid: int) -> bytes:
    body = bytes(protocol.COMM_BYTES + protocol.PATH_BYTES + protocol.PROJECT_BYTES)
    fields = (protocol.EXEC, 0, 0, pid, 0, 0, 0, 5, 0, 0, 0)
    return protocol.RECORD.pack(protocol.RECORD.size + len(body), *fields) + body


def test_an_exec_ends_a_scan_and_is_not_acted_on_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the old program go on to nobody's account, least of all the new one's."""
    ring: Any = Ring()
    looked: list[str] = []
    files: Any = SimpleNamespace(
        look_at=lambda link, path: looked.append(path), files={}, knows=lambda identity: True
    )
    scope: Any = SimpleNamespace(in_scope=lambda pid: True)
    discovery = Discovery(ring, files, scope, lambda: None)
    monkeypatch.setattr(
        discovery_module,
        "executable_mappings",
        lambda pid: (FileMapping(pid, inode, f"/{inode}", "") for inode in range(5)),
    )
    acted: list[int] = []

    def executed(record: protocol.Record) -> None:
        acted.append(record.tgid)
        discovery.watched.pop(record.tgid, None)

    monkeypatch.setattr(discovery, "_executed", executed)
    scan = discovery._scan(PID)
    next(scan)
    ring.waiting = [exec_of(PID)]
    discovery.take_news()  # as the way out does, at any moment
    assert (acted, ring.waiting) == ([], [])
    next(scan)
    assert looked == ["/0", "/0"]  # by its link, then by its path
    discovery.act_on_news()
    assert acted == [PID]
    with pytest.raises(StopIteration):
        next(scan)
    assert looked == ["/0", "/0"]
