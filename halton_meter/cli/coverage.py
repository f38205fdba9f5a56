"""Coverage in words: how many of the connections to providers were metered, and the rest.

Each line about the rest names program, TLS stack, host, number and cause, and what to do. It draws
`halton_meter.coverage`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from fractions import Fraction

from halton_meter.cli.output import aligned, count, count_text
from halton_meter.coverage import (
    OUTSIDE,
    Count,
    Coverage,
    Part,
    bytes_ratio,
    connections_ratio,
)
from halton_meter.live.remedies import fix_for
from halton_meter.live.unmetered import KEY_LOG_CAUSES, PROXY_CAUSES, Unmetered

RESTS_SHOWN = 8
# Losses that are connections, which coverage names where it is known.
_NAMED_HERE = {
    "http2_without_name": frozenset({"no_server_name", "older_than_probes", "host_not_told"})
}
# What such a process sent too early is a connection that was not metered, where they are counted.
_COUNTED_AS_CONNECTIONS = frozenset({"processes_ahead_of_probes"})
NOT_SHOWN_BY_KERNEL = (
    "coverage: unknown, this kernel does not show the connections that programs open "
    "(Linux 6.3 or newer does)"
)
_AGAIN = "Run it again: its probes are known by now."
_OTHER_FIXES = {
    "no_probes_yet": "Run it again: a search goes on, and is kept.",
    "probed_late": _AGAIN,
    "older_than_probes": "Restart the program.",
    "no_server_name": "Have it connect by the host's name, not by an address.",
    "quic": "Turn HTTP/3 off in the program.",
}
# Such programs may ignore proxy settings, or bring the certificates that they trust.
_UNSURE = frozenset({"a fork of Go crypto/tls"})
NO_SURE_FIX = (
    "No sure way is known: `sudo halton-meter run --via keylog` meters it if it writes its TLS "
    "keys, `halton-meter run --via proxy` if it follows proxy settings, else its own proxy setting "
    "may, with the proxy of halton-meter init"
)


def coverage_lines(
    coverage: Coverage | None, shown: int = RESTS_SHOWN, requests: int = 0
) -> list[str]:
    """The ratio and the rest; nothing where nobody counts, or where `requests` were metered on
    connections that no socket shows (TLS within the TLS of a proxy)."""
    if coverage is None or coverage.is_known is None:
        return []
    if requests and coverage.is_known and not coverage.parts:
        return []
    if not coverage.is_known and not coverage.parts:
        return [NOT_SHOWN_BY_KERNEL]
    rests = list(_rest_lines(coverage))
    lines = rests[:shown]
    # Connections whose host no hello tells count for none "to a provider", though `requests` did.
    if not requests or connections_ratio(coverage) is not None:
        lines.insert(0, ratio_line(coverage))
    if not coverage.is_known:
        lines.insert(0, NOT_SHOWN_BY_KERNEL)
    if len(rests) > shown:
        lines.append(f"  and {len(rests) - shown:,} more: halton-meter report --coverage")
    return lines


def losses_beside(losses: Mapping[str, int], coverage: Coverage | None) -> dict[str, int]:
    """The losses that no line about coverage names with program and cause."""
    named = {part.cause for part, _ in coverage.rests()} if coverage else set()
    is_counted = coverage is not None and coverage.is_known
    return {
        cause: lost
        for cause, lost in losses.items()
        if not named & _NAMED_HERE.get(cause, frozenset())
        and not (is_counted and cause in _COUNTED_AS_CONNECTIONS)
    }


def ratio_line(coverage: Coverage) -> str:
    """How many were metered of how many."""
    ratio = connections_ratio(coverage)
    if ratio is None:
        return "coverage: no connection to a provider carried a request"
    seen, metered = coverage.seen.connections, coverage.metered.connections
    were = "was" if seen == 1 else "were"
    text = f"coverage: {metered:,} of {count(seen, 'connection')} to providers {were} metered"
    if metered == seen:
        return text
    of_bytes = bytes_ratio(coverage)
    known = "known bytes" if coverage.has_unknown_bytes else "bytes"
    more = "" if of_bytes is None else f", {percent(of_bytes)} of {known}"
    return f"{text} ({percent(ratio)}{more})"


def percent(ratio: Fraction) -> str:
    """With one digit, such as "97.4 %"."""
    return f"{_percent(ratio)} %"


def _percent(ratio: Fraction) -> str:
    """Rounded to the nearest, yet less than all is never 100.0, nor more than none 0.0."""
    tenths = round(ratio * 1000)
    if 0 < ratio < 1:
        tenths = min(max(tenths, 1), 999)
    return f"{tenths / 10:.1f}"


def _rest_lines(coverage: Coverage) -> Iterator[str]:
    merged: dict[Part, Count] = {}
    for part, counted in coverage.rests():  # of one name, whatever folder the program is in
        # Of what a proxy has, the line does not tell the stack: one line, not two that read alike.
        stack = None if part.cause in OUTSIDE else part.stack
        named = Part(program_name(part), part.host, stack, part.cause)
        merged.setdefault(named, Count()).add(counted.connections, counted.bytes)
    for part, counted in merged.items():
        yield rest_line(part, counted)


def rest_line(part: Part, counted: Count) -> str:
    """One line about what was not metered."""
    name = program_name(part)
    if part.cause in OUTSIDE:
        connections = count(counted.connections, "connection")
        return f"  through a proxy on this machine: {name} to {part.host}, {connections}"
    cause = part.cause or ""
    otherwise = _OTHER_FIXES.get(cause)
    if part.stack in _UNSURE and cause not in PROXY_CAUSES:
        otherwise = NO_SURE_FIX
    option = "--via proxy --java" if part.stack == "JSSE" else "--via proxy"
    fix = "" if otherwise else f"halton-meter run {option} -- {shlex.quote(name)}"
    if cause in PROXY_CAUSES | KEY_LOG_CAUSES:  # the proxy is no way to meter these, or no sure one
        fix = fix_for(cause, part.program, part.stack)
    stack = None if part.stack == "unknown" else part.stack
    row = Unmetered(part.program and name, part.host, counted.connections, cause, stack, fix)
    return f"  {row.line()}" + (f". {otherwise}" if otherwise else "")


def coverage_table(
    coverage: Coverage | None,
    days: Sequence[tuple[date, Coverage]] = (),
    *,
    is_all: bool = True,
) -> str:
    """Connections by program, host and stack, the days where there are several, and the rest.

    `is_all` is False for a period; without connections the next command is another one then.
    """
    if coverage is None:
        return (
            "Coverage is known for periods alone, not for a model, provider or project: "
            "halton-meter report --coverage"
        )
    if not coverage.parts:
        then = "Uprobes count them: sudo halton-meter start"
        if not is_all:
            then = "All that were: halton-meter report --coverage"
        return f"No connection was counted. {then}"
    header = ["PROGRAM", "HOST", "TLS STACK", "SEEN", "METERED", "%", "BYTES", "METERED BYTES"]
    groups: dict[tuple[str, str, str], Coverage] = {}
    for part, counted in coverage.parts.items():
        key = (program_name(part), part.host or "not known", part.stack or "-")
        groups.setdefault(key, Coverage()).add(part, counted.connections, counted.bytes)
    rows = [[*key, *_figures(each)] for key, each in sorted(groups.items())]
    parts = [aligned(header, rows, header[3:])]
    rows = [[day.isoformat(), *_figures(each)] for day, each in days if each.seen.connections]
    if len(rows) > 1:
        parts.append(aligned(["DAY", *header[3:]], rows, header[3:]))
    parts.append("\n".join(coverage_lines(coverage, len(coverage.parts))))
    return "\n\n".join(parts)


def _figures(coverage: Coverage) -> list[str]:
    seen, metered, ratio = coverage.seen, coverage.metered, connections_ratio(coverage)
    if ratio is None:  # all of them stand beside the ratio
        beside = Count()
        for counted in coverage.parts.values():
            beside.add(counted.connections, counted.bytes)
        return [f"{beside.connections:,}", "-", "-", count_text(beside.bytes), "-"]
    return [
        f"{seen.connections:,}",
        f"{metered.connections:,}",
        _percent(ratio),
        count_text(seen.bytes),
        count_text(metered.bytes),
    ]


def program_name(part: Part) -> str:
    """The program's name, without its folder."""
    return os.path.basename(part.program or "") or "a program"
