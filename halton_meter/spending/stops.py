"""What is held at a limit at the moment, and what the user lets go on: `budgets/stops.json`.

Whoever holds something (the service, a run, the proxy) writes an entry and looks now and then
whether `budget resume` has allowed more. Where that process is dead, `budget resume` continues what
it had stopped itself. Changed under the ledger's lock, written whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import Budget
from halton_meter.contract import usd_text
from halton_meter.spending.ledger import write_whole
from halton_meter.spending.spent import amount

FILE_NAME = "stops.json"
FILE_BYTES_MAX = 1 << 20
STOPS_MAX, MORE_MAX, PROCESSES_MAX = 256, 2000, 4096
TEXT_CHARACTERS_MAX = 400
STOPPED, REFUSED = "stopped", "refused"

ProcessId = tuple[int, int]
"""A pid, and the start of its process in clock ticks: no later process has both."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Something that is held: `how` is "stopped" (its processes are) or "refused" (its requests
    are). `id` is what `budget resume` takes: "run-4711" or a budget's name. `usd` is the limit,
    `limit_usd` with what was allowed on top. `by` holds it. `more_usd` is what `budget resume`
    allows further; None: it was not asked yet.
    """

    id: str
    budget: str | None
    usd: Decimal
    limit_usd: Decimal
    spent_usd: Decimal
    at_least: bool
    how: str
    since_ns: int
    by: ProcessId
    program: str
    key: str = ""
    processes: tuple[ProcessId, ...] = ()
    more_usd: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """All of the file: stops, and by a budget's key what may be spent beyond its limit."""

    stops: tuple[Stop, ...] = ()
    more: Mapping[str, Decimal] = field(default_factory=dict)

    def with_stop(self, stop: Stop, is_alive: Callable[[ProcessId], bool] = bool) -> Held:
        """With this stop, in place of one of the same id and holder; what a holder that is not
        there any more had stopped under this id is this one's now.
        """
        others, processes = [], dict.fromkeys(stop.processes)
        for each in self.stops:
            if each.id != stop.id or (each.by != stop.by and is_alive(each.by)):
                others.append(each)
            elif each.by != stop.by:
                processes |= dict.fromkeys(each.processes)
        stop = replace(stop, processes=tuple(processes))
        return replace(self, stops=(*others, stop)[-STOPS_MAX:])

    def without(self, *gone: Stop) -> Held:
        """Without these."""
        ids = {(each.id, each.by) for each in gone}
        return replace(
            self, stops=tuple(each for each in self.stops if (each.id, each.by) not in ids)
        )

    def allowing(self, key: str, usd: Decimal) -> Held:
        """With so much more for a budget's sum."""
        more = {**self.more, key: self.more.get(key, Decimal(0)) + usd}
        return replace(self, more=dict(list(more.items())[-MORE_MAX:]))


def key_of(budget: Budget, period: str, each: str) -> str:
    """What an allowance is for: one sum of a budget, at one limit."""
    return json.dumps([budget.name, usd_text(budget.usd), period, each])


def read(folder: Path) -> Held:
    """What the file says; nothing where there is none, or it cannot be read as one."""
    try:
        fd = os.open(folder / FILE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return Held()
    with os.fdopen(fd, "rb") as file:
        table = untrusted.parsed(file.read(FILE_BYTES_MAX).strip()) or {}
    stops = []
    for each in untrusted.tables(table, "stops", STOPS_MAX):
        try:
            stops.append(_stop(each))
        except (KeyError, TypeError, ValueError):
            continue
    more = {}
    for key, usd in list(untrusted.table(table, "more").items())[:MORE_MAX]:
        try:
            more[str(key)] = amount(usd) or Decimal(0)
        except ValueError:
            continue
    return Held(tuple(stops), more)


def _stop(table: dict[str, Any]) -> Stop:
    texts = {name: str(table[name])[:TEXT_CHARACTERS_MAX] for name in ("id", "how", "program")}
    budget, key = (
        untrusted.text(table, "budget"),
        str(table.get("key", ""))[: TEXT_CHARACTERS_MAX * 2],
    )
    return Stop(
        id=texts["id"],
        budget=budget,
        usd=amount(table["usd"]) or Decimal(0),
        limit_usd=amount(table["limit_usd"]) or Decimal(0),
        spent_usd=amount(table["spent_usd"]) or Decimal(0),
        at_least=table["at_least"] is True,
        how=texts["how"],
        since_ns=int(table["since_ns"]),
        by=_process_id(table["by"]),
        program=untrusted.printable(texts["program"], TEXT_CHARACTERS_MAX),
        key=key,
        processes=tuple(map(_process_id, table.get("processes", ())[:PROCESSES_MAX])),
        more_usd=amount(table.get("more_usd")),
    )


def _process_id(found: Any) -> ProcessId:
    pid, ticks = found
    return int(pid), int(ticks)


def write(folder: Path, held: Held) -> None:
    """Put it in place. Call it with the lock held. Raises OSError."""
    table = {
        "version": 1,
        "stops": [_as_json(each) for each in held.stops],
        "more": {key: usd_text(usd) for key, usd in held.more.items()},
    }
    write_whole(folder / FILE_NAME, [json.dumps(table).encode() + b"\n"])


def _as_json(stop: Stop) -> dict[str, Any]:
    money = ("usd", "limit_usd", "spent_usd", "more_usd")
    return asdict(stop) | {name: usd_text(getattr(stop, name)) for name in money}


def matching(held: Held, names: Sequence[str]) -> list[Stop]:
    """The stops of these names; all where none is named."""
    return [each for each in held.stops if not names or each.id in names or each.budget in names]
