"""`halton-meter status [--json]`: health, what is metered and what is not, what was lost.

It shows the uprobes service, the local proxy and the key log service, whichever runs. Exit codes: 0
what runs is healthy; 1 nothing runs, or something is degraded; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from halton_meter.cli.coverage import coverage_lines, losses_beside, ratio_line
from halton_meter.cli.losses import loss_lines, other_calls_in_words, sightings_in_words
from halton_meter.cli.output import (
    count,
    duration_text,
    local_time,
    say,
    sum_words,
    zone_text,
)
from halton_meter.coverage import Coverage

OUTAGES_SHOWN = 5
BYPASSED_SHOWN = 10
EXAMPLES = """
    \b
    Examples:
      halton-meter status                      what is metered, what is not, what was lost
      halton-meter status --json | jq .health  "ok", "degraded", "paused" or "stopped"
"""


@click.command(epilog=EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def status(as_json: bool) -> None:
    """Show whether metering is healthy, what is metered and what is not, and what was lost.

    Exit codes: 0 what runs is healthy; 1 nothing runs, or something is degraded.
    """
    from halton_meter import accounts
    from halton_meter.cli.configured import told_here
    from halton_meter.live.control import KEY_LOG_SOCKET_NAME, PROXY_SOCKET_NAME, ask_service

    wrong = told_here()
    home = accounts.home_folder()
    found = ask_service(home, "status") or {"health": "stopped", "home": str(home)}
    for key, name in (("proxy", PROXY_SOCKET_NAME), ("keylog", KEY_LOG_SOCKET_NAME)):
        if (other := ask_service(home, "status", name=name)) is not None:
            found[key] = other
            found.setdefault("uprobes_health", found["health"])
            found["health"] = _worse(found["health"], other["health"])
    found["database_error"], aside = _database(home)
    found.setdefault("damaged_databases", aside)
    if found["database_error"] and found["health"] == "ok":
        found["health"] = "degraded"
    if as_json:
        click.echo(json.dumps(found))  # ASCII: a path may hold bytes that are no text
    else:
        say("\n".join(status_lines(found)))
    sys.exit(1 if wrong or found["health"] != "ok" else 0)


def _database(home: Path) -> tuple[str | None, list[str]]:
    """Why the database cannot be read, if so, and those that were put aside. One that somebody
    writes at the moment is none that cannot be read.
    """
    from halton_meter.store import Store, StoreBusy, StoreError

    store, why = Store(home), None
    if store.database_path.exists():
        try:
            store.schema_version()
        except StoreBusy:
            pass
        except StoreError as error:
            why = str(error)
    return why, [str(path) for path in store.damaged_databases]


def _worse(first: str, second: str) -> str:
    """The health of both: a service that was never started does not make the other one ill."""
    return second if first in ("stopped", "ok") else first


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """The status of what runs, for people."""
    proxy = found.get("proxy")
    uprobes = {**found, "health": found.get("uprobes_health", found["health"])}
    lines = [] if uprobes["health"] == "stopped" else uprobes_lines(uprobes)
    if proxy is not None:
        lines += proxy_lines(proxy)
    if (key_log := found.get("keylog")) is not None:
        lines += key_log_lines(key_log)
    if not lines:
        lines = [
            f"stopped (data folder {found['home']})",
            "  start the service: sudo halton-meter start",
            "  or the local proxy, without root: halton-meter start --via proxy",
            *_put_aside_lines(found),
        ]
    if found.get("database_error"):
        lines.append(f"database: {found['database_error']}")
    return lines


def uprobes_lines(found: Mapping[str, Any]) -> list[str]:
    """The uprobes service's status for people."""
    return [
        f"uprobes {found['health']}, up {_duration(found)}, "
        f"{count(found['probes'], 'probe')} attached through {found['loader']}",
        *_metered_lines(found, f" from {found['bytes']:,} bytes of plaintext"),
        *_restart_lines(found, "the kernel kept copying meanwhile, nothing was missed"),
        *_loss_lines(found),
        *_connection_lines(_connections(found), found["events"] or 0),
        *_coverage_lines(found["coverage"]),
    ]


def proxy_lines(found: Mapping[str, Any]) -> list[str]:
    """The local proxy's status for people."""
    worker = found["worker"]
    lines = [
        f"proxy {found['health']}, up {_duration(found)} on "
        f"{', '.join(found['addresses'])}; {count(found['connections'], 'connection')} open"
    ]
    if found["totals"] is not None:
        lines += _metered_lines(found)
    elif worker["state"] == "ready":
        lines.append("  what was metered is unknown: the proxy worker has not answered yet")
    if found["health"] == "paused":
        lines.append("  metering is stopped, traffic goes on; to meter: halton-meter start")
    elif worker["state"] != "ready":
        why = f": {worker['trouble']}" if worker["trouble"] else ""
        lines.append(f"  not metering, traffic goes on unmetered ({worker['state']}{why})")
    if not found["certificate_usable"]:
        lines.append("  the proxy certificate is expired or not ours: halton-meter init")
    lines += _restart_lines(found, "no connection to a provider was missed")
    lines += _bypassed_lines(found)
    return lines + _loss_lines(found)


