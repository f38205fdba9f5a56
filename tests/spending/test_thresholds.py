"""Thresholds: each acts once a period, also across restarts; what fails is told and tried again."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from halton_meter.budget import Budget
from halton_meter.live import acting
from halton_meter.live.guard import Guard
from halton_meter.live.stopping import identity
from halton_meter.spending import firing, ledger, standing, stops
from halton_meter.spending.firing import DONE, FAILED, PENDING, SKIPPED, Deed
from halton_meter.spending.sums import Amount
from halton_meter.spending.windows import window
from tests.support.made import made
from tests.support.waiting import wait_until

NOW_NS = 1_773_144_000 * 10**9
BUDGET = Budget("daily", Decimal(10), "day", command="true")


def passed(usd: str, known: Any = (), budget: Budget = BUDGET) -> list[int]:
    found = firing.news(budget, window("day", NOW_NS), "", Amount(Decimal(usd), 3), known, NOW_NS)
    return [each.threshold for each in found]


@pytest.mark.parametrize(
    ("usd", "thresholds"),
    [("4.99", []), ("5", [50]), ("9.50", [50, 80, 95]), ("10", [50, 80, 95, 100])],
)
def test_a_threshold_is_passed_when_it_is_reached(usd: str, thresholds: list[int]) -> None:
    assert passed(usd) == thresholds


def test_each_is_news_once_a_period_and_limit() -> None:
    known = {("daily", "10", "2026-03-10", "", 50)}
    assert passed("8", known) == [80]
    assert passed("8", {("daily", "10", "2026-03-09", "", 50)}) == [50, 80]  # yesterday's
    assert passed("8", known, Budget("daily", Decimal(16), "day")) == [50]  # another limit


def test_of_several_at_once_the_desktop_hears_the_last() -> None:
    found = firing.news(BUDGET, window("day", NOW_NS), "", Amount(Decimal(10), 3), (), NOW_NS)
    assert [each.deeds["notify"].state for each in found] == [SKIPPED, SKIPPED, SKIPPED, PENDING]
    assert {each.deeds["command"].state for each in found} == {PENDING}


def test_a_deed_is_tried_three_times() -> None:
    deed = Deed(tries=1)
    deed.failed("why", NOW_NS)
    assert (deed.state, deed.next_at_ns) == (PENDING, NOW_NS + 30 * 10**9)
    deed.tries = 2
    deed.failed("why", NOW_NS)
    assert (deed.state, deed.next_at_ns) == (PENDING, NOW_NS + 300 * 10**9)
    deed.tries = 3
    deed.failed("again", NOW_NS)
    assert (deed.state, deed.error) == (FAILED, "again")


@pytest.mark.parametrize("content", [b"", b"not json", b'{"fired": [5, {"budget": "x"}]}'])
def test_a_file_of_thresholds_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / firing.FILE_NAME).write_bytes(content)
    assert firing.read(tmp_path) == []


# --- acting -------------------------------------------------------------------------------------


def configure(home: Path, *lines: str) -> None:
    text = "\n".join(("[budgets.daily]", "usd = 10", 'per = "day"', *lines))
    (home / "config.toml").write_text(text + "\n")


def fire(home: Path, usd: str = "8.125", **deeds: Deed) -> None:
    folder = ledger.folder_of(home)
    facts = firing.facts_of(BUDGET, window("day", NOW_NS), "", Amount(Decimal(usd), 3, 1))
    told = facts | {"threshold": 80}
    fired = firing.Fired("daily", "10", "2026-03-10", "", 80, NOW_NS, told, deeds)
    with ledger.locked(folder):
        firing.write(folder, [fired], NOW_NS)


def act(home: Path) -> int:
    """Do what is due at the time of these tests."""
    return acting.act(home, lambda: NOW_NS)


def deeds(home: Path) -> dict[str, Deed]:
    (fired,) = firing.read(home / "budgets")
    return fired.deeds


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    return tmp_path


def test_a_command_gets_the_facts_in_its_environment(home: Path) -> None:
    out = home / "out"
    configure(home, f'command = "env | grep ^HALTON_BUDGET_ | sort > {out}"')
    fire(home, command=Deed())
    assert act(home) == 1
    assert out.read_text().splitlines() == [
        "HALTON_BUDGET_AT_LEAST=1",
        "HALTON_BUDGET_EACH=",
        "HALTON_BUDGET_FROM=2026-03-10T00:00:00.000000Z",
        "HALTON_BUDGET_LIMIT_USD=10",
        "HALTON_BUDGET_NAME=daily",
        "HALTON_BUDGET_OF=",
        "HALTON_BUDGET_PERCENT=81.2",
        "HALTON_BUDGET_PERIOD=day",
        "HALTON_BUDGET_REQUESTS=3",
        "HALTON_BUDGET_SCOPE=",
        "HALTON_BUDGET_SPENT_USD=8.125",
        "HALTON_BUDGET_THRESHOLD=80",
        "HALTON_BUDGET_TO=2026-03-11T00:00:00.000000Z",
        "HALTON_BUDGET_UNPRICED_REQUESTS=1",
    ]
    assert deeds(home)["command"] == Deed(DONE, 1)
    assert act(home) == 0  # once


def test_a_list_is_run_as_it_is(home: Path) -> None:
    out = home / "$HOME; touch x"
    configure(home, f'command = ["touch", {json.dumps(str(out))}]')
    fire(home, command=Deed())
    act(home)
    assert out.exists()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ('"exit 7"', "sh ended with code 7"),
        ('"kill -9 $$"', "sh was killed by signal 9"),
        ('["/no/such/alarm"]', "alarm: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_told_and_tried_again(home: Path, command: str, why: str) -> None:
    configure(home, f"command = {command}")
    fire(home, command=Deed())
    for tries, wait_s in ((1, 30), (2, 300)):
        now_ns = NOW_NS + tries * 10**12
        assert acting.act(home, lambda now_ns=now_ns: now_ns) == 1
        assert deeds(home)["command"] == Deed(PENDING, tries, now_ns + wait_s * 10**9, why)
    acting.act(home, lambda: NOW_NS + 10**13)
    assert deeds(home)["command"].state == FAILED
    assert acting.act(home, lambda: NOW_NS + 10**14) == 0


def test_a_command_that_does_not_end_is_killed_with_what_it_started(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acting, "COMMAND_S_MAX", 0.3)
    mark = home / "pid"
    configure(home, f'command = "sleep 1000 & echo $! > {mark}; wait"')
    fire(home, command=Deed())
    act(home)
    assert "took longer than 0.3 s" in (deeds(home)["command"].error or "")
    pid = int(mark.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "its child's end")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_who_died_while_acting_is_not_followed_by_a_second_time(home: Path) -> None:
    configure(home, 'command = "true"')
    fire(home, command=Deed("begun", 1))
    acting.give_up_begun(home / "budgets", NOW_NS)
    assert deeds(home)["command"] == Deed(FAILED, 1, 0, "it ended before it said how it went")
    assert act(home) == 0


def test_a_budget_that_was_removed_does_nothing_any_more(home: Path) -> None:
    fire(home, command=Deed(), webhook=Deed())
    act(home)
    assert {each.error for each in deeds(home).values()} == {"the budget was removed"}


def test_root_runs_no_users_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(home, f'command = "touch {home}/ran"')
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
    else:
        os.chown(home, 12345, 12345)
    fire(home, command=Deed())
    act(home)
    if home.stat().st_uid != 0:
        assert deeds(home)["command"].error == "it would run as root"
        assert not (home / "ran").exists()


class Hook(http.server.BaseHTTPRequestHandler):
    """Takes what is sent; answers with `status`."""

    status = 200
    heard: list[tuple[str, dict[str, Any], dict[str, str]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).heard.append((self.path, json.loads(body), dict(self.headers)))
        self.send_response(type(self).status)
        self.send_header("location", "http://192.0.2.1/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], int]]:
    handler = type("Own", (Hook,), {"heard": [], "status": 200})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_facts_as_json_and_nothing_else(
    home: Path, hook: tuple[type[Hook], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, port = hook
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # a host that the user has not named
    configure(home, f'webhook = "http://127.0.0.1:{port}/spent?key=1"')
    fire(home, webhook=Deed())
    act(home)
    assert deeds(home)["webhook"] == Deed(DONE, 1)
    ((path, body, headers),) = handler.heard
    assert path == "/spent?key=1"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "event": "budget_threshold", "budget": "daily", "limit_usd": "10", "spent_usd": "8.125",
        "at_least": True, "percent": "81.2", "per": "day", "from": "2026-03-10T00:00:00.000000Z",
        "to": "2026-03-11T00:00:00.000000Z", "scope": {}, "each": None, "of": None, "requests": 3,
        "unpriced_requests": 1, "counts": "list", "threshold": 80,
    }  # fmt: skip


@pytest.mark.parametrize(("status", "state"), [(500, PENDING), (404, PENDING), (302, FAILED)])
def test_a_webhook_that_fails(
    home: Path, hook: tuple[type[Hook], int], status: int, state: str
) -> None:
    handler, port = hook
    handler.status = status
    configure(home, f'webhook = "http://127.0.0.1:{port}/SECRET"')
    fire(home, webhook=Deed())
    act(home)
    found = deeds(home)["webhook"]
    assert (found.state, found.error) == (state, f"http://127.0.0.1:{port} answered {status}")
    assert len(handler.heard) == 1  # no redirect is followed


def test_a_webhook_that_nobody_hears(home: Path) -> None:
    configure(home, 'webhook = "http://127.0.0.1:9/SECRET"')
    fire(home, webhook=Deed())
    act(home)
    assert deeds(home)["webhook"].error == "http://127.0.0.1:9: Connection refused"


def test_a_desktop_is_told_in_one_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = home / "told"
    tool = home / "bin" / "notify-send"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {told}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    configure(home)
    fire(home, notify=Deed())
    act(home)
    assert told.read_text().splitlines() == [
        "--app-name=Halton Meter",
        "--urgency=normal",
        "--",
        "Halton Meter",
        "daily: at least 81.2 % of $10 a day spent ($8.12)",
    ]


def test_a_sentence_says_whose_the_sum_is() -> None:
    facts = {"budget": "every", "percent": "80", "limit_usd": "10", "per": "day", "spent_usd": "8"}
    rest = ": 80 % of $10 a day spent ($8.00)"
    assert (
        acting.sentence({**facts, "each": "project", "of": "web"}) == f"every of project web{rest}"
    )
    nobody = acting.sentence({**facts, "each": "account", "of": None})
    assert nobody == f"every of requests without an account{rest}"


def test_without_a_desktop_that_is_said_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    configure(home)
    fire(home, notify=Deed())
    act(home)
    found = deeds(home)["notify"]
    assert (found.state, found.tries) == (FAILED, 1)
    assert "notify-send is not installed" in (found.error or "")


# --- the guard ----------------------------------------------------------------------------------


def guard_of(home: Path, *lines: str) -> Guard:
    configure(home, *lines)
    found = Guard(home, identity(os.getpid()), lambda: refresh(home))
    found.look()
    return found


def refresh(home: Path) -> None:
    from halton_meter.settings import config

    standing.refresh(home, config.read(home).config.budgets, time.time_ns())


def now_event(number: int, usd: str | None) -> Any:
    return made(f"e{number}", usd, at_ns=time.time_ns())


def test_thresholds_fire_once_also_for_who_meters_after_us(home: Path) -> None:
    out = home / "out"
    line = f'command = "echo $HALTON_BUDGET_THRESHOLD >> {out}"'
    one = guard_of(home, line)
    for number, usd in enumerate(("4", "4.5", "1")):
        one.keep([now_event(number, usd)])
    acting.act(home)
    assert out.read_text().split() == ["50", "80", "95"]
    other = guard_of(home, line)  # after a restart
    other.keep([now_event(10, "0.10")])
    one.keep([now_event(11, "0.50")])
    acting.act(home)
    assert out.read_text().split() == ["50", "80", "95", "100"]
    one.close(let_go=True)
    other.close(let_go=True)


def test_the_guard_has_the_actions_carried_out_by_another_process(home: Path) -> None:
    out = home / "out"
    found = guard_of(home, f'command = "touch {out}"')
    found.keep([now_event(1, "6")])
    wait_until(lambda: found.tick(time.monotonic()) or out.exists(), "the command")
    found.close(let_go=True)


def test_what_is_due_at_the_end_is_done_though_nobody_meters_any_more(home: Path) -> None:
    """A `run` ends within milliseconds of the answer that passed a threshold."""
    out = home / "out"
    found = guard_of(home, f'command = "echo $HALTON_BUDGET_THRESHOLD >> {out}"')
    found.keep([now_event(1, "9")])
    found.close(let_go=True)
    wait_until(lambda: out.exists() and out.read_text().split() == ["50", "80"], "the command")


def test_what_is_to_be_tried_again_later_is_not_done_at_the_end(home: Path) -> None:
    out = home / "out"
    found = guard_of(home, f'command = "touch {out}"')
    fire(home, command=Deed(tries=1, next_at_ns=time.time_ns() + 30 * 10**9))
    found.look(time.monotonic() + 10)
    found.close(let_go=True)
    assert deeds(home)["command"].state == PENDING
    assert not out.exists()


def test_a_budget_that_is_set_while_metering_counts(home: Path) -> None:
    found = Guard(home, identity(os.getpid()), lambda: refresh(home))
    found.look()
    assert not found.holds
    configure(home, 'action = "stop"')
    found.tick(time.monotonic() + 3)
    assert found.holds
    found.keep([now_event(1, "11")])
    found.close(let_go=True)


def test_who_is_over_a_budget_that_holds(home: Path) -> None:
    found = guard_of(home, 'action = "stop"', 'project = "web"')
    (web,) = found.keep([now_event(1, "9.99")])
    assert found.over(web) is None
    found.keep([now_event(2, "0.02")])
    over = found.over(web)
    assert over is not None
    assert over.text == "budget daily has spent $10.01 of its limit of $10.00 a day"
    (other,) = found.keep([made("e3", "1", at_ns=time.time_ns(), project="api")])
    assert found.over(other) is None
    # `budget resume` allows more, for this period.
    folder = home / "budgets"
    with ledger.locked(folder):
        stops.write(folder, stops.read(folder).allowing(over.key, Decimal("0.50")))
    assert found.over(web) is None
    found.keep([now_event(4, "0.49")])
    assert found.over(web) is not None
    found.close(let_go=True)


def test_nothing_holds_before_the_sums_are_known(home: Path) -> None:
    """Of a budget that the database was not asked about yet."""
    configure(home, 'action = "stop"')
    found = Guard(home, identity(os.getpid()), lambda: None)
    (web,) = found.keep([now_event(1, "11")])
    assert found.is_unknown
    assert found.over(web) is None
    refresh(home)
    found.keep([now_event(2, "0")])
    assert found.over(web) is not None
    found.close(let_go=True)


def test_at_least_what_is_known_is_said(home: Path) -> None:
    found = guard_of(home, 'action = "end"')
    (web, _) = found.keep([now_event(1, "10"), now_event(2, None)])
    over = found.over(web)
    assert over is not None
    assert over.text == "budget daily has spent at least $10.00 of its limit of $10.00 a day"
    assert over.holds == "end"
    found.close(let_go=True)
