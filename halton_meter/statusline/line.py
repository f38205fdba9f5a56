"""The line itself: from the snapshot, and what Claude Code says of its session, to a text.

    $0.42 session · $3.10 today · web $12.34 of $20 · 5h 62% → 16:15 · 7d 17% → Thu · cache → 14:52

Times stand as times of day and not as "in 5 min": the line may stay for long after it was made.
Pure; what time it is comes as an argument. Nothing here raises for what a client or a file says.
"""

from __future__ import annotations

import math
import os
import time

from halton_meter.statusline.snapshot import number, rows, table, text

SEPARATOR = " · "
NOT_METERED = "not metered: service is not running"
START = "halton-meter start"
# The client's estimate differs from what was metered when it does by both of these.
DIFFERS_USD, DIFFERS_PART = 0.01, 0.05
# From these parts of a window on it is coloured.
WARN, ALARM = 0.8, 0.95
PARTS_MAX = 8
WINDOWS_MAX = 4
_DAY_S = 86_400
_COLOURS = {"warn": "33", "alarm": "31", "dim": "2"}
# The client's names of the windows in its own words.
_CLIENTS_WINDOWS = (("five_hour", "5h"), ("seven_day", "7d"))


def session_line(
    said: dict[str, object],
    found: dict[str, object],
    budgets: dict[str, object],
    now: float,
    *,
    is_metering: bool,
    colours: bool = False,
) -> str:
    """The status line of a session; `said` is what the client pipes in."""
    session_id = said.get("session_id")
    session = table(found, "sessions", session_id) if isinstance(session_id, str) else {}
    paint = _Paint(colours)
    if not is_metering:
        return SEPARATOR.join([NOT_METERED, START, *_window_parts(said, {}, {}, now, paint)])
    parts = [_session_part(said, session, paint)]
    parts.append(_today_part(found, now))
    parts.append(_budget_part(budgets, session_id, text(session, "project"), now, paint))
    parts += _window_parts(said, found, session, now, paint)
    parts.append(_cache_part(said, session, now, paint))
    return SEPARATOR.join(part for part in parts if part) or "nothing metered yet"


def prompt_text(
    found: dict[str, object], budgets: dict[str, object], now: float, *, is_metering: bool
) -> str:
    """A short text for a shell's prompt: "$3.10 5h 62%"; "" where there is nothing to say."""
    if not is_metering:
        return "not metered" if found else ""
    plain = _Paint(False)
    parts = [_sum_text(_day(found, now))]
    account = _account(found, {})
    window = table(account, "windows", "5h") or next(iter(_windows(account)), ("", {}))[1]
    if window and (number(window, "resets_at") or 0) > now:
        parts.append(f"{_name(window)} {_percent(number(window, 'used') or 0)}")
    parts.append(_budget_part(budgets, None, None, now, plain))
    return " ".join(part for part in parts if part)


# --- money ----------------------------------------------------------------------------------------


def money(amount: float | None, at_least: bool = False) -> str:
    """ "$3.10"; more than nothing is never "$0.00"; "≥" where some of it has no price."""
    if amount is None:
        return "$?"
    least = "≥" if at_least else ""
    if 0 < amount < 0.005:
        return f"≥${_first_digit(amount)}" if at_least else "<$0.01"
    return f"{least}${amount:,.2f}" if amount < 10_000 else f"{least}${amount:,.0f}"


def _first_digit(amount: float) -> str:
    """A small amount to its first digit, rounded down: a lower bound is not to be more."""
    places = -math.floor(math.log10(amount))
    return f"{math.floor(round(amount * 10**places, 6)) / 10**places:.{places}f}"


def _sum_text(sums: dict[str, object]) -> str:
    unpriced = number(sums, "unpriced") or 0
    return money(number(sums, "usd") if _is_known(sums, unpriced) else None, unpriced > 0)


def _is_known(sums: dict[str, object], unpriced: float) -> bool:
    """Whether anything of it has a price, or there is nothing."""
    return not unpriced or unpriced < (number(sums, "requests") or math.inf)


def _session_part(said: dict[str, object], session: dict[str, object], paint: _Paint) -> str:
    clients = number(table(said, "cost"), "total_cost_usd")
    if not session:
        if not clients:
            return ""
        return paint("warn", f"session not metered (client says {money(clients)})")
    ours = number(session, "usd") or 0.0
    line = f"{_sum_text(session)} session"
    if clients is None:
        return line
    apart = abs(clients - ours)
    if apart > DIFFERS_USD and apart > DIFFERS_PART * max(clients, ours):
        line += " " + paint("warn", f"≠ client {money(clients)}")
    return line


def _day(found: dict[str, object], now: float) -> dict[str, object]:
    """The sums of today; of a new day nothing was metered yet."""
    day = table(found, "day")
    if day.get("date") == time.strftime("%Y-%m-%d", time.localtime(now)):
        return day
    return {"usd": "0"}


def _today_part(found: dict[str, object], now: float) -> str:
    return f"{_sum_text(_day(found, now))} today"