def key_log_lines(found: Mapping[str, Any]) -> list[str]:
    """The key log service's status for people."""
    lines = [
        f"key log {found['health']}, up {_duration(found)}",
        f"  keys of {count(found['handshakes_with_keys'], 'connection')} came from "
        f"{', '.join(found['keys'])}",
        *_metered_lines(found),
        *_loss_lines(found),
        *_connection_lines(_connections(found), found["events"] or 0),
    ]
    lines += [f"  keys that are not read: {each}" for each in found.get("keys_troubles", ())]
    for path in found["keys_passed_over"]:
        lines.append(f"  {path} is not root's, so root does not read it")
        lines.append("    start the service with sudo as the user whose keys they are")
    if not found["handshakes_with_keys"]:
        lines.append("  no keys have come yet; programs write them that are started with")
        lines += [f"    {each}" for each in found["exports"]]
    return lines


def _last(found: Mapping[str, Any]) -> str:
    at = found["last_event_at"]
    if at is not None:
        return f"; last {_time(at)}"
    return "" if found["events"] else "; no request yet"


def _price(found: Mapping[str, Any]) -> str:
    totals = found["totals"]
    unpriced = totals.get("unpriced_requests", 0)
    unknown = unpriced + totals.get("implausible_requests", 0)
    of_none = unknown and unknown == totals["requests"]
    known = None if of_none else Decimal(totals["list_usd"])
    return sum_words(known, unpriced, f"${totals['list_usd']}")


def _metered_lines(found: Mapping[str, Any], source: str = "") -> list[str]:
    """What was metered, where its events are, and what is wrong if something is."""
    since = " since the last restart" if found["restarts"] else ""
    waiting = _waiting(found["journal_waiting"], found.get("held") or 0)
    lines = [
        f"  {count(found['events'], 'request')}{since}{source}, {_price(found)}{_last(found)}",
        f"  data folder {found['home']}; {waiting}",
    ]
    totals, repeated = found["totals"], found.get("journal_repeated") or 0
    again, apart = (totals.get(f"{name}_requests", 0) for name in ("seen_again", "told_apart"))
    lines += [f"  {each}" for each in sightings_in_words(again, apart, repeated)]
    if expired := found.get("expired"):
        old = "older than your retention_days"
        lines.append(f"  {count(expired, 'request')} {old} deleted since the last start")
    calls = other_calls_in_words(found["events"] or 0, totals.get("other_calls", 0))
    lines += [f"  {each}" for each in calls]
    if found.get("price_error"):
        lines += [f"  {found['price_error']}", "    then: halton-meter config reload"]
    if found.get("config_error"):
        lines += [f"  not used: {line}" for line in found["config_error"].split("\n")]
        lines.append("    the rest of the configuration is in use")
        if found.get("source") == "uprobes":
            lines.append("    once it is corrected: sudo halton-meter config reload")
    if found.get("budget_error"):
        lines += [f"  {found['budget_error']}", "    see: halton-meter budget status"]
    if refused := found.get("refused_at_limit"):
        were = "was" if refused == 1 else "were"
        lines.append(
            f"  {count(refused, 'request')} {were} refused at a limit: halton-meter budget status"
        )
    if found["store_error"]:
        lines.append(f"  since {_time(found['store_error_since'])}: {found['store_error']}")
    return lines + _put_aside_lines(found)


def _put_aside_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for path in found.get("damaged_databases") or ():
        lines.append(f"  damaged database set aside, its events are missing in reports: {path}")
        lines.append(f"    once you have looked at it: mv {path} /tmp")
    return lines


def _waiting(events: int | None, held: int) -> str:
    if events is None:
        return "how many events wait in the journal is unknown"
    journal = events - held
    waiting = f"{count(journal, 'event')} wait{'s' if journal == 1 else ''} in the journal"
    return waiting + (f", {held:,} in memory" if held else "")


def _restart_lines(found: Mapping[str, Any], otherwise: str) -> list[str]:
    if not found["restarts"]:
        return []
    missed = "see the outages" if found["outages"] else otherwise
    return [f"  restarted {count(found['restarts'], 'time')}: {missed}"]


def _loss_lines(found: Mapping[str, Any]) -> list[str]:
    losses: dict[str, int] = found["losses"] or {}
    losses = losses_beside(losses, _connections(found))
    lines = loss_lines(losses)
    for outage in found["outages"][-OUTAGES_SHOWN:]:
        between = f"{_time(outage['from'])} to {_time(outage['to'])}"
        lines.append(f"  outage: {between}: {outage['cause']}")
    return lines or ["  nothing lost, no outages"]


