"""The snapshot's document: what one more event adds to it. Pure, but for the day's date.

Sums are kept as exact text. Of a session stands what a status line shows: cost, project, account,
until when its prompt cache lives. Of an account stand its plan's windows, each with some readings,
so that its pace goes on when another process meters. `statusline/snapshot.py` describes the file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from typing import Any

from halton_meter.contract import usd_text
from halton_meter.model import LimitKind, LimitReading, PricedEvent
from halton_meter.plan.pace import RECENT_PART, pace
from halton_meter.plan.windows import RESTART, UNIT, Period, Point, is_same_period
from halton_meter.statusline.snapshot import VERSION, number, start_of, text

SESSIONS_MAX = 64
PROJECTS_MAX = 100
ACCOUNTS_MAX = 16
WINDOWS_MAX = 16
# Readings of a window that its pace is taken from.
POINTS_MAX = 60
# Events that may not be in the database yet, with what each of them added. Of more, the oldest are
# forgotten: they stay in the sums until these are taken from the database.
PENDING_MAX = 200
WRITERS_MAX = 16
SECOND_NS = 1_000_000_000
# How long a prompt cache lives after each request that wrote or read it.
_CACHE_S = {"5m": 300, "1h": 3600}
_MAIN_AGENTS = (None, "main")

Document = dict[str, Any]
Sums = tuple[str | None, Decimal | None, int, int]
"""Of a project or a session: its name, dollars, requests, those without a price."""


# --- one event ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one event added to the sums; `usd` None: it has no price."""

    event_id: str
    at_s: float
    session: str | None
    project: str | None
    usd: Decimal | None

    @classmethod
    def of(cls, event: PricedEvent) -> _Entry:
        usage = event.usage
        at_s = usage.at_ns / SECOND_NS
        return cls(usage.id, at_s, usage.caller.session_id, usage.project, event.list_usd)

    @classmethod
    def of_row(cls, row: Any) -> _Entry:
        """The inverse of `row`. Raises ValueError for anything else."""
        event_id, at_s, session, project, usd = row
        texts = (event_id, session or "", project or "", usd or "0")
        if not all(isinstance(each, str) for each in texts) or not isinstance(at_s, int | float):
            raise ValueError("no entry")
        return cls(event_id, float(at_s), session, project, None if usd is None else _usd(usd))

    def row(self) -> list[Any]:
        """As it stands in the file."""
        return [self.event_id, self.at_s, self.session, self.project, usd_text(self.usd)]


def add(document: Document, event: PricedEvent) -> None:
    """Count an event, in place of what was counted of it before."""
    entry = _Entry.of(event)
    pending = document["pending"]
    for index in range(len(pending) - 1, -1, -1):
        if pending[index][0] == entry.event_id:
            _apply(document, _Entry.of_row(pending.pop(index)), -1)
            break
    pending.append(entry.row())
    del pending[:-PENDING_MAX]
    _apply(document, entry)
    if entry.session is not None:
        _tell_session(document, entry.session, event)
    _tell_limits(document, event)


def _apply(document: Document, entry: _Entry, sign: int = 1) -> None:
    usd, unpriced = (entry.usd or Decimal(0)) * sign, sign * (entry.usd is None)
    date = time.strftime("%Y-%m-%d", time.localtime(entry.at_s))
    if date > document["day"]["date"]:
        document["day"] = {**new_day(entry.at_s)}
    if date == document["day"]["date"]:
        _plus(document["day"], usd, sign, unpriced)
        _plus_project(document, entry.project, usd, sign, unpriced)
    if entry.session is not None:
        session = document["sessions"].setdefault(entry.session, _no_sums())
        _plus(session, usd, sign, unpriced)


def _plus(sums: Document, usd: Decimal, requests: int, unpriced: int) -> None:
    sums["usd"] = usd_text(_usd(sums["usd"]) + usd)
    sums["requests"] += requests
    sums["unpriced"] += unpriced


def _plus_project(
    document: Document, project: str | None, usd: Decimal, requests: int, unpriced: int
) -> None:
    projects = document["day"]["projects"]
    if project is not None and (project in projects or len(projects) < PROJECTS_MAX):
        _plus(projects.setdefault(project, _no_sums()), usd, requests, unpriced)


