"""What a window's figures mean, in one sentence, for `plan`, `report` and the status line's reader.

Times are local, as people read them; percentages are whole, as providers state them.
"""

from __future__ import annotations

from datetime import datetime
from fractions import Fraction
from math import ceil, floor

from halton_meter.model import LimitReading
from halton_meter.plan.answer import Account, Window, label
from halton_meter.plan.shares import Share

SECOND_NS = 1_000_000_000
_DAY_S = 86_400
PLANS = {"claude": "Claude plan", "chatgpt": "ChatGPT plan"}
ACCOUNT_CHARACTERS = 6


def title(account: Account) -> str:
    """ "Claude plan, account 3f9a12"; of an API key "openai API key"."""
    if account.plan is not None:
        name = PLANS.get(account.plan, f"{account.plan.replace('_', ' ')} plan")
    else:
        name = f"{account.provider} API key"
    if account.account is None:
        return name
    return f"{name}, account {account.account[:ACCOUNT_CHARACTERS]}"


def percent(part: Fraction | float) -> str:
    """ "62 %"; what is more than nothing is never "0 %"."""
    whole = round(part * 100)
    return "<1 %" if whole == 0 and part > 0 else f"{whole} %"


def share_text(share: Share) -> str:
    """ "24 % (20-27)": about, and between what; without the bounds where there is one whole."""
    least, most = floor(share.least * 100), ceil(share.most * 100)
    about = percent(share.about)
    return about if least == most else f"{about} ({least}-{most})"


def clock(at_ns: int, now_ns: int) -> str:
    """A time as one says it now: "16:15", "Thu 09:00", "Dec 1"."""
    moment = datetime.fromtimestamp(at_ns // SECOND_NS)
    now = datetime.fromtimestamp(now_ns // SECOND_NS)
    if moment.date() == now.date():
        return moment.strftime("%H:%M")
    if abs(moment - now).total_seconds() < 6 * _DAY_S:
        return moment.strftime("%a %H:%M")
    return f"{moment.strftime('%b')} {moment.day}"


def span(ns: int) -> str:
    """ "45 s", "35 min", "2 h 13 min", "3 d 19 h"."""
    seconds = max(0, ns // SECOND_NS)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // _DAY_S
    if seconds < 120:
        return f"{seconds} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{days} d {hours % 24:02d} h"


def resets(window: Window, now_ns: int) -> str:
    """ "resets 16:15, in 2 h 13 min"; "" where that is not known."""
    at_ns = window.reading.resets_ns
    if at_ns is None:
        return ""
    if window.is_over:
        return f"reset {clock(at_ns, now_ns)}, {span(now_ns - at_ns)} ago"
    return f"resets {clock(at_ns, now_ns)}, in {span(at_ns - now_ns)}"


def heading(window: Window, now_ns: int) -> str:
    """Where the window is heading; "" where nothing can be said."""
    pace, at_ns = window.pace, window.reading.resets_ns
    if window.is_over:
        return "no response since has said how much of the next one is used"
    if window.used is not None and window.used >= 1:
        return "used up" if at_ns is None else f"used up until {clock(at_ns, now_ns)}"
    if pace is None or at_ns is None:
        return ""
    if pace.full_ns is not None:
        early = span(at_ns - pace.full_ns)
        what = f"{label(window.reading)}"
        return (
            f"you will reach 100 % of the {what} at {clock(pace.full_ns, now_ns)}, "
            f"{early} before it resets"
        )
    if pace.per_hour <= 0:
        return f"no use in the last {span(pace.over_s * SECOND_NS)}"
    return f"at this pace {percent(pace.at_reset)} when it resets"


def in_short(window: Window, now_ns: int) -> str:
    """ "62 % of the 5-hour window used, until 16:15"."""
    at_ns = window.reading.resets_ns
    if window.is_over or window.used is None:
        return f"{label(window.reading)}: not known since it reset"
    until = "" if at_ns is None else f", until {clock(at_ns, now_ns)}"
    full = window.pace.full_ns if window.pace is not None else None
    heads = "" if full is None else f" (full at {clock(full, now_ns)})"
    return f"{percent(float(window.used))} of the {label(window.reading)} used{heads}{until}"


def rate_text(reading: LimitReading) -> str:
    """ "149,984 of 150,000 left"."""
    left = "?" if reading.remaining is None else f"{int(reading.remaining):,}"
    return f"{left} left" if reading.limit is None else f"{left} of {int(reading.limit):,} left"
