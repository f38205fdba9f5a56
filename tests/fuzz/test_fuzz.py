"""A short run of every fuzzer, and of what runs them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz import attack
from tests.fuzz.__main__ import BORDERS, keep, run

# As many as a second or two of CPU takes; `make fuzz` goes on for minutes, from other seeds.
CASES = {
    "captures": 200,
    "wire": 50,
    "readers": 400,
    "programs": 300,
    "segments": 30,
    "frames": 200,
    "live": 100,
}


def test_every_border_has_a_short_run() -> None:
    assert set(CASES) == set(BORDERS)


@pytest.mark.parametrize("border", BORDERS)
def test_a_short_run_finds_nothing(border: str) -> None:
    findings = run(border, seed=10, cases=CASES[border])
    assert findings.tried == CASES[border]
    assert findings.faults == [], "\n".join(f"{f.command}\n{f.what}" for f in findings.faults)


def _falls_over_sevens(dice: random.Random) -> None:
    if dice.randrange(10) == 7:
        raise KeyError("seven")


def test_a_fault_is_found_kept_and_can_be_repeated(tmp_path: Path) -> None:
    findings = attack.attack("made-up", _falls_over_sevens, 3, cases=60)
    assert findings.tried == 60
    assert 1 <= len(findings.faults) < 20
    fault = findings.faults[0]
    again = attack.attack("made-up", _falls_over_sevens, 3, only=fault.number)
    assert again.tried == 1
    assert again.faults == [fault]
    kept = keep(fault, tmp_path).read_text()
    assert f"python -m tests.fuzz made-up --seed 3 --case {fault.number}\n" in kept
    assert "KeyError: 'seven'" in kept


def test_another_seed_makes_other_cases() -> None:
    seen: list[int] = []
    for seed in (1, 1, 2):
        attack.attack("made-up", lambda dice: seen.append(dice.getrandbits(64)), seed, cases=5)
    assert seen[:5] == seen[5:10]
    assert not set(seen[:5]) & set(seen[10:])


def test_a_case_without_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "CASE_SECONDS_MAX", 0.2)

    def spin(_: random.Random) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    (fault,) = attack.attack("made-up", spin, 1, cases=1).faults
    assert "TooLong" in fault.what


def test_a_case_that_takes_all_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "MEMORY_BYTES_MAX", 8 << 20)
    monkeypatch.setattr(attack, "_peak_bytes", iter((100 << 20, 101 << 20, 200 << 20)).__next__)
    findings = attack.attack("made-up", lambda _: None, 1, cases=9)
    assert [fault.number for fault in findings.faults] == [1]
    assert "memory grew by more than 8 MB" in findings.faults[0].what
