"""`halton-meter status [--json]`: health, what is metered and what is not, what was lost.

It tells of the probes' service and of the local proxy, whichever runs. Exit codes: 0 what runs is
healthy; 1 nothing runs, or something is degraded.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

from halton_meter.cli.output import count, harmless

GAPS_SHOWN = 5
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
    from halton_meter.live.control import PROXY_SOCKET_NAME, Control, ServiceAbsent

    home = accounts.home_folder()
    try:
        control = Control(home)
        found = control.ask("status")
        control.close()
    except ServiceAbsent:
        found = {"health": "stopped", "home": str(home)}
    with contextlib.suppress(ServiceAbsent):
        control = Control(home, name=PROXY_SOCKET_NAME)
        found["proxy"] = control.ask("status")
        control.close()
        found["uprobes_health"] = found["health"]
        found["health"] = _worse(found["health"], found["proxy"]["health"])
    if as_json:
        click.echo(json.dumps(found))
    else:
        for line in status_lines(found):
            click.echo(harmless(line))
    sys.exit(0 if found["health"] == "ok" else 1)


def status_lines(found: dict[str, Any]) -> list[str]:
    """The status for people."""
    if "proxy" in found:
        lines = proxy_lines(found["proxy"])
        if found["uprobes_health"] != "stopped":
            own = {**found, "health": found["uprobes_health"]}
            del own["proxy"]
            lines = status_lines(own) + lines
        return lines
    if found["health"] == "stopped":
        return [
            f"stopped (state in {found['home']})",
            "  start it: sudo halton-meter start",
            "  or the local proxy, without root: halton-meter start --via proxy",
        ]
    totals = found["totals"]
    lines = [
        f"{found['health']}, up {_duration(found['uptime_s'])}, "
        f"{found['probes']} probes through {found['loader']}",
        f"  {count(found['events'], 'event')}{_since_restart(found['restarts'])} from "
        f"{found['bytes']:,} bytes of plaintext, "
        f"${totals['list_usd']} by list; last {found['last_event_at'] or 'none yet'}",
        *_store_lines(found),
    ]
    if found["restarts"]:
        where = "see the gaps" if found["gaps"] else "the kernel went on copying meanwhile"
        lines.append(f"  restarted {count(found['restarts'], 'time')}: {where}")
    lines += _loss_lines(found["losses"], found["gaps"])
    return lines + _coverage_lines(found["coverage"])


def _worse(uprobes: str, proxy: str) -> str:
    """The health of both: a service that was never started does not make the other one ill."""
    if uprobes in ("stopped", "ok"):
        return proxy
    return uprobes


def proxy_lines(found: dict[str, Any]) -> list[str]:
    """The local proxy's status for people."""
    worker = found["worker"]
    lines = [
        f"proxy {found['health']}, up {_duration(found['uptime_s'])} on "
        f"{', '.join(found['addresses'])}; {count(found['connections'], 'connection')} open"
    ]
    if found["totals"] is not None:
        since = _since_restart(worker["restarts"])
        lines.append(
            f"  {count(found['events'], 'event')}{since}, ${found['totals']['list_usd']} by list; "
            f"last {found['last_event_at'] or 'none yet'}"
        )
        lines += _store_lines(found)
    if found["health"] == "paused":
        lines.append("  metering is stopped, traffic goes through; start it: halton-meter start")
    elif worker["state"] != "ready":
        why = f": {worker['trouble']}" if worker["trouble"] else ""
        lines.append(f"  not metering, traffic goes through unmetered ({worker['state']}{why})")
    if not found["certificate_usable"]:
        lines.append("  the certificate is expired or not ours: halton-meter init")
    if worker["restarts"]:
        times = count(worker["restarts"], "time")
        lines.append(f"  its worker was restarted {times}: see the gaps")
    for each in found["bypassed"][:BYPASSED_SHOWN]:
        cause = each["cause"].replace("_", " ")
        connections = count(each["connections"], "connection")
        lines.append(f"  unmetered: {each['host']} {connections} ({cause})")
    lines += _turned_away_lines(found.get("counts", {}))
    for each in found["refused"][:BYPASSED_SHOWN]:
        who = each["program"] or "some program"
        lines.append(
            f"  {who} does not trust the proxy certificate for {each['host']}; "
            "its traffic is not metered"
        )
        lines.append("    halton-meter init, then start that program again")
    return lines + _loss_lines(found["losses"] or {}, found["gaps"])


_TURNED_AWAY = {
    "refused_other_user": "of other users of this machine: the proxy serves its owner and root",
    "refused_other_user_at_worker": "of other users of this machine to the proxy's inner port",
    "refused_past_the_edge": "to the proxy's inner port, which only the proxy itself may use",
}


def _turned_away_lines(counts: dict[str, int]) -> list[str]:
    return [
        f"  refused: {count(counts[cause], 'connection')} {words}"
        for cause, words in _TURNED_AWAY.items()
        if counts.get(cause)
    ]


def _loss_lines(losses: dict[str, int], gaps: list[dict[str, str]]) -> list[str]:
    lines = [f"  lost: {cause.replace('_', ' ')} {lost:,}" for cause, lost in losses.items()]
    lines += [f"  gap: {gap['from']} to {gap['to']}: {gap['cause']}" for gap in gaps[-GAPS_SHOWN:]]
    return lines or ["  nothing lost, no gaps"]


def _coverage_lines(coverage: list[dict[str, Any]]) -> list[str]:
    known = [line for line in coverage if line["host"]]
    lines = ["processes that talk to providers:"] if known else []
    for line in sorted(known, key=lambda each: (each["state"] == "metered", each["pid"])):
        lines += _process_lines(line, f" -> {line['host']}")
    unknown = [line for line in coverage if not line["host"]]
    if unknown:
        lines.append("processes that talk TLS in a way not metered, to hosts that are not known:")
    for line in sorted(unknown, key=lambda each: int(each["pid"])):
        lines += _process_lines(line, "")
    return lines


def _process_lines(line: dict[str, Any], host: str) -> list[str]:
    state = line["state"].replace("_", " ")
    lines = [f"  {line['pid']:>7} {state:<15} {line['process'] or '?'} ({line['stack']}){host}"]
    return lines + ([f"          {line['advice']}"] if line["advice"] else [])


def _store_lines(found: dict[str, Any]) -> list[str]:
    """Where the events are that are not in the database yet, and what is wrong if something is."""
    held = found.get("held") or 0
    journal = (found["journal_waiting"] or 0) - held
    waiting = f"{count(journal, 'event')} wait{'s' if journal == 1 else ''} in the journal"
    waiting += f", {held:,} in memory" if held else ""
    lines = [f"  state in {found['home']}; {waiting}"]
    if found.get("price_error"):
        again = "--via proxy" if found.get("source") == "proxy" else ""
        sudo = "" if again else "sudo "
        lines.append(f"  {found['price_error']}")
        lines.append(
            f"    then: {sudo}halton-meter stop {again}".rstrip()
            + f" && {sudo}halton-meter start {again}".rstrip()
        )
    if found["store_error"]:
        lines.append(f"  since {found['store_error_since']}: {found['store_error']}")
    for path in found.get("damaged_databases") or ():
        lines.append(f"  a damaged database was put aside, reports lack what is in it: {path}")
        lines.append("    once you have looked at it, move it to another folder")
    return lines


def _since_restart(restarts: int) -> str:
    return " since the last restart" if restarts else ""


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
