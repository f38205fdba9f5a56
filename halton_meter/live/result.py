"""What came of metering one command, whichever source metered it. `cli/run.py` prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from halton_meter.budget import STOP
from halton_meter.coverage import Coverage
from halton_meter.live.totals import Totals
from halton_meter.live.unmetered import Unmetered


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `record` wrote; `error` is why it stopped before the end, None when it did not.

    Of so many connections `without_beginning` too much waited for their keys.
    """

    connections: int
    packets: int
    error: str | None
    without_beginning: int = 0


class RunLimit(NamedTuple):
    """What a run may spend, an exact decimal as text (None: no limit), and what follows there."""

    max_usd: str | None = None
    at_limit: str = STOP


NO_LIMIT = RunLimit()


@dataclass(slots=True)
class RunResult:
    """`losses` are counts by cause, `coverage` the processes that used TLS, `connections` what was
    seen and metered of connections to providers (None: nobody counts), `outages` the times without
    metering as (from_ns, to_ns, cause), `unmetered` what is known of connections to providers that
    were not metered, `not_followed` the commands that only asked a server outside of the run.
    `still_running` are the programs of processes that outlived the command and its metering.
    `unseen_ms`: a connection past the proxy that was shorter may not have been seen (None: nobody
    looked that way). `waited_ms` is how long its end waited for searches that tell why something
    was not metered. `keys_error`: why the user's own key file gave no keys. `recorded` is of
    `record` alone. `held` is what was said when a limit held the command last (`live/held.py`),
    `refused` how many requests were refused there. `exit_code` is the command's, 128 + its signal.
    """

    totals: Totals = field(default_factory=Totals)
    losses: dict[str, int] = field(default_factory=dict)
    coverage: list[dict[str, Any]] = field(default_factory=list)
    connections: Coverage | None = None
    unmetered: list[Unmetered] = field(default_factory=list)
    not_followed: list[str] = field(default_factory=list)
    still_running: list[str] = field(default_factory=list)
    outages: list[tuple[int, int, str]] = field(default_factory=list)
    store_error: str | None = None
    price_error: str | None = None
    keys_error: str | None = None
    unseen_ms: int | None = None
    waited_ms: int = 0
    recorded: Recorded | None = None
    held: dict[str, Any] | None = None
    refused: int = 0
    exit_code: int = 0