def _connections(found: Mapping[str, Any]) -> Coverage | None:
    """What was counted since the worker started; a service of an earlier version tells nothing."""
    with contextlib.suppress(ValueError):
        return Coverage.of_json(found.get("connections"))
    return None


def _connection_lines(coverage: Coverage | None, requests: int) -> list[str]:
    """How many connections to providers were metered, and the rest."""
    return [f"  {line}" for line in coverage_lines(coverage, requests=requests)]


def _duration(found: Mapping[str, Any]) -> str:
    return duration_text(found["uptime_s"] * 1000)


def _time(utc: str | None) -> str:
    """A stored time as local time; a file of outages may hold anything."""
    from datetime import datetime

    try:
        at_ns = int(datetime.fromisoformat(utc or "").timestamp()) * 1_000_000_000
    except (TypeError, ValueError, OverflowError):
        return "unknown"
    return f"{local_time(at_ns, seconds=True)} {zone_text(at_ns)}"


# --- the processes that uprobes see ---------------------------------------------------------------


def _coverage_lines(coverage: Iterable[Mapping[str, Any]]) -> list[str]:
    known = [line for line in coverage if line["host"]]
    unknown = [line for line in coverage if not line["host"]]
    lines = ["processes that talk to providers:"] if known else []
    known.sort(key=lambda each: (each["state"] == "metered", each["pid"]))
    for line, processes in _grouped(known):
        lines += _process_lines(line, f" -> {line['host']}", processes)
    if unknown:
        lines.append("not metered, destination unknown:")
    for line, processes in _grouped(sorted(unknown, key=lambda each: int(each["pid"]))):
        lines += _process_lines(line, "", processes)
    return lines


_ALIKE = ("state", "process", "stack", "host", "advice")


def _grouped(lines: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The first line of those that say the same of several processes, and how many they are."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in _ALIKE), []).append(line)
    for alike in found.values():
        yield alike[0], len({line["pid"] for line in alike})


def _process_lines(line: Mapping[str, Any], host: str, processes: int) -> list[str]:
    state = line["state"].replace("_", " ")
    more = f", {count(processes, 'process', 'processes')}" if processes > 1 else ""
    said = f"{state:<15} {line['process'] or '?'} ({line['stack']}){host}{more}"
    return [f"  {line['pid']:>7} {said}"] + (
        [f"          {line['advice']}"] if line["advice"] else []
    )


# --- what passed the proxy unmetered --------------------------------------------------------------

_TURNED_AWAY = {
    "refused_other_user": "by other users of this machine; the proxy serves its owner and root",
    "refused_other_user_at_worker": "by other users of this machine to the proxy's inner port",
    "refused_past_the_edge": "to the proxy's inner port, which only the proxy itself may use",
}


def _bypassed_lines(found: Mapping[str, Any]) -> list[str]:
    lines, told = _unmetered_lines(found)
    counted = Coverage.of_json(found.get("coverage_of_connections") or Coverage().as_json())
    if counted.parts:
        lines.insert(0, f"  {ratio_line(counted)}")
    counts = found.get("counts", {})
    for cause, words in _TURNED_AWAY.items():
        if counts.get(cause):
            lines.append(f"  refused: {count(counts[cause], 'connection')} {words}")
    untold = [each for each in found["refused"] if (each["host"], each["program"]) not in told]
    for each in untold[:BYPASSED_SHOWN]:
        who = each["program"] or "a program"
        lines.append(
            f"  {who} does not trust the proxy certificate for {each['host']}; "
            "its traffic is not metered"
        )
        lines.append("    halton-meter init, then restart that program")
    return lines


def _unmetered_lines(found: Mapping[str, Any]) -> tuple[list[str], set[Any]]:
    """What passed unmetered, and the (host, program) pairs that these lines name."""
    from halton_meter.live import unmetered

    if "unmetered" not in found:  # a service of an earlier version
        lines = []
        for each in found["bypassed"][:BYPASSED_SHOWN]:
            connections, cause = count(each["connections"], "connection"), each["cause"]
            said = f"  unmetered: {connections} to {each['host']} ({cause.replace('_', ' ')})"
            lines.append(said)
        return lines, set()
    rows = [unmetered.Unmetered.of_json(each) for each in found["unmetered"]]
    rows.sort(key=lambda row: -row.connections)
    said_lines = [f"  {line}" for line in unmetered.lines(rows, BYPASSED_SHOWN)]
    shown = [row for row in rows[:BYPASSED_SHOWN] if row.cause == "certificate_refused"]
    return said_lines, {(row.host, row.program) for row in shown}
