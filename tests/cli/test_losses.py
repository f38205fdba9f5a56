"""Capture losses in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from capture.protocol import EVENT_LOSS_CAUSES, LOSS_CAUSES
from halton_meter.cli import main
from halton_meter.cli.losses import loss_lines, losses_in_words
from halton_meter.store import Store
from tests.support.made import NOON_NS, made


def test_a_loss_is_a_count_and_its_fix() -> None:
    assert losses_in_words({"tcp_bytes_missing": 3975, "bodies_over_budget": 2}) == [
        ("3,975 TCP bytes missing", "record with a larger buffer: tcpdump -B 65536"),
        ("2 bodies read in part: memory limit", ""),
    ]
    assert losses_in_words({"ip_fragments": 1})[0][0] == "1 IP fragment not reassembled"


def test_a_fault_of_ours_is_said_with_its_error() -> None:
    assert losses_in_words({"tls_records_unreadable_RuntimeError": 2, "holes": 1}) == [
        ("2 parts of TLS connections not read: a fault of Halton Meter (RuntimeError)", "")
    ]
    assert losses_in_words({"exchange_unreadable_KeyError": 1}) == [
        ("1 request not read: a fault of Halton Meter (KeyError)", "")
    ]


@pytest.mark.parametrize(
    "cause", [*LOSS_CAUSES, *EVENT_LOSS_CAUSES, "lost_between_readers_bytes", "decoded_over_limit"]
)
def test_what_the_capture_loses_is_said_in_words(cause: str) -> None:
    assert losses_in_words({cause: 1})


def test_counters_that_say_nothing_to_people_are_left_out() -> None:
    assert losses_in_words({"holes": 5, "http1_resync": 3, "hpack_lost": 2, "not_http": 0}) == []


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ({"tcp_bytes_missing": 3975, "holes": 5}, "3,975 TCP bytes missing"),
        ({"holes": 5}, "internal counters only"),
    ],
)
def test_a_report_names_losses_in_words_and_has_every_counter_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: dict[str, int], named: str
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    with Store(tmp_path) as store:
        store.append([made()])
        for cause, number in losses.items():
            store.count_loss(cause, number, NOON_NS)
        store.flush()
    text = CliRunner().invoke(main, ["report"]).stdout
    assert f"Capture losses: {named}. All: halton-meter report --json | jq" in text
    found = json.loads(CliRunner().invoke(main, ["report", "--json"]).stdout)
    assert found["coverage"]["losses"] == losses


def test_a_report_of_connections_past_the_proxy_speaks_of_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    with Store(tmp_path) as store:
        store.append([made()])
        store.count_loss("unmetered_stopped", 2, NOON_NS)
        store.flush()
    assert "Capture losses" not in CliRunner().invoke(main, ["report"]).stdout


def test_losses_stand_in_words_with_their_names_and_fixes() -> None:
    losses = {"ring_full_bytes": 1, "processes_ahead_of_probes": 2, "hpack_lost": 3, "none": 0}
    assert loss_lines(losses) == [
        "  1 byte lost: the capture buffer was full (ring_full_bytes)",
        "  2 programs started before probes: first requests may be missing "
        "(processes_ahead_of_probes); restart it",
        "  other counters: hpack_lost 3",
    ]
