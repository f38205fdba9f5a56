"""`tail`: one line a request as it ends, each once, whatever flushes meanwhile."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.contract import event_json
from halton_meter.live.flushing import Flusher
from halton_meter.model import Certainty, Outcome, Tokens, Usage
from halton_meter.store import Store
from tests.cli.test_terminal import HOSTILE, assert_harmless
from tests.support.made import ASKED, made
from tests.support.stand_in import running
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    with Store(home) as opened:
        yield opened


def tail(*options: str) -> Result:
    return CliRunner().invoke(main, ["tail", *options])


def now(**fields: Any) -> dict[str, Any]:
    return {"at_ns": time.time_ns() - 10**9, "duration_ms": 1000.0} | fields


# --- the latest ---


@pytest.mark.parametrize(
    ("usd", "said"),
    [
        ("0.004386", "$0.0044"),
        ("0.00000004", "<$0.0001"),
        ("99.99994", "$99.9999"),
        ("123.456", "$123.46"),
        ("12345.6", "$12,346"),
        (None, "unpriced"),
    ],
)
def test_a_price_is_rounded_and_never_cut_off_where_the_terminal_is_narrow(
    store: Store, monkeypatch: pytest.MonkeyPatch, usd: str | None, said: str
) -> None:
    module = importlib.import_module("halton_meter.cli.tail")
    monkeypatch.setattr(module, "columns", lambda: 80)
    told: list[str] = []
    monkeypatch.setattr(click, "echo", told.append)
    module._Lines(to_terminal=True)([made("e1", usd, **now())])
    assert re.search(rf" {re.escape(said)} ok", told[-1]), told[-1]


@pytest.mark.parametrize(
    ("cells", "heading"),
    [
        (79, "TIME CLIENT PROJECT MODEL IN CACHED OUT PRICE STATUS"),
        (72, "TIME CLIENT PROJECT MODEL IN OUT PRICE STATUS"),
        (60, "TIME PROJECT MODEL OUT PRICE STATUS"),
        (41, "TIME MODEL PRICE STATUS"),
        (24, "TIME PRICE STATUS"),
    ],
)
def test_in_a_narrow_terminal_less_telling_columns_go_and_the_price_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch, cells: int, heading: str
) -> None:
    module = importlib.import_module("halton_meter.cli.tail")
    monkeypatch.setattr(module, "columns", lambda: cells)
    told: list[str] = []
    monkeypatch.setattr(click, "echo", told.append)
    module._Lines(to_terminal=True)([made("e1", "0.25", **now())])
    assert told[0].split() == heading.split()
    assert told[-1].endswith("  $0.2500 ok")
    assert all(len(line) <= cells for line in told)


def test_a_line_says_who_asked_which_model_for_what_and_how_it_ended(store: Store) -> None:
    tokens = Tokens(input=1200, cache_read=48_210, output=512)
    at = datetime.now().replace(hour=9, minute=30, second=5, microsecond=0)
    at_ns = int(at.timestamp()) * 10**9
    store.append(
        [
            made(
                "a",
                "0.0412",
                at_ns=at_ns,
                duration_ms=2000.0,
                parts=(Usage("claude-opus-5-5", tokens),),
                caller=replace(ASKED, client="claude-cli"),
            ),
            made(
                "b",
                None,
                at_ns=at_ns + 10**9,
                duration_ms=60_000.0,
                error_class="rate_limit",
                http_status=429,
                project=None,
                certainty=Certainty.ESTIMATED,
                flags=("estimated",),
            ),
            made("c", "0.000015", at_ns=at_ns + 10**9, duration_ms=0.0, outcome=Outcome.ABORTED),
        ]
    )
    found = [line.split() for line in tail().stdout.splitlines()]
    assert found[-3:] == [
        "09:30:06 claude web claude-opus-5-5 100 - 20 $0.000015 interrupted".split(),
        "09:30:07 claude-cli web claude-opus-5-5 1,200 48.21k 512 $0.0412 ok".split(),
        "09:31:06 claude - claude-opus-5-5 100 - 20 unpriced 429 rate_limit estimated".split(),
    ]
    heading = "TIME CLIENT PROJECT MODEL IN CACHED OUT LIST PRICE STATUS"
    assert " ".join(found[0]) == heading


def test_a_date_stands_before_what_did_not_end_today(store: Store) -> None:
    store.append([made("old"), made("new", **now())])
    lines = tail().stdout.splitlines()
    assert [line.split()[0] for line in lines[1:2]] == ["2026-03-10"]
    assert lines[2].startswith("12:00:02 ")
    assert lines[3] == f"{datetime.now():%Y-%m-%d}"


def test_json_gives_the_contracts_objects(store: Store) -> None:
    events = [made("a", **now()), made("b", None, **now(caller=ASKED))]
    store.append(events[:1])
    store.flush()
    store.append(events[1:])
    found = [json.loads(line) for line in tail("--json").stdout.splitlines()]
    assert found == [json.loads(json.dumps(event_json(event))) for event in events]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("-n 2", "cd"),
        ("-n 0", ""),
        ("-n 1 --project other", "b"),
        ("--client claude-cli", "d"),
        ("--model m", "c"),
        ("--since 2026-01-01 --to 2026-04-01", "a"),
    ],
)
def test_which_and_how_many(store: Store, options: str, found: str) -> None:
    store.append(
        [
            made("a"),
            made("b", **now(project="other")),
            made("c", **now(model="m")),
            made("d", **now(caller=replace(ASKED, client="claude-cli"))),
        ]
    )
    lines = tail("--json", *options.split()).stdout.splitlines()
    assert "".join(json.loads(line)["id"] for line in lines) == found


def test_nothing_says_what_to_do(home: Path) -> None:
    assert "halton-meter run -- CMD" in tail().stdout
    assert tail("--json").stdout == ""
    with Store(home) as store:
        store.append([made("a")])
    done = tail("--project", "none")
    assert (done.exit_code, "All that are stored: halton-meter tail\n" in done.stdout) == (0, True)


def test_wrong_usage_is_said(home: Path) -> None:
    done = tail("-f", "--to", "today")
    assert (done.exit_code, "--to ends" in done.output) == (2, True)


def test_a_damaged_database_is_a_failure(store: Store) -> None:
    store.append([made("a")])
    store.flush()
    store.database_path.write_bytes(b"x" * 5000)
    done = tail()
    assert (done.exit_code, "damaged" in done.stderr) == (1, True)


def test_no_name_moves_the_cursor(store: Store) -> None:
    event = made("a", model=HOSTILE, project=HOSTILE, error_class=HOSTILE, flags=(HOSTILE,))
    store.append([event])
    assert_harmless(tail().output)
    assert_harmless(tail("--json").output)


# --- as they end ---


class Tail:
    """`halton-meter tail -f` in a process of its own."""

    def __init__(self, home: Path, *options: str) -> None:
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "halton_meter", "tail", "-f", *options],
            env={**os.environ, "HALTON_METER_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def lines(self) -> list[str]:
        """All lines so far."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            self._lines.append(line)
        return self._lines

    def ids(self) -> list[str]:
        return [json.loads(line)["id"] for line in self.lines()]

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.lines()) >= count, f"{count} lines")

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """End it; its exit code and what it said on stderr."""
        self.process.send_signal(number)
        code = self.process.wait(WAIT_SECONDS_MAX)
        assert self.process.stderr is not None
        said = self.process.stderr.read()
        self.lines()
        return code, said


