"""Who of a run is paused before each request; that it is, `tests/kernel/test_pausing.py` shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from capture.helper import pausing
from capture.helper.pausing import Pausing


class Table(dict[bytes, bytes]):
    """A map of the kernel's."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    set = dict.__setitem__

    def drop(self, key: bytes) -> None:
        self.pop(key, None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pausing, Any, int]]:
    """What pauses, its table, and the one process of a run."""
    monkeypatch.setattr(pausing.bpf, "Map", Table)
    made = Pausing(0, 0, os.getuid())
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as process:
        yield made, made._pausing, process.pid
        process.kill()


def test_a_run_is_named_until_it_is_no_longer(run: tuple[Pausing, Any, int]) -> None:
    made, table, pid = run
    made.name_run(pid, on=True)
    assert len(table) == 1
    made.name_run(pid, on=False)
    assert len(table) == 0


@pytest.mark.parametrize("tracer", [1, None], ids=["a debugger", "nobody can tell"])
def test_a_run_that_a_debugger_has_is_not(
    run: tuple[Pausing, Any, int], monkeypatch: pytest.MonkeyPatch, tracer: int | None
) -> None:
    made, table, pid = run
    monkeypatch.setattr(pausing.proc, "tracer_of", lambda _: tracer)
    made.name_run(pid, on=True)
    assert len(table) == 0


def test_who_is_held_by_us_is_named_all_the_same(
    run: tuple[Pausing, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, table, pid = run
    monkeypatch.setattr(pausing.proc, "tracer_of", lambda _: os.getpid())
    made.name_run(pid, on=True)
    assert len(table) == 1


def test_many_processes_leave_room_for_those_that_have_asked(
    run: tuple[Pausing, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, table, pid = run
    monkeypatch.setattr(pausing, "OF_RUNS_MAX", 0)
    made.name_run(pid, on=True)
    assert len(table) == 0
    assert made.name(pid, on=True)
