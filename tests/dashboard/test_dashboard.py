"""The local page: what it answers, to whom it does not, and that paging misses nothing."""

from __future__ import annotations

import csv
import http.client
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from halton_meter.dashboard.server import REQUESTS_A_PAGE, Dashboard
from halton_meter.store import Store
from tests.store.made import HOUR_NS, NOON_NS, made


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def page(store: Store) -> Iterator[Dashboard]:
    server = Dashboard(store, lambda: NOON_NS + HOUR_NS)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(
    page: Dashboard, path: str, *, cookie: bool = True, host: str | None = None
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)
    headers = {"Host": host or page.authority}
    if cookie:
        headers["Cookie"] = f"halton_meter={page.secret}"
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read().decode()


def keep(store: Store, count: int, step_ns: int = HOUR_NS // 3600) -> None:
    store.append([made(f"e{n:03}", at_ns=NOON_NS - n * step_ns) for n in range(count)])
    store.flush()


def test_the_address_shown_opens_the_page_and_leaves_the_address_bar_without_secret(
    page: Dashboard,
) -> None:
    address = urlsplit(page.url)
    answer, _ = get(page, f"{address.path}?{address.query}", cookie=False)
    assert answer.status == 303
    assert answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert f"halton_meter={page.secret};" in cookie
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in cookie.split(";")}
    answer, body = get(page, "/")
    assert answer.status == 200
    assert "<title>Halton Meter</title>" in body


@pytest.mark.parametrize(
    "path", ["/", "/api/report", "/api/requests", "/requests.csv", "/?secret=guess"]
)
def test_without_the_secret_nothing_is_shown(page: Dashboard, store: Store, path: str) -> None:
    keep(store, 1)
    answer, body = get(page, path, cookie=False)
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
