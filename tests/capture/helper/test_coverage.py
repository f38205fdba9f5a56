"""What the helper lists of the processes that it meters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from capture.functions.stacks import Stack
from capture.helper.coverage import Coverage
from capture.helper.discovery import Watched
from halton_meter.model import Process

GO = Process(pid=4711, started_ns=1, exe="/opt/client")
PROGRAM = (1, 2, 3)
SECOND_NS = 1_000_000_000


def go_program() -> Any:
    found = SimpleNamespace(stack=Stack.GO, beside=None, probes=[1], reason=None)
    library = SimpleNamespace(library=found, probes=[1], not_http=False, reason=None, failure=None)
    return SimpleNamespace(
        path="/opt/client",
        probes=[1],
        libraries=[library],
        is_linker=False,
        failure=None,
        searching=False,
    )


def discovery_of(watched: Watched, **more: Any) -> Any:
    """What the helper knows, of one process with that program."""
    watched.files.add(PROGRAM)
    return SimpleNamespace(
        watched={GO.pid: watched},
        files=SimpleNamespace(files={PROGRAM: go_program()}),
        lookups=SimpleNamespace(hosts=lambda pid: None),
        unnamed={},
        late_by_pid={},
        on_gone=None,
        **more,
    )


def test_who_has_ended_before_it_is_known_to_be_metered_is_listed_with_its_stack() -> None:
    """On a busy machine the end of a process is seen before its first bytes are read."""
    discovery = discovery_of(Watched(None))
    tree: Any = SimpleNamespace()
    coverage = Coverage(discovery, tree)
    discovery.on_gone(GO.pid, discovery.watched.pop(GO.pid))
    coverage.metered(GO, "api.anthropic.com", 1)
    [line] = coverage.lines()
    assert (line["stack"], line["library"]) == (Stack.GO.value, "/opt/client")
    assert (line["host"], line["state"]) == ("api.anthropic.com", "metered")


def test_what_is_used_just_after_the_probes_came_may_be_older_than_they() -> None:
    """It was made ready by calls that were under way: not a library that hides its traffic."""
    coverage = Coverage(
        discovery_of(Watched(None), probed_at_ns={PROGRAM: 5 * SECOND_NS}), SimpleNamespace()
    )
    causes = [coverage.cause(GO.pid, at_ns).cause for at_ns in (4 * SECOND_NS, 5_100_000_000)]
    assert causes == ["probed_late", "probed_late"]
    assert coverage.cause(GO.pid, 7 * SECOND_NS).cause == "nothing_passed"