@pytest.fixture
def started(home: Path) -> Iterator[list[Tail]]:
    found: list[Tail] = []
    yield found
    for each in found:
        each.process.kill()
        each.process.wait()


@pytest.mark.slow
def test_each_comes_once_while_others_write_flush_and_report(
    store: Store, home: Path, started: list[Tail]
) -> None:
    store.append([made("e0", **now())])
    looking = Tail(home, "--json")
    started.append(looking)
    looking.wait_for(1)
    run, written = Store(home), ["e0"]
    for number in range(1, 41):
        name = f"e{number}"
        (run if number % 3 else store).append([made(name, **now())])
        written.append(name)
        if number % 8 == 0:
            run.close()
            store.close()
            outcome = Flusher(home).wait()  # whoever looks may have the database at the moment
            assert outcome.busy or outcome.reason is None
        if number % 10 == 0:
            CliRunner().invoke(main, ["report", "--json"])
    run.close()
    looking.wait_for(len(written))
    assert Flusher(home).wait().reason is None
    with store.reading() as reader:
        assert len(list(reader.events())) == len(written)
    last = made("last", **now())
    store.append([last])
    wait_until(lambda: "last" in looking.ids(), "the last")
    code, said = looking.end()
    assert sorted(looking.ids()) == sorted([*written, "last"])
    assert code == 0
    assert "Traceback" not in said
    assert "Aborted" not in said


def test_it_says_that_nothing_is_metered_and_waits(home: Path, started: list[Tail]) -> None:
    looking = Tail(home)
    started.append(looking)
    assert looking.process.stderr is not None
    said = looking.process.stderr.readline()
    assert "nothing is metered now; waiting" in said
    assert "sudo halton-meter start" in said
    with Store(home) as store:
        store.append([made("a", **now())])
    looking.wait_for(2)
    assert looking.lines()[1].split()[1:3] == ["claude", "web"]


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(
    store: Store, home: Path, started: list[Tail]
) -> None:
    store.append([made("a", **now())])
    for also in (False, True):  # while nothing comes, and when something does
        looking = Tail(home, "--json")
        started.append(looking)
        looking.wait_for(1)
        assert looking.process.stdout is not None
        looking.process.stdout.close()
        if also:
            store.append([made("b", **now())])
        assert looking.process.wait(WAIT_SECONDS_MAX) == 0
        assert looking.process.stderr is not None
        assert "Traceback" not in looking.process.stderr.read()


def test_it_follows_a_service_across_its_flush(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: list[Tail]
) -> None:
    home.mkdir()
    with running(home, monkeypatch) as service:
        service.wait_for(lambda status: status, "its status")
        first = service.exchange(3)
        looking = Tail(home, "--json")
        started.append(looking)
        looking.wait_for(3)
        service.flush()
        second = service.exchange(2)
        looking.wait_for(5)
        service.flush()
        code, said = looking.end()
        assert (code, said) == (0, "")  # something is metering: there is nothing to say
        found = [json.loads(line)["response_id"] for line in looking.lines()]
        assert sorted(found) == sorted([*first, *second])


def test_it_imports_nothing_heavy(home: Path) -> None:
    """Start-up under 0.15 s is a promise: `python -m bench startup` measures it."""
    code = (
        "import sys; from halton_meter.cli import main; main(['tail'], standalone_mode=False); "
        "heavy = {'rich', 'textual', 'mitmproxy', 'duckdb', 'asyncio', 'cryptography'}; "
        "heavy.add('tempfile'); "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