def _budget_part(
    budgets: dict[str, object], session: object, project: str | None, now: float, paint: _Paint
) -> str:
    """The budget of the session's project, else of the session, else one that is for all."""
    ties = ("project", "session", "provider", "model", "process", "account")
    best: dict[str, object] = {}
    best_rank = 0
    for budget in rows(budgets, "budgets")[:200]:
        ends = number(budget, "ends_at")
        if ends is not None and ends <= now:
            continue
        # Of a limit for each project, the sum of requests without a project is tied as well.
        tied = {name for name in ties if name == budget.get("each") or budget.get(name) is not None}
        rank = 1 if not tied else 0
        if tied == {"session"} and session is not None and budget.get("session") == session:
            rank = 2
        if tied == {"project"} and project is not None and budget.get("project") == project:
            rank = 3
        if rank > best_rank:
            best, best_rank = budget, rank
    spent, limit = number(best, "spent_usd"), number(best, "limit_usd")
    if spent is None or not limit:
        return ""
    name = text(best, "project") if best_rank == 3 else text(best, "name")
    known = spent if _is_known(best, number(best, "unpriced_requests") or 0) else None
    line = f"{name or 'budget'} {money(known, best.get('at_least') is True)} of {money(limit)}"
    if best.get("stopped") is True:
        return paint("alarm", f"{line} stopped")
    return paint(_level(spent / limit), line)


# --- windows --------------------------------------------------------------------------------------


def _account(found: dict[str, object], session: dict[str, object]) -> dict[str, object]:
    """The account that the session used; else the plan that was heard of last."""
    accounts = rows(found, "accounts")
    mine = session.get("account")
    for account in accounts:
        if mine is not None and account.get("account") == mine:
            return account
    plans = [each for each in accounts if _windows(each)]
    if session:  # of another account than those with windows: its own has none
        plans = [each for each in plans if mine is None]
    return max(plans, key=lambda each: number(each, "at") or 0, default={})


def _windows(account: dict[str, object]) -> list[tuple[str, dict[str, object]]]:
    """Windows with a share that is used, the shortest first."""
    found = [
        (name, window)
        for name, window in list(table(account, "windows").items())[:32]
        if isinstance(window, dict) and number(window, "used") is not None
    ]
    return sorted(found, key=lambda each: (number(each[1], "length_s") or 1e9, each[0]))


def _window_parts(
    said: dict[str, object],
    found: dict[str, object],
    session: dict[str, object],
    now: float,
    paint: _Paint,
) -> list[str]:
    parts = [
        _window_part(window, name, now, paint)
        for name, window in _windows(_account(found, session))[:WINDOWS_MAX]
    ]
    if any(parts):
        return parts
    for name, short in _CLIENTS_WINDOWS:  # the client's own word, before a request was metered
        window = table(said, "rate_limits", name)
        used = number(window, "used_percentage")
        if used is not None:
            known = {"used": used / 100, "resets_at": window.get("resets_at")}
            parts.append(_window_part(known, short, now, paint))
    return parts


def _window_part(window: dict[str, object], name: str, now: float, paint: _Paint) -> str:
    used, resets = number(window, "used"), number(window, "resets_at")
    if used is None or (resets is not None and resets <= now):
        return ""
    line = f"{_name(window) or name} {_percent(used)}"
    full = number(window, "full_at")
    if full is not None and resets is not None and now < full < resets and used < 1:
        line += f" full {clock(full, now)}"
    if resets is not None:
        line += f" → {clock(resets, now)}"
    return paint(_level(used), line)


def _name(window: dict[str, object]) -> str:
    """ "5h", "7d" by the window's length; "" where that is not known."""
    length = int(number(window, "length_s") or 0)
    if not length:
        return ""
    if length % _DAY_S == 0:
        return f"{length // _DAY_S}d"
    return f"{length // 3600}h" if length % 3600 == 0 else f"{length // 60}m"


def _percent(used: float) -> str:
    whole = round(used * 100)
    return "<1%" if whole == 0 and used > 0 else f"{whole}%"


def _level(part: float) -> str:
    return "alarm" if part >= ALARM else "warn" if part >= WARN else ""


def clock(at: float, now: float) -> str:
    """A time as one says it now: "16:15", "Thu 09:00", "Dec 1"."""
    moment, today = time.localtime(at), time.localtime(now)
    if (moment.tm_year, moment.tm_yday) == (today.tm_year, today.tm_yday):
        return time.strftime("%H:%M", moment)
    if abs(at - now) < 6 * _DAY_S:
        return time.strftime("%a %H:%M", moment)
    return time.strftime("%b ", moment) + str(moment.tm_mday)


# --- cache ----------------------------------------------------------------------------------------


def _cache_part(
    said: dict[str, object], session: dict[str, object], now: float, paint: _Paint
) -> str:
    """Until when the session's prompt cache lives, by what was metered, else by the client."""
    until = number(session, "cache_until")
    if until is None:
        until = number(table(said, "prompt_cache"), "expires_at")
    if until is None or until > now + 2 * _DAY_S:
        return ""
    return f"cache → {clock(until, now)}" if until > now else paint("dim", "cache expired")


class _Paint:
    """Colours a part, where colours are wanted (https://no-color.org)."""

    def __init__(self, colours: bool) -> None:
        self._colours = colours

    def __call__(self, level: str, line: str) -> str:
        code = _COLOURS.get(level)
        return f"\x1b[{code}m{line}\x1b[0m" if code and self._colours else line


def wants_colours() -> bool:
    """Whether the user has not asked for none."""
    return not os.environ.get("NO_COLOR")
