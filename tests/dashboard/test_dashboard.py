"""The local page: what it answers, to whom it does not, and that paging misses nothing."""

from __future__ import annotations

import csv
import http.client
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from halton_meter.cli.coverage import coverage_lines
from halton_meter.coverage import Coverage, Part
from halton_meter.dashboard.entrance import CODE_SECONDS, GUESSES_MAX, Entrance, is_ours
from halton_meter.dashboard.server import REQUESTS_A_PAGE, Dashboard
from halton_meter.store import Store
from tests.support.limits import plan_limits
from tests.support.made import HOUR_NS, NOON_NS, made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def page(store: Store) -> Iterator[Dashboard]:
    server = Dashboard(store, lambda: NOON_NS + HOUR_NS, 0, coverage_lines)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(
    page: Dashboard, path: str, *, cookie: bool = True, host: str | None = None
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=60)
    headers = {"Host": host or page.authority}
    if cookie:
        headers["Cookie"] = page.entrance.cookie().partition(";")[0]
        path = f"{page.entrance.folder}{path}"
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read().decode()


def keep(store: Store, count: int, step_ns: int = HOUR_NS // 3600) -> None:
    store.append([made(f"e{n:03}", at_ns=NOON_NS - n * step_ns) for n in range(count)])
    store.flush()


def code_of(page: Dashboard) -> str:
    """A fresh address without its host."""
    address = urlsplit(page.new_url())
    return f"{address.path}?{address.query}"


def test_the_address_opens_the_page_once_and_the_browser_s_own_holds_no_code(
    page: Dashboard,
) -> None:
    address = code_of(page)
    answer, _ = get(page, address, cookie=False)
    assert answer.status == 303
    assert answer.headers["Location"] == f"{page.entrance.folder}/"
    cookie, *rules = [part.strip() for part in answer.headers["Set-Cookie"].split(";")]
    # Not for every path: then every port of 127.0.0.1 would be sent it.
    assert set(rules) == {"HttpOnly", "SameSite=Strict", f"Path={page.entrance.folder}"}
    code = address.partition("=")[2]
    assert code not in answer.headers["Location"] + cookie + page.entrance.folder
    assert cookie.partition("=")[2] not in answer.headers["Location"]
    answer, body = get(page, "/")
    assert answer.status == 200
    assert "<title>Halton Meter</title>" in body

    for again in (address, address):
        answer, body = get(page, again, cookie=False)
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers
        assert "press Enter where `halton-meter dashboard` runs" in body
    assert get(page, code_of(page), cookie=False)[0].status == 303
    assert get(page, "/")[0].status == 200  # who is in stays in


def test_two_at_once_do_not_both_get_in(page: Dashboard) -> None:
    address = code_of(page)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: get(page, address, cookie=False)[0].status, range(8)))
    assert sorted(found) == [303] + [403] * 7


def test_a_code_is_withdrawn_by_time_by_the_next_and_by_guesses() -> None:
    now = 0.0
    entrance = Entrance(lambda: now)
    assert not entrance.spend("")
    late = entrance.new_code()
    now = CODE_SECONDS
    assert not entrance.spend(late)
    first, second = entrance.new_code(), entrance.new_code()
    assert not entrance.spend(first)
    assert entrance.spend(second)
    third = entrance.new_code()
    for _ in range(GUESSES_MAX - 1):
        assert not entrance.spend("guess")
    assert not entrance.spend("größe\ud800")
    assert not entrance.spend(third)
    assert entrance.spend(entrance.new_code())


def test_two_runs_share_nothing(store: Store) -> None:
    one, other = Entrance(), Entrance()
    assert one.folder != other.folder
    assert one.lets_in(one.cookie())
    assert not other.lets_in(one.cookie())
    assert not one.lets_in('halton_meter="; a b = c')


