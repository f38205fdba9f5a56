"""Every capture in fixtures/pcaps gives exactly the events declared beside it."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from capture.pcap import PcapSource
from halton_meter.contract import event_json
from halton_meter.meter import Meter
from pricing.book import PriceBook
from tests.support.quick import every

FOLDER = Path(__file__).parents[1] / "fixtures" / "pcaps"
CAPTURES = sorted(FOLDER.glob("*.pcapng"))
BYTES_MAX = 100_000


@cache
def _book() -> PriceBook:
    return PriceBook.load(Path("/nonexistent"))


def events_of(path: Path) -> list[dict[str, Any]]:
    """What the pipeline makes of one capture, in the contract's JSON."""
    meter = Meter(_book().price)
    source = PcapSource([path])
    priced = [event for item in source.items() for event in meter.receive(item)]
    priced += meter.finish(source.findings.last_ns)
    assert not source.findings.errors
    return [event_json(event) for event in priced]


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> dict[str, Any]:
    """The declared fields in which an event differs, as (declared, actual)."""
    found = {}
    for name, declared in expected.items():
        value = declared
        if name == "tokens":
            mine = {key: count for key, count in actual["tokens"].items() if count is not None}
        elif name == "tokens_include":
            mine = {key: actual["tokens"][key] for key in value}
        elif name == "flags_include":
            mine, value = sorted(set(value) & set(actual["flags"])), sorted(value)
        else:
            mine = actual[name]
        if mine != value:
            found[name] = (value, mine)
    return found


@pytest.mark.parametrize("path", every(2, zip(CAPTURES)), ids=lambda path: path.stem)
def test_a_capture_gives_its_declared_events(path: Path) -> None:
    expected = [
        json.loads(line) for line in path.with_suffix(".expected.jsonl").read_text().splitlines()
    ]
    actual = events_of(path)
    wrong = [
        difference
        for one, other in zip(expected, actual, strict=False)
        if (difference := differences(one, other))
    ]
    assert wrong == []
    assert len(actual) == len(expected), [(e["provider"], e["endpoint"]) for e in actual]


def test_there_are_enough_scenarios_and_they_are_small() -> None:
    assert len(CAPTURES) >= 40
    assert {path.name: size for path in CAPTURES if (size := path.stat().st_size) > BYTES_MAX} == {}


def test_every_capture_has_a_declaration_and_the_reverse() -> None:
    names = defaultdict(set)
    for path in FOLDER.iterdir():
        names[path.name.split(".")[0]].add(path.name.split(".", 1)[1])
    assert {tuple(sorted(kinds)) for kinds in names.values()} == {("expected.jsonl", "pcapng")}


def test_no_capture_shows_a_credential_in_its_events() -> None:
    for path in CAPTURES[:6]:
        assert "sk-not-a-key" not in json.dumps(events_of(path))
