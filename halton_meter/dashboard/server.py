"""The local web page: the same answers as `report` and `events`.

`Dashboard(store, clock)` listens on 127.0.0.1 only and answers GET only. It shows one user's
spending, so other users of the machine and other web pages must not read it: a request needs the
cookie that the first visit to the page's address gave (`entrance.py`), and must name this address
as its host, which defeats DNS rebinding. The page loads nothing from other servers.

It knows no SQL (`report.py` and `store/` do) and writes nothing.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from itertools import chain
from typing import Any, TextIO
from urllib.parse import parse_qs, urlsplit

from halton_meter.contract import event_json
from halton_meter.coverage import Coverage
from halton_meter.dashboard.entrance import CODE_SECONDS, Entrance, is_ours
from halton_meter.model import PricedEvent
from halton_meter.periods import day_of, start_of
from halton_meter.plan.answer import ask as ask_plan
from halton_meter.report import DIMENSIONS, Question, ask
from halton_meter.spreadsheet import write_rows
from halton_meter.store import NothingStored, Selection, Store, StoreError

ADDRESS = "127.0.0.1"
REQUESTS_A_PAGE = 100
# Requests that began in the same nanosecond as the last one shown; they are on the next page.
SAME_INSTANT_MAX = 100
IDLE_SECONDS_MAX = 30.0
CSV_BYTES_IN_MEMORY = 4 << 20
_DAY_NS = 86_400 * 1_000_000_000
PERIODS = {"today": 0, "7d": 7, "30d": 30, "90d": 90, "all": None}
_STATIC = {
    "/": ("dashboard.html", "text/html; charset=utf-8"),
    "/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_CSV_FIELDS = (
    *("at", "provider", "model", "project", "process", "kind", "outcome", "error_class"),
    *("http_status", "list_usd", "marginal_usd", "reported_usd", "basis", "duration_ms", "id"),
)


NOT_LET_IN = (
    f"The address of this page works once, within {CODE_SECONDS / 60:.0f} minutes. For a new one, "
    "press Enter where `halton-meter dashboard` runs, or run it again."
)


Words = Callable[[Coverage], list[str]]


class BadRequest(Exception):
    """The address asks for something that does not exist; the text says what may be asked."""


class Dashboard(ThreadingHTTPServer):
    """The listening server; `new_url` is an address to open. Raises OSError for a port in use.

    `clock` gives the time in ns since 1970, for periods that end now. `words` says in lines how
    much of what was seen was metered, as `report` does.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, store: Store, clock: Callable[[], int], port: int = 0, words: Words = lambda _: []
    ) -> None:
        self.store = store
        self.clock = clock
        self.words = words
        self.entrance = Entrance()
        super().__init__((ADDRESS, port), _Page)

    @property
    def authority(self) -> str:
        """Address and port, as a browser names them in Host."""
        return f"{ADDRESS}:{self.server_port}"

    def new_url(self) -> str:
        """An address that opens the page once; earlier ones stop working."""
        return f"http://{self.authority}/?code={self.entrance.new_code()}"


class _Page(BaseHTTPRequestHandler):
    server: Dashboard
    server_version = "halton-meter"
    sys_version = ""
    timeout = IDLE_SECONDS_MAX

    def log_message(self, format: str, *args: Any) -> None:
        """Keep no log: addresses hold codes and names of projects."""

    def do_GET(self) -> None:
        """Answer one request."""
        where = urlsplit(self.path)
        asked = {name: values[-1] for name, values in parse_qs(where.query).items()}
        if self.headers.get("Host") != self.server.authority:
            self._say(HTTPStatus.MISDIRECTED_REQUEST, f"Open http://{self.server.authority}/")
        elif "code" in asked:
            self._let_in(asked["code"])
        elif not self.server.entrance.lets_in(self.headers.get("Cookie", "")):
            self._say(HTTPStatus.FORBIDDEN, NOT_LET_IN)
        else:
            self._answer(where.path.removeprefix(self.server.entrance.folder), asked)

    def _let_in(self, code: str) -> None:
        """Give a cookie for the code, and an address without it."""
        entrance = self.server.entrance
        if not is_ours(self.client_address[1], self.server.server_port):
            self._say(HTTPStatus.FORBIDDEN, "This page is another user's.")
        elif not entrance.spend(code):
            self._say(HTTPStatus.FORBIDDEN, NOT_LET_IN)
        else:
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Set-Cookie", entrance.cookie())
            self.send_header("Location", f"{entrance.folder}/")
            self.send_header("Content-Length", "0")
            self._end_headers()

    def _end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{text}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self._end_headers()
        self.wfile.write(body)

    def _answer(self, path: str, asked: dict[str, str]) -> None:
        try:
            if path in _STATIC:
                name, kind = _STATIC[path]
                self._send(HTTPStatus.OK, kind, _static(name))
            elif path == "/api/report":
                server = self.server
                self._send_json(report_json(server.store, server.clock(), asked, server.words))
            elif path == "/api/requests":
                self._send_json(requests_json(self.server.store, self.server.clock(), asked))
            elif path == "/api/plan":
                self._send_json(ask_plan(self.server.store, self.server.clock()).json())
            elif path == "/requests.csv":
                self._send_csv(asked)
            else:
                self._say(HTTPStatus.NOT_FOUND, "There is no such page. Open /")
        except BadRequest as error:
            self._say(HTTPStatus.BAD_REQUEST, str(error))
        except StoreError as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _send_json(self, answer: dict[str, Any]) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(answer).encode())

    def _send_csv(self, asked: dict[str, str]) -> None:
        # Written whole before it is sent: a slow reader must not keep the database open.
        with tempfile.SpooledTemporaryFile(CSV_BYTES_IN_MEMORY) as spool:
            text = io.TextIOWrapper(spool, "utf-8", newline="")
            write_csv(self.server.store, self.server.clock(), asked, text)
            text.flush()
            size = spool.tell()
            spool.seek(0)
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/csv; charset=utf-8")
            self.send_header("Content-Disposition", 'attachment; filename="requests.csv"')
            self.send_header("Content-Length", str(size))
            self._end_headers()
            shutil.copyfileobj(spool, self.wfile)
            text.detach()