def test_a_code_is_not_taken_from_another_user_s_socket(tmp_path: Path) -> None:
    """Who reads it in a list of processes may be faster than the browser."""
    table = tmp_path / "net" / "tcp"
    table.parent.mkdir()
    line = (
        "   0: 0100007F:{:04X} 0100007F:{:04X} 01 00000000:00000000 00:00000000 00000000 {} 0 1 1"
    )
    for uid, ours in ((os.geteuid() + 1, False), (os.geteuid(), True), (0, True)):
        table.write_text("header\n" + line.format(4000, 5000, uid) + "\n")
        assert is_ours(4000, 5000, tmp_path) is ours
    assert is_ours(4001, 5000, tmp_path)  # not listed: nobody can tell


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_with_the_code_neither_gets_in_nor_spends_it(page: Dashboard) -> None:
    address = code_of(page)
    script = (
        "import encodings.idna, http.client, os, sys; os.setgid(65534); os.setuid(65534)\n"
        "asked = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]), timeout=60)\n"
        "asked.request('GET', sys.argv[2]); print(asked.getresponse().status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(page.server_port), address],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "403"
    assert get(page, address, cookie=False)[0].status == 303


@pytest.mark.parametrize(
    "path", ["/", "/api/report", "/api/plan", "/api/requests", "/requests.csv", "/?code=guess"]
)
def test_without_the_cookie_nothing_is_shown(page: Dashboard, store: Store, path: str) -> None:
    keep(store, 1)
    for asked in (path, f"{page.entrance.folder}{path}"):
        answer, body = get(page, asked, cookie=False)
        assert answer.status == 403
        assert "claude" not in body


def test_another_host_name_for_the_same_address_is_refused(page: Dashboard) -> None:
    answer, _ = get(page, "/", host=f"rebound.example.com:{page.server_port}")
    assert answer.status == 421


def test_it_listens_on_loopback_alone(page: Dashboard) -> None:
    assert page.socket.getsockname()[0] == "127.0.0.1"


def test_nothing_of_the_page_is_loaded_from_elsewhere(page: Dashboard) -> None:
    for path in ("/", "/dashboard.css", "/dashboard.js"):
        answer, body = get(page, path)
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert "http:" not in body
        assert "https:" not in body


def test_the_report_is_the_contract_s(page: Dashboard, store: Store) -> None:
    keep(store, 3)
    answer, body = get(page, "/api/report?by=project&period=today")
    report = json.loads(body)
    assert answer.status == 200
    assert [(group["key"], group["requests"]) for group in report["groups"]] == [("web", 3)]
    assert report["totals"]["list_usd"] == "0.75"


def test_the_plans_windows_are_those_of_the_command(page: Dashboard, store: Store) -> None:
    assert json.loads(get(page, "/api/plan")[1])["accounts"] == []
    limits = plan_limits(NOON_NS, "0.37", "0.40")
    store.append([made("e1", conditions={"plan": "claude"}, limits=limits)])
    store.flush()
    (account,) = json.loads(get(page, "/api/plan")[1])["accounts"]
    assert [(w["window"], w["used"]) for w in account["windows"]] == [("5h", "0.37"), ("7d", "0.4")]


def test_a_period_leaves_out_what_was_before(page: Dashboard, store: Store) -> None:
    store.append([made("new"), made("old", at_ns=NOON_NS - 8 * 24 * HOUR_NS)])
    store.flush()
    counts = {
        period: json.loads(get(page, f"/api/report?period={period}")[1])["totals"]["requests"]
        for period in ("today", "7d", "30d", "all")
    }
    assert counts == {"today": 1, "7d": 1, "30d": 2, "all": 2}


@pytest.mark.parametrize("step_ns", [0, 1, HOUR_NS // 3600], ids=["one instant", "ns", "seconds"])
def test_paging_shows_every_request_once_latest_first(
    page: Dashboard, store: Store, step_ns: int
) -> None:
    # At one instant, no more than a page and what may share an instant with its end.
    count = REQUESTS_A_PAGE + 50 if step_ns == 0 else 2 * REQUESTS_A_PAGE + 5
    keep(store, count, step_ns)
    seen: list[tuple[str, str]] = []
    path = "/api/requests?period=all"
    while True:
        found = json.loads(get(page, path)[1])
        seen += [(event["at"], event["id"]) for event in found["requests"]]
        if found["next"] is None:
            break
        path = f"/api/requests?period=all&before={found['next']}"
    assert len(set(seen)) == len(seen) == count
    assert seen == sorted(seen, reverse=True, key=lambda each: each[0])


def test_the_csv_has_every_request_and_no_formula(page: Dashboard, store: Store) -> None:
    store.append([made("e1", project="=cmd()"), made("e2", usd=None)])
    store.flush()
    answer, body = get(page, "/requests.csv?period=all")
    rows = {row["id"]: row for row in csv.DictReader(io.StringIO(body))}
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert rows["e1"]["project"] == "'=cmd()"
    assert rows["e1"]["list_usd"] == "0.25"
    assert rows["e2"]["list_usd"] == ""


@pytest.mark.parametrize(
    "path", ["/api/report?by=colour", "/api/report?period=1y", "/api/requests?before=x"]
)
def test_a_question_that_does_not_exist_is_named(page: Dashboard, path: str) -> None:
    answer, body = get(page, path)
    assert answer.status == 400
    assert body.strip()


def test_an_empty_store_is_an_empty_page(page: Dashboard) -> None:
    assert json.loads(get(page, "/api/report")[1])["totals"]["requests"] == 0
    assert json.loads(get(page, "/api/requests")[1]) == {"requests": [], "next": None}
    assert get(page, "/nowhere")[0].status == 404


def test_enter_prints_another_address_which_alone_opens_the_page(tmp_path: Path) -> None:
    terminal, far = os.openpty()
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "halton_meter", "dashboard"],
        stdin=far,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HALTON_METER_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert running.stdout
        first = running.stdout.readline().strip()
        assert "Enter: a new address" in running.stdout.readline()
        os.write(terminal, b"\n")
        second = running.stdout.readline().strip()
        port = urlsplit(first).port
        assert (urlsplit(second).port, first == second) == (port, False)
        found = []
        for address in (first, second, second):
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            asked.request("GET", address[address.index("/?") :])
            found.append(asked.getresponse().status)
        assert found == [403, 303, 403]
    finally:
        running.kill()
        running.communicate()
        os.close(terminal)
        os.close(far)


def test_the_report_says_what_was_not_metered_in_the_words_of_the_command(
    page: Dashboard, store: Store
) -> None:
    keep(store, 1)
    seen = Coverage()
    seen.add(Part("/usr/bin/curl", "api.openai.com", "OpenSSL", None), 3, 300)
    seen.add(Part("/x/beam.smp", "api.openai.com", "Erlang ssl", "stack_not_probed"), 1, 100)
    store.count_connections(seen, NOON_NS - NOON_NS % HOUR_NS, "a meter")
    store.flush()
    said = json.loads(get(page, "/api/report?period=7d")[1])["coverage_said"]
    assert said[0] == (
        "coverage: 3 of 4 connections to providers were metered (75.0 %, 75.0 % of bytes)"
    )
    assert said[1].strip().startswith("not metered: beam.smp (Erlang ssl) to api.openai.com, 1 ")
    # Of a model nobody knows which connections they are.
    one = json.loads(get(page, "/api/report?period=7d&model=claude-haiku-4-5")[1])
    assert one["coverage_said"] is None
    assert '<ul id="connections">' in get(page, "/")[1]
