"""The scraped port: who has the token gets the metrics, nobody else gets anything."""

from __future__ import annotations

import http.client
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from halton_meter.metrics.server import TOKEN_NAME, MetricsServer, token_of
from halton_meter.store import StoreError

TEXT = b"halton_meter_requests_total 3.0\n"


def render() -> bytes:
    return TEXT


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer(render, "made-up-token", 0)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def get(server: MetricsServer, path: str = "/metrics", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_a_scrape_with_the_token_has_them(server: MetricsServer) -> None:
    assert get(server, Authorization="Bearer made-up-token") == (200, TEXT)


@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer made-up-toke", "Basic made-up-token x"])
def test_nobody_else_has_anything(server: MetricsServer, given: str) -> None:
    for path in ("/metrics", "/", "/other"):
        status, body = get(server, path, **({"Authorization": given} if given else {}))
        assert status == 401
        assert TEXT not in body


def test_another_page_is_named(server: MetricsServer) -> None:
    status, body = get(server, "/other", Authorization="Bearer made-up-token")
    assert (status, body) == (404, b"There is only /metrics.\n")


def test_a_store_that_cannot_be_read_fails_the_scrape(server: MetricsServer) -> None:
    def refuse() -> bytes:
        raise StoreError("the database is locked")

    server.render = refuse
    status, body = get(server, Authorization="Bearer made-up-token")
    assert (status, body) == (503, b"the database is locked\n")
    server.render = render
    assert get(server, Authorization="Bearer made-up-token")[0] == 200


def test_the_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    token = token_of(home)
    assert len(token) >= 32
    assert token_of(home) == token
    assert token_of(tmp_path / "other") != token
    assert stat.S_IMODE(os.stat(home / TOKEN_NAME).st_mode) == 0o600


def test_a_link_or_an_empty_file_is_no_token(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x" * 40)
    (tmp_path / TOKEN_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        token_of(tmp_path)
    (tmp_path / TOKEN_NAME).unlink()
    (tmp_path / TOKEN_NAME).write_text("")
    with pytest.raises(OSError, match="delete it"):
        token_of(tmp_path)