def _tell_session(document: Document, name: str, event: PricedEvent) -> None:
    """What else is known of a session: when it spoke last, for whom, until when its cache lives."""
    usage = event.usage
    session = document["sessions"].pop(name)
    document["sessions"][name] = session  # the last one that spoke stands last
    for beyond in list(document["sessions"])[:-SESSIONS_MAX]:
        del document["sessions"][beyond]
    session["at"] = max(usage.at_ns / SECOND_NS, number(session, "at") or 0)
    session["project"] = usage.project or text(session, "project")
    # Requests without a user's name have the name of who is billed, and no windows.
    if usage.limits or not text(session, "account"):
        session["account"] = usage.caller.account or text(session, "account")
    if usage.caller.agent not in _MAIN_AGENTS or usage.provider != "anthropic":
        return
    tokens = usage.tokens
    lives = None
    if tokens.cache_write_1h:
        lives = _CACHE_S["1h"]
    elif tokens.cache_write_5m:
        lives = _CACHE_S["5m"]
    elif tokens.cache_write:
        lives = _CACHE_S.get(usage.conditions.get("cache_ttl_asked", "5m"))
    if tokens.cache_read and lives is None:
        lives = int(number(session, "cache_s") or _CACHE_S["5m"])
    if lives is not None:
        session["cache_s"] = lives
        session["cache_until"] = usage.at_ns / SECOND_NS + lives


# --- windows --------------------------------------------------------------------------------------


def _tell_limits(document: Document, event: PricedEvent) -> None:
    usage = event.usage
    readings = [r for r in usage.limits if r.kind is LimitKind.PLAN and r.used is not None]
    if not readings:
        return
    who = (usage.provider, usage.conditions.get("plan"), usage.caller.account)
    names = ("provider", "plan", "account")
    accounts: list[Document] = document["accounts"]
    account = next((a for a in accounts if tuple(a.get(n) for n in names) == who), None)
    if account is None:
        account = dict(zip(names, who, strict=True)) | {"windows": {}}
    else:
        accounts.remove(account)
    accounts.append(account)
    del accounts[:-ACCOUNTS_MAX]
    account["at"] = max(number(account, "at") or 0, readings[0].at_ns / SECOND_NS)
    windows = account["windows"]
    for reading in readings:
        if reading.window in windows or len(windows) < WINDOWS_MAX:
            windows[reading.window] = _window(windows.get(reading.window), reading)


def _window(before: Document | None, reading: LimitReading) -> Document:
    """A window after one more reading, with its pace."""
    assert reading.used is not None
    points: list[list[float]] = []
    used = reading.used
    if before is not None:
        earlier = _reading_of(before, reading)
        is_late = reading.resets_ns is not None and reading.resets_ns <= reading.at_ns
        if reading.at_ns < earlier.at_ns or (is_late and not is_same_period(reading, earlier)):
            return before
        assert earlier.used is not None
        if is_same_period(reading, earlier) and used >= earlier.used - RESTART:
            points = before["points"]
            used = max(used, earlier.used)
    if not points or points[-1][1] != float(used):
        points = [*points, [reading.at_ns / SECOND_NS, float(used)]]
    points = _recent(points, reading)
    window: Document = {
        "used": float(used),
        "at": reading.at_ns / SECOND_NS,
        "resets_at": _seconds(reading.resets_ns),
        "length_s": reading.length_s,
        "points": points,
    }
    begins_ns = None
    if reading.resets_ns is not None and reading.length_s is not None:
        begins_ns = reading.resets_ns - reading.length_s * SECOND_NS
    series = tuple(Point(int(at * SECOND_NS), Decimal(str(part))) for at, part in points)
    found = Period(series, reading.unit or UNIT, begins_ns, reading.resets_ns, reading.length_s)
    heading = pace(found, reading.at_ns)
    if heading is not None:
        window["full_at"] = _seconds(heading.full_ns)
        window["at_reset"] = round(heading.at_reset, 4)
    return window


def _recent(points: list[list[float]], reading: LimitReading) -> list[list[float]]:
    """The points that the pace is taken from, and the last one before them."""
    since = reading.at_ns / SECOND_NS - (reading.length_s or 0) / RECENT_PART
    older = sum(at <= since for at, _ in points) if reading.length_s else 0
    points = points[max(older - 1, 0) :]
    while len(points) > POINTS_MAX:
        points = [*points[:-1:2], points[-1]]
    return points


