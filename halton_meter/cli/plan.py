"""`halton-meter plan`: what is left of each account's limits, how fast it goes, who used it.

Exit codes: 0 done, also when no limit was seen; 1 the store cannot be read; 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import (
    BAR_CELLS,
    aligned,
    bar,
    count,
    local_time,
    money_text,
    name_typed,
    print_json,
    say,
    shown,
    styled,
    sum_words,
    write_json_lines,
    wrong_usage,
)
from halton_meter.cli.selection import moment, now_ns, store_problems
from halton_meter.contract import rfc3339
from halton_meter.model import LimitKind
from halton_meter.plan.answer import USED_BY, Account, Plan, Window, ask, label
from halton_meter.plan.shares import ELSEWHERE, Share
from halton_meter.plan.words import (
    clock,
    heading,
    percent,
    rate_text,
    resets,
    share_text,
    span,
    title,
)
from halton_meter.store import NothingStored, Store
from halton_meter.store.limits import Stored

NOTHING_SEEN = (
    "No limits seen: no response in the last 31 days named one. Meter a client of a plan or with "
    "an API key: sudo halton-meter start"
)
NO_ACCOUNT = "No account matches. All that are known: halton-meter plan"
USERS_SHOWN = 5
RATES_SHOWN = 12
HISTORY_SINCE = "24h"
_ELSEWHERE = "elsewhere, or before metering"


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter plan                            windows, pace, who used them
  halton-meter plan --at 2026-11-23T15:00      as it stood then
  halton-meter plan --json | jq '.accounts[0].windows[0].used'
  halton-meter plan --history --since 7d       every reading of a week
""",
)
@click.option("--at", metavar="TIME", help="As of this time: 2h, yesterday, 2026-11-23T15:00.")
@click.option("--provider", type=name_typed, metavar="NAME", help="Only this provider.")
@click.option(
    "--account",
    type=name_typed,
    metavar="HASH",
    help="Only the accounts with a hash that begins so.",
)
@click.option("--history", is_flag=True, help="List the readings instead, oldest first.")
@click.option(
    "--since", metavar="TIME", help=f"With --history: from TIME on. Default: {HISTORY_SINCE}."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --history one a line.")
def plan(
    at: str | None,
    provider: str | None,
    account: str | None,
    history: bool,
    since: str | None,
    as_json: bool,
) -> None:
    """Show each account's limits: used, reset, pace, and who used how much.

    The figures are those that providers state in their responses. The share of a project, session
    or process follows from the change between two responses of one account, so it is a range where
    rounding to 1 % leaves one; the estimate in it goes by list price. Use of the account elsewhere
    shows as such where no metered request explains it.
    """
    if since is not None and not history:
        wrong_usage("--since needs --history", f"halton-meter plan --history --since {since}")
    at_ns = now_ns() if at is None else moment("--at", at, now_ns())
    store = Store(home_folder())
    if history:
        from_ns = moment("--since", since or HISTORY_SINCE, at_ns)
        _history(store, from_ns, at_ns + 1, as_json, provider, account)
        return
    with store_problems():
        found = ask(store, at_ns)
    accounts = tuple(each for each in found.accounts if _is_asked(each, provider, account))
    seen = bool(found.accounts)
    found = Plan(found.at_ns, accounts)
    if as_json:
        print_json(found.json())
    elif not accounts:
        say(NO_ACCOUNT if seen else NOTHING_SEEN)
    else:
        say("\n\n".join("\n".join(_account_lines(each, at_ns)) for each in accounts))


def _is_asked(found: Account | Stored, provider: str | None, account: str | None) -> bool:
    names = (found.account or "", *(found.also if isinstance(found, Account) else ()))
    return (provider is None or found.provider == provider) and (
        account is None or any(name.startswith(account) for name in names)
    )


# --- one account ----------------------------------------------------------------------------------


def _account_lines(account: Account, at_ns: int) -> Iterator[str]:
    ago = span(at_ns - account.as_of_ns)
    yield styled(f"{title(account)} (as of {clock(account.as_of_ns, at_ns)}, {ago} ago)", "bold")
    said = [
        *_plan_lines(account, at_ns),
        *_overage_lines(account, at_ns),
        *_rate_lines(account, at_ns),
        *_refusal_lines(account, at_ns),
    ]
    yield from said or ["  how much is used is not known: no response has stated it"]
    yield from _user_lines(account.of(LimitKind.PLAN))


def _plan_lines(account: Account, at_ns: int) -> Iterator[str]:
    windows = [each for each in account.of(LimitKind.PLAN) if each.reading.used is not None]
    if not windows:
        return
    width = max(len(label(each.reading)) for each in windows)
    for window in windows:
        used = window.used
        shown_bar = bar(float(used)) if used is not None else " " * BAR_CELLS
        figure = percent(float(used)) if used is not None else "?"
        pace = "" if window.pace is None else f"pace {window.pace.ratio:.1f}x"
        said = f"{shown_bar}  {figure:>5}  {pace:<9}  {resets(window, at_ns)}"
        yield f"  {shown(label(window.reading)):<{width}}  {said}".rstrip()
        if said := heading(window, at_ns):
            yield f"  {'':<{width}}  {said}"
        if window.reading.status not in (None, "allowed"):
            yield f"  {'':<{width}}  the provider says: {shown(window.reading.status)}"


def _overage_lines(account: Account, at_ns: int) -> Iterator[str]:
    windows = account.of(LimitKind.OVERAGE)
    since = account.overage_from_ns
    if since is not None and (windows or account.overage_usd):
        usd, unpriced = account.overage_usd, account.overage_unpriced
        what = f"billed beyond the plan since {clock(since, at_ns)}"
        parts = [sum_words(usd, unpriced, money_text(usd, at_least=unpriced > 0), what)]
        for window in windows:
            reading = window.reading
            if window.used is not None:
                parts.append(f"{percent(float(window.used))} of its limit ({reading.window})")
            if reading.detail or reading.status not in (None, "allowed"):
                words = ", ".join(filter(None, (reading.status, reading.detail)))
                parts.append(words.replace("_", " "))
        yield "  overage: " + "; ".join(map(shown_part, parts))
    for window in account.of(LimitKind.CREDITS):
        reading = window.reading
        left = "unlimited" if reading.remaining is None else f"{reading.remaining.normalize():f}"
        yield f"  credits left: {left}"


def shown_part(text: str) -> str:
    """A part of a line, of which words may come from a provider."""
    return shown(text, 100)


def _rate_lines(account: Account, at_ns: int) -> Iterator[str]:
    windows = account.of(LimitKind.RATE)
    rows = []
    for window in windows[:RATES_SHOWN]:
        reading = window.reading
        left = rate_text(reading)
        if window.is_over:
            left = "all" if reading.limit is None else f"all {int(reading.limit):,}"
            left += " again"
        rows.append(
            (f"  {shown(label(reading))}", left, resets(window, at_ns), shown(reading.model))
        )
    if rows:
        yield aligned(("  LIMIT", "LEFT", "RESET", "MODEL"), rows, ())
    if len(windows) > RATES_SHOWN:
        yield f"  and {count(len(windows) - RATES_SHOWN, 'more limit')}: halton-meter plan --json"


def _refusal_lines(account: Account, at_ns: int) -> Iterator[str]:
    for window in account.of(LimitKind.REFUSAL):
        reading = window.reading
        why = f": {shown(reading.detail)}" if reading.detail else ""
        line = f"  last refused at {clock(reading.at_ns, at_ns)} ({shown(reading.status)}{why})"
        if reading.resets_ns is None:
            yield f"{line}; the response did not say for how long"
        elif reading.resets_ns > at_ns:
            yield f"{line}; again from {clock(reading.resets_ns, at_ns)}"
        else:
            yield line


def _user_lines(windows: list[Window]) -> Iterator[str]:
    told = [window for window in windows if window.shares]
    if not told:
        return
    rows = []
    for name in USED_BY:
        for index, key in enumerate(_users(told, name)):
            who = _ELSEWHERE if key is ELSEWHERE else shown(_key_text(name, key), 32)
            figures = [_figure(window.shares.get(name, ()), key) for window in told]
            rows.append((f"  {name if not index else ''}", who, *figures))
    heads = [label(window.reading).upper() for window in told]
    yield ""
    yield aligned(("  USED BY", "", *heads), rows, heads)


def _users(windows: list[Window], name: str) -> list[Any]:
    """Who used most, of all windows together."""
    about: dict[Any, Any] = {}
    for window in windows:
        for share in window.shares.get(name, ()):
            if share.most > 0:
                about[share.key] = max(about.get(share.key, 0), share.about)
    return sorted(about, key=lambda key: -about[key])[:USERS_SHOWN]


def _figure(found: Iterable[Share], key: Any) -> str:
    return next((share_text(share) for share in found if share.key == key), "-")


def _key_text(name: str, key: str | None) -> str:
    if key is None:
        return "unknown"
    return key.rpartition("/")[2] if name == "process" else key


# --- history --------------------------------------------------------------------------------------


def _history(
    store: Store,
    from_ns: int,
    to_ns: int,
    as_json: bool,
    provider: str | None,
    account: str | None,
) -> None:
    try:
        with store_problems(), store.reading() as reader:
            found = (
                each for each in reader.limits(from_ns, to_ns) if _is_asked(each, provider, account)
            )
            if as_json:
                write_json_lines(map(reading_json, found))
                return
            rows = [_reading_row(each) for each in found]
    except NothingStored:
        rows = []
    if as_json:
        return
    if not rows:
        filtered = provider is not None or account is not None
        what = "No readings match" if filtered else "No readings in that time"
        say(f"{what}. All of a year: halton-meter plan --history --since 365d")
        return
    heads = ("TIME", "PROVIDER", "ACCOUNT", "WINDOW", "USED", "LEFT", "RESETS", "STATUS")
    click.echo(aligned(heads, rows, ("USED", "LEFT")))


def reading_json(stored: Stored) -> dict[str, Any]:
    """One reading as a JSON object."""
    reading = stored.reading
    return {
        "at": rfc3339(reading.at_ns),
        "provider": stored.provider,
        "plan": stored.plan,
        "account": stored.account,
        "window": reading.window,
        "kind": reading.kind.value,
        "used": None if reading.used is None else float(reading.used),
        "resets_at": None if reading.resets_ns is None else rfc3339(reading.resets_ns),
        "length_seconds": reading.length_s,
        "status": reading.status,
        "limit": None if reading.limit is None else float(reading.limit),
        "remaining": None if reading.remaining is None else float(reading.remaining),
        "model": reading.model,
        "detail": reading.detail,
        "event_id": stored.event_id,
    }


def _reading_row(stored: Stored) -> tuple[str, ...]:
    reading = stored.reading
    return (
        local_time(reading.at_ns, seconds=True),
        shown(stored.provider),
        shown(stored.account, 8),
        shown(reading.window),
        "-" if reading.used is None else percent(float(reading.used)),
        "-" if reading.remaining is None else f"{reading.remaining.normalize():f}",
        "-" if reading.resets_ns is None else local_time(reading.resets_ns, seconds=True),
        shown(reading.status),
    )