def _static(name: str) -> bytes:
    return (files("halton_meter.dashboard") / "static" / name).read_bytes()


# --- what may be asked ---------------------------------------------------------------------------


def selection_of(asked: dict[str, str], now_ns: int) -> Selection:
    """`period` (see PERIODS; days are local, today included), `provider`, `model`, `project`."""
    period = asked.get("period", "30d")
    if period not in PERIODS:
        raise BadRequest(f"{period!r} is not a period. Ask for one of {', '.join(PERIODS)}")
    days = PERIODS[period]
    from_ns = None
    if days is not None:
        from_ns = start_of(day_of(now_ns) - timedelta(days=max(days - 1, 0)))
    return Selection(from_ns, None, asked.get("provider"), asked.get("model"), asked.get("project"))


def report_json(store: Store, now_ns: int, asked: dict[str, str], words: Words) -> dict[str, Any]:
    """The contract's report for `selection_of(asked)`, by the dimension `by`, with `trend`.

    `coverage_said`: what `words` says of its connections; null where those are not known, as for
    one model.
    """
    by = asked.get("by", "model")
    if by not in DIMENSIONS:
        raise BadRequest(f"cannot group by {by!r}. Ask for one of {', '.join(DIMENSIONS)}")
    answer = ask(store, Question(now_ns, selection_of(asked, now_ns), (by,)))
    said = None if answer.connections is None else words(answer.connections)
    return {**answer.json(), "coverage_said": said}


def requests_json(store: Store, now_ns: int, asked: dict[str, str]) -> dict[str, Any]:
    """A page of requests, latest first, and `next`: the `before` of the page after, or None."""
    selection = selection_of(asked, now_ns)
    cursor = _cursor(asked.get("before"))
    if cursor is not None:
        selection = Selection(
            selection.from_ns, cursor[0] + 1, selection.provider, selection.model, selection.project
        )
    found = list(_events(store, selection, REQUESTS_A_PAGE + 1 + SAME_INSTANT_MAX))[::-1]
    if cursor is not None:
        found = [event for event in found if (event.usage.at_ns, event.usage.id) < cursor]
    shown, more = found[:REQUESTS_A_PAGE], len(found) > REQUESTS_A_PAGE
    last = shown[-1].usage if more else None
    return {
        "requests": [event_json(event) for event in shown],
        "next": f"{last.at_ns}.{last.id}" if last else None,
    }


def _cursor(text: str | None) -> tuple[int, str] | None:
    if text is None:
        return None
    at, _, event = text.partition(".")
    if not (at.isascii() and at.isdigit() and len(at) < 20 and event):
        raise BadRequest("`before` must be the `next` of the page before")
    return int(at), event


def write_csv(store: Store, now_ns: int, asked: dict[str, str], output: TextIO) -> None:
    """Every selected request as CSV, oldest first."""
    tokens = ("input", "cache_read", "output", "reasoning")
    header = [*_CSV_FIELDS, *(f"{name}_tokens" for name in tokens)]
    shown = map(event_json, _events(store, selection_of(asked, now_ns), None))
    rows = (
        [*(each[name] for name in _CSV_FIELDS), *(each["tokens"][name] for name in tokens)]
        for each in shown
    )
    write_rows(output, chain([header], rows))


def _events(store: Store, selection: Selection, limit: int | None) -> Iterator[PricedEvent]:
    try:
        with store.reading() as reader:
            yield from reader.events(selection, limit)
    except NothingStored:
        return
