"""What the metering worker is given to do, and how it speaks to the supervisor.

One line of JSON each: a `Job` to the worker's standard input, then its messages from its standard
output. Both ends know the limits here; neither the loop nor the process is in this file.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from halton_meter.budget import STOP

JOB_BYTES_MAX = 1 << 20
COVERAGE_SHOWN_MAX = 500
SEEN_MAX, SEEN_CHARACTERS_MAX = 40, 64
"""Events that who watches a run names when it comes back after a worker's death."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one metering process does. `service` is False for a single `run`.

    `extra_hosts` are the user's own, as `registry.Registry` takes them. `died_at_ns` and `cause`
    are set when this one replaces one that died; `continued` means that the kernel went on copying
    meanwhile, so nothing was missed. `lost_before` counts what earlier workers have lost, `owed`
    what of that is in no store yet; `outages` are those that the disk refused so far.
    `config_error` has a line for each configured value that is wrong and not used; `own_hosts` are
    those of `extra_hosts` that the user's own file names. `run_pid` is the command of a `run`,
    `max_usd` what it may spend, `at_limit` what follows, and `spent_before` what an earlier worker
    has counted: "usd", "requests", "unpriced". `counted_before` are the ids of events of that which
    may come again: it died before it could say that it was done with them. `record_fd` is a file
    that plaintext is kept in.
    """

    home: str
    service: bool
    extra_hosts: dict[str, str] = field(default_factory=dict)
    scope: dict[str, Any] = field(default_factory=dict)
    died_at_ns: int | None = None
    cause: str | None = None
    restarts: int = 0
    continued: bool = False
    lost_before: dict[str, int] = field(default_factory=dict)
    owed: dict[str, int] = field(default_factory=dict)
    outages: list[dict[str, str]] = field(default_factory=list)
    supervisor_pid: int | None = None
    config_error: str | None = None
    own_hosts: dict[str, str] = field(default_factory=dict)
    run_pid: int | None = None
    max_usd: str | None = None
    at_limit: str = STOP
    spent_before: dict[str, Any] = field(default_factory=dict)
    counted_before: list[str] = field(default_factory=list)
    record_fd: int | None = None


def send(message: dict[str, Any]) -> None:
    """Send one line to the supervisor; its death is noticed elsewhere."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