def _reading_of(window: Document, like: LimitReading) -> LimitReading:
    resets = number(window, "resets_at")
    return LimitReading(
        like.window,
        like.kind,
        int((number(window, "at") or 0) * SECOND_NS),
        used=Decimal(str(number(window, "used") or 0)),
        resets_ns=None if resets is None else int(resets * SECOND_NS),
        length_s=like.length_s,
    )


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / SECOND_NS


# --- from the database ----------------------------------------------------------------------------


def take_sums(
    document: Document, day: Iterable[Sums], sessions: Iterable[Sums], stored: set[str]
) -> None:
    """Take the sums of what the database holds, and add what is not in it yet.

    `day` is by project, `stored` are the ids of those pending events that the database has.
    """
    document["day"] = new_day(time.time())
    for project, usd, requests, unpriced in day:
        amount = usd or Decimal(0)
        _plus(document["day"], amount, requests, unpriced)
        _plus_project(document, project, amount, requests, unpriced)
    for session in document["sessions"].values():
        session.update(_no_sums())
    for name, usd, requests, unpriced in sessions:
        _plus(document["sessions"][name], usd or Decimal(0), requests, unpriced)
    left = [_Entry.of_row(row) for row in document["pending"] if row[0] not in stored]
    document["pending"] = [entry.row() for entry in left]
    for entry in left:
        _apply(document, entry)


# --- from a file ----------------------------------------------------------------------------------


def _no_sums() -> Document:
    return {"usd": "0", "requests": 0, "unpriced": 0}


def new_day(at_s: float) -> Document:
    """The sums of the local day of a time, before its first request."""
    date = time.strftime("%Y-%m-%d", time.localtime(at_s))
    return {"date": date, **_no_sums(), "projects": {}}


def _usd(found: object) -> Decimal:
    """An amount of a file; 0 for what is none."""
    try:
        amount = Decimal(str(found)[:60])
    except DecimalException:
        return Decimal(0)
    return amount if amount.is_finite() and abs(amount) < 10**12 else Decimal(0)


def sound(found: Document) -> Document:
    """What a file held, with all that this process relies on; what is broken begins anew."""
    today = new_day(time.time())
    day = found.get("day")
    if not isinstance(day, dict) or not _has_sums(day) or day.get("date") != today["date"]:
        day = today
    day["projects"] = _named_sums(day.get("projects"), PROJECTS_MAX)
    pending = []
    listed = found.get("pending")
    for row in listed[-PENDING_MAX:] if isinstance(listed, list) else ():
        with contextlib.suppress(TypeError, ValueError):
            pending.append(_Entry.of_row(row).row())
    return {
        "version": VERSION,
        "written_at": time.time(),
        "writers": _living(found.get("writers")),
        "day": day,
        "sessions": _named_sums(found.get("sessions"), SESSIONS_MAX),
        "accounts": _sound_accounts(found.get("accounts")),
        "pending": pending,
    }


def _has_sums(found: object) -> bool:
    if not isinstance(found, dict):
        return False
    counts = (found.get("requests"), found.get("unpriced"))
    return isinstance(found.get("usd"), str) and all(type(count) is int for count in counts)


def _named_sums(found: object, most: int) -> Document:
    if not isinstance(found, dict):
        return {}
    return {name: sums for name, sums in list(found.items())[-most:] if _has_sums(sums)}


def _living(found: object) -> Document:
    listed = list(found.items())[-WRITERS_MAX:] if isinstance(found, dict) else []
    return {
        pid: start
        for pid, start in listed
        if pid.isascii() and pid.isdigit() and start_of(int(pid[:9])) == start
    }


def _sound_accounts(found: object) -> list[Document]:
    sound = []
    for account in found[-ACCOUNTS_MAX:] if isinstance(found, list) else ():
        windows = account.get("windows") if isinstance(account, dict) else None
        if isinstance(windows, dict):
            kept = {name: each for name, each in windows.items() if _is_window(each)}
            sound.append({**account, "windows": kept})
    return sound


def _is_window(found: object) -> bool:
    points = found.get("points") if isinstance(found, dict) else None
    return (
        number(found, "used") is not None
        and isinstance(points, list)
        and all(
            isinstance(point, list)
            and len(point) == 2
            and all(isinstance(part, int | float) and abs(part) < 1e12 for part in point)
            for point in points
        )
    )
