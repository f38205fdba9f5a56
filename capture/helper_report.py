"""What root's helper reports of its work, as nouns: coverage, connections, losses.

`parsed_…` make them of the helper's messages, which come from root and are not doubted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capture import protocol
from capture.processes import proc
from halton_meter.model import Process


class CoverageState(enum.Enum):
    """What we can say of a process that uses TLS."""

    METERED = "metered"
    NOT_RECOGNISED = "not_recognised"
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True, slots=True)
class ProcessCoverage:
    """One line of `status`: a process, the TLS stack found in it, and what to do if unmetered."""

    process: Process
    host: str | None
    stack: str
    library: str | None
    state: CoverageState
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Connections:
    """Connections of a process to a host, None where that is not known, that sockets have shown.

    `cause` is why the probes did not meter them (sockets.py, coverage.py of the helper), None when
    they did; `bytes` all that passed the sockets, both ways, with TLS around it; None: not known.
    """

    process: Process
    host: str | None
    stack: str | None
    cause: str | None
    connections: int
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """How the helper fares. `losses` counts bytes by cause, `events_lost` events by cause;
    `counted` holds every kernel counter (protocol.STATISTICS). `waits_for_searches`: a search is
    under way that tells why a process was not metered."""

    loader: str
    probes: int
    libraries: tuple[str, ...] = ()
    losses: Mapping[str, int] = field(default_factory=dict)
    events_lost: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    rss_bytes: int | None = None
    waits_for_searches: bool = False


def parsed_coverage(report: Mapping[str, Any]) -> list[ProcessCoverage]:
    """The lines of a report."""
    return [
        ProcessCoverage(
            process=proc.from_json(line["process"]),
            host=line["host"],
            stack=line["stack"],
            library=line["library"],
            state=CoverageState(line["state"]),
            advice=line["advice"],
        )
        for line in report.get("coverage", ())
    ]


def parsed_connections(row: dict[str, Any]) -> Connections:
    """One row of what sockets have shown."""
    return Connections(**{**row, "process": proc.from_json(row["process"])})


def parsed_status(report: Mapping[str, Any], lost_between_readers_bytes: int) -> Status:
    """Loader, probes and losses of a report; bytes lost between two readers are the reader's own
    count.
    """
    counted: dict[str, int] = report.get("statistics", {})
    return Status(
        loader=report.get("loader", "none"),
        probes=report.get("probes", 0),
        libraries=tuple(report.get("libraries", ())),
        losses={name: counted.get(name, 0) for name in protocol.LOSS_CAUSES}
        | {"lost_between_readers_bytes": lost_between_readers_bytes},
        events_lost={name: counted.get(name, 0) for name in protocol.EVENT_LOSS_CAUSES}
        | {
            "processes_ahead_of_probes": report.get("late", 0),
            "programs_unknown": report.get("programs_unknown", 0),
            "commands_refused": report.get("refused", 0),
        },
        counted=counted,
        rss_bytes=report.get("rss_bytes"),
        waits_for_searches=report.get("waits_for_searches") is True,
    )
