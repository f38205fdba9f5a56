"""Coverage: sums, JSON from any source, and its words."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from halton_meter.cli.coverage import coverage_lines, coverage_table, losses_beside, percent
from halton_meter.coverage import OTHERS, PARTS_MAX, Count, Coverage, Part
from halton_meter.live.unmetered import CAUSES

CURL = Part("/usr/bin/curl", "api.openai.com", "OpenSSL", None)
WGET = Part("/usr/bin/wget", "api.openai.com", "GnuTLS", "stack_not_probed")
JAVA = Part("/opt/java", "api.anthropic.com", "JSSE", "stack_not_probed")
PROXIED = Part("/usr/bin/app", "api.openai.com", None, "through_local_proxy")
UNNAMED = Part("/usr/bin/app", None, None, "no_server_name")


def made(*parts: tuple[Part, int, int | None]) -> Coverage:
    found = Coverage(is_known=True)
    for part, connections, more_bytes in parts:
        found.add(part, connections, more_bytes)
    return found


def test_all_metered_is_one_short_line() -> None:
    assert coverage_lines(made((CURL, 3, 900))) == [
        "coverage: 3 of 3 connections to providers were metered"
    ]


def test_the_rest_is_named_with_cause_and_fix() -> None:
    lines = coverage_lines(made((CURL, 41, 9710), (WGET, 2, 200), (JAVA, 1, 90)))
    assert lines == [
        "coverage: 41 of 44 connections to providers were metered (93.2 %, 97.1 % of bytes)",
        "  not metered: wget (GnuTLS) to api.openai.com, 2 connections: "
        "its TLS library cannot be probed. Use: halton-meter run --via proxy -- wget",
        "  not metered: java (JSSE) to api.anthropic.com, 1 connection: "
        "its TLS library cannot be probed. Use: halton-meter run --via proxy --java -- java",
    ]


def test_no_command_is_named_as_a_fix_that_may_not_help() -> None:
    utls = Part("/usr/bin/app", "api.openai.com", "a fork of Go crypto/tls", "stack_not_probed")
    (_, line) = coverage_lines(made((utls, 1, 9)))
    assert line == (
        "  not metered: app (a fork of Go crypto/tls) to api.openai.com, 1 connection: its TLS "
        "library cannot be probed. No sure way is known: `sudo halton-meter run --via keylog` "
        "meters it if it writes its TLS keys, `halton-meter run --via proxy` if it follows proxy "
        "settings, else its own proxy setting may, with the proxy of halton-meter init"
    )


def test_what_is_not_known_is_not_in_the_ratio() -> None:
    lines = coverage_lines(made((CURL, 1, None), (PROXIED, 2, 5), (UNNAMED, 1, 5)))
    assert lines == [
        "coverage: 1 of 1 connection to providers was metered",
        "  through a proxy on this machine: app to api.openai.com, 2 connections",
        "  not metered: app to an unknown host, 1 connection: it named no server (SNI). "
        "Have it connect by the host's name, not by an address.",
    ]


def test_nothing_seen_is_said_and_so_is_a_kernel_that_shows_nothing() -> None:
    assert coverage_lines(None) == []
    assert coverage_lines(Coverage()) == []
    assert coverage_lines(Coverage(is_known=True)) == [
        "coverage: no connection to a provider carried a request"
    ]
    assert coverage_lines(Coverage(is_known=True), requests=1) == []
    unnamed = made((Part("/usr/bin/curl", None, None, None), 1, 9))
    assert coverage_lines(unnamed, requests=1) == []
    assert coverage_lines(unnamed) == ["coverage: no connection to a provider carried a request"]
    (line,) = coverage_lines(Coverage(is_known=False))
    assert line.startswith("coverage: unknown, this kernel does not show")


@pytest.mark.parametrize("cause", list(CAUSES)[:10])
def test_every_cause_has_words(cause: str) -> None:
    (_, line) = coverage_lines(made((Part("/bin/x", "api.openai.com", None, cause), 1, 1)))
    assert ". " in line
    assert "_" not in line


def test_a_table_by_program_host_and_stack() -> None:
    assert coverage_table(made((CURL, 1, 100), (WGET, 1, 50))).splitlines()[:3] == [
        "PROGRAM  HOST            TLS STACK  SEEN  METERED      %  BYTES  METERED BYTES",
        "curl     api.openai.com  OpenSSL       1        1  100.0    100            100",
        "wget     api.openai.com  GnuTLS        1        0    0.0     50              0",
    ]


def test_what_stands_beside_the_ratio_has_its_number_in_the_table() -> None:
    (_, row, *_) = coverage_table(made((PROXIED, 3, 50))).splitlines()
    assert row.split() == ["app", "api.openai.com", "-", "3", "-", "-", "50", "-"]


@pytest.mark.parametrize(
    ("metered", "seen", "text"),
    [(2, 3, "66.7 %"), (1999, 2000, "99.9 %"), (1, 3000, "0.1 %"), (0, 3, "0.0 %")],
)
def test_a_ratio_is_rounded_to_the_nearest_but_never_to_all_or_none(
    metered: int, seen: int, text: str
) -> None:
    assert percent(Fraction(metered, seen)) == text


def test_a_table_of_nothing_says_what_to_do_next() -> None:
    assert coverage_table(Coverage()).endswith("sudo halton-meter start")
    assert coverage_table(Coverage(), is_all=False).endswith("halton-meter report --coverage")
    assert "not for a model" in coverage_table(None)


def test_parts_are_bounded() -> None:
    found = Coverage()
    for number in range(PARTS_MAX + 5):
        found.add(Part(f"/bin/{number}", "api.openai.com", "OpenSSL", None), 1, 1)
    assert len(found.parts) == PARTS_MAX + 1
    assert found.parts[Part(OTHERS, OTHERS, None, None)] == Count(5, 5)
    assert found.seen.connections == PARTS_MAX + 5


def test_json_there_and_back() -> None:
    found = made((CURL, 1, 100), (WGET, 1, None), (UNNAMED, 1, 5))
    assert Coverage.of_json(found.as_json()) == found


@pytest.mark.parametrize(
    "hostile",
    [
        None,
        [],
        {},
        {"known": True, "parts": 5},
        {"known": True, "parts": [{}]},
        {"known": 1, "parts": [["program"]]},
    ],
)
def test_what_is_no_coverage_is_refused_by_name(hostile: Any) -> None:
    with pytest.raises(ValueError, match="not a coverage"):
        Coverage.of_json(hostile)


def test_texts_of_others_are_printable() -> None:
    row = {"program": "/bin/\x1b[31mx", "host": "h", "stack": None, "cause": None}
    table = {"known": True, "parts": [{**row, "connections": 1, "bytes": 1}]}
    (part,) = Coverage.of_json(table).parts
    assert "\x1b" not in (part.program or "")


def test_a_loss_that_a_line_names_is_not_told_twice() -> None:
    losses = {"http2_without_name": 1, "ring_full": 2}
    assert losses_beside(losses, made((UNNAMED, 1, 5))) == {"ring_full": 2}
    assert losses_beside(losses, made((WGET, 1, 5))) == losses
    assert losses_beside(losses, None) == losses


def test_what_came_before_the_probes_is_told_where_nobody_counts_connections() -> None:
    losses = {"processes_ahead_of_probes": 1}
    assert losses_beside(losses, made((CURL, 3, 900))) == {}
    assert losses_beside(losses, Coverage(is_known=False)) == losses
    assert losses_beside(losses, None) == losses


def test_what_a_proxy_has_is_one_line_whatever_the_stack() -> None:
    stacks = (Part("/usr/bin/app", "api.openai.com", n, PROXIED.cause) for n in ("a", "b"))
    found = made(*((each, 2, 5) for each in stacks), (CURL, 1, 5))
    assert coverage_lines(found)[1:] == [
        "  through a proxy on this machine: app to api.openai.com, 4 connections"
    ]
