"""Metrics for a Prometheus server that scrapes: GET /metrics on 127.0.0.1, for who has the token.

Every user of the machine can connect to a port of 127.0.0.1, and the figures are one user's. So a
request needs `Authorization: Bearer TOKEN`; the token is in a file of the user's alone, which
Prometheus reads (`authorization: credentials_file`).
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from halton_meter.metrics.exposition import CONTENT_TYPE
from halton_meter.store import StoreError

ADDRESS = "127.0.0.1"
PATH = "/metrics"
TOKEN_NAME = "metrics-token"  # noqa: S105 (the file's name)
IDLE_SECONDS_MAX = 30.0
_TOKEN_BYTES_MAX = 200


def token_of(home: Path) -> str:
    """The token, made at the first call. Raises OSError."""
    path = home / TOKEN_NAME
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, flags, 0o600), "w") as file,
    ):
        file.write(secrets.token_urlsafe(32))
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
        token = file.read(_TOKEN_BYTES_MAX).strip()
    if len(token) < len(secrets.token_urlsafe(16)):
        raise OSError(0, "it holds no token; delete it, and a new one is made", str(path))
    return token


class MetricsServer(ThreadingHTTPServer):
    """The listening server. Raises OSError for a port in use. `render` may raise StoreError."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, render: Callable[[], bytes], token: str, port: int) -> None:
        self.render, self.token = render, token
        super().__init__((ADDRESS, port), _Answer)


class _Answer(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "halton-meter"
    sys_version = ""
    timeout = IDLE_SECONDS_MAX

    def log_message(self, format: str, *args: Any) -> None:
        """Keep no log."""

    def do_GET(self) -> None:
        """Answer one scrape."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            self._send(HTTPStatus.UNAUTHORIZED, b"A scrape needs the bearer token.\n")
        elif self.path.partition("?")[0] != PATH:
            self._send(HTTPStatus.NOT_FOUND, f"There is only {PATH}.\n".encode())
        else:
            try:
                body = self.server.render()
            except StoreError as error:  # Prometheus notes the scrape as failed: up is 0
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            else:
                self._send(HTTPStatus.OK, body, CONTENT_TYPE)

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)
