"""`halton-meter status [--json]`: health, what is metered and what is not, what was lost.

Exit codes: 0 the service runs and is healthy; 1 it does not run, or is degraded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click

GAPS_SHOWN = 5


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def status(as_json: bool) -> None:
    """Health, coverage per process, losses."""
    from halton_meter import config
    from halton_meter.metering import Control, ServiceAbsent

    home = config.home_folder()
    try:
        control = Control(home)
        found = control.ask("status")
        control.close()
    except ServiceAbsent:
        found = {"health": "stopped", "home": str(home)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in status_lines(found):
            click.echo(line)
    sys.exit(0 if found["health"] == "ok" else 1)


def status_lines(found: dict[str, Any]) -> list[str]:
    """The status for people."""
    if found["health"] == "stopped":
        return [f"stopped (state in {found['home']})", "  start it: sudo halton-meter start"]
    totals = found["totals"]
    lines = [
        f"{found['health']}, up {_duration(found['uptime_s'])}, "
        f"{found['probes']} probes through {found['loader']}",
        f"  {found['events']:,} events from {found['bytes']:,} bytes of plaintext, "
        f"${totals['list_usd']} by list; last {found['last_event_at'] or 'none yet'}",
        f"  state in {found['home']}; {found['journal_waiting']:,} events wait in the journal",
    ]
    if found["restarts"]:
        lines.append(f"  restarted {found['restarts']} times: see the gaps")
    if found["store_error"]:
        lines.append(f"  the database cannot be written: {found['store_error']}")
    lines += _loss_lines(found["losses"], found["gaps"])
    return lines + _coverage_lines(found["coverage"])


def _loss_lines(losses: dict[str, int], gaps: list[dict[str, str]]) -> list[str]:
    lines = [f"  lost: {cause.replace('_', ' ')} {count:,}" for cause, count in losses.items()]
    lines += [f"  gap: {gap['from']} to {gap['to']}: {gap['cause']}" for gap in gaps[-GAPS_SHOWN:]]
    return lines or ["  nothing lost, no gaps"]


def _coverage_lines(coverage: list[dict[str, Any]]) -> list[str]:
    lines = ["processes that use TLS:"] if coverage else []
    for line in sorted(coverage, key=lambda each: (each["state"] == "metered", each["pid"])):
        name = line["process"] or "?"
        host = f" -> {line['host']}" if line["host"] else ""
        state = line["state"].replace("_", " ")
        lines.append(f"  {line['pid']:>7} {state:<15} {name} ({line['stack']}){host}")
        if line["advice"]:
            lines.append(f"          {line['advice']}")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
