"""`[budgets]` of `config.toml`: a table a budget, each wrong value told with the nearest right one.

    [budgets.website]
    usd = 150                  # dollars and cents: 150, 12.5 or "12.50"
    per = "month"              # day, week, month, session
    project = "website"        # also provider, model, process, account; globs; or a list of them
    each = "model"             # every model has the limit for itself
    at = [50, 80, 95, 100]     # percent
    action = ["notify", "stop"]
    command = "~/bin/alarm"    # run by a shell; a list is run as it is
    webhook = "http://127.0.0.1:9000/spent"
    counts = "billed"          # what is paid beyond plans; else the price at list

A budget with a wrong value is left out as a whole: half of a limit is no limit. `values.py`
calls this; it reads and writes no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from halton_meter.budget import (
    ACTIONS,
    COUNTS,
    DIMENSIONS,
    END,
    NONE,
    PERIODS,
    STOP,
    THRESHOLDS,
    Budget,
)
from halton_meter.toml_file import nearest, shown_value

BUDGETS_MAX = 100
GLOBS_MAX = 64
TEXT_CHARACTERS_MAX = 200
COMMAND_CHARACTERS_MAX = 4096
THRESHOLDS_MAX = 10
PERCENT_MAX = 1000
USD_MAX = Decimal(10_000_000)
CENT = Decimal("0.01")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
NAME_RULE = "it has 40 ASCII letters, digits, _ . and - at most, the first a letter or a digit"
_KEYS = (
    *("usd", "per", *DIMENSIONS, "each", "at", "action"),
    *("command", "webhook", "counts"),
)
_EXAMPLE = 'usd = 20 and per = "day"'
_MONEY = re.compile(
    r"\s*\$?\s*((?:[0-9]+|[0-9]{1,3}(?:[,_][0-9]{3})+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s*(?:usd|dollars?|\$)?\s*",
    re.I,
)
# A comma before the cents, as much of the world writes it.
_COMMA_CENTS = re.compile(r"\s*[$€]?\s*([0-9]+),([0-9]{1,2})\s*", re.ASCII)
_WEBHOOK = re.compile(
    r"https?://([A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:.]{2,45}\])(:\d{1,5})?(/[\x21-\x7e]*)?"
)
_PERIOD_WORDS = {
    **{"daily": "day", "days": "day", "today": "day", "24h": "day", "1d": "day"},
    **{"weekly": "week", "weeks": "week", "7d": "week"},
    **{"monthly": "month", "months": "month", "30d": "month"},
    **{"sessions": "session", "conversation": "session", "run": "session"},
}
_ACTION_WORDS = {
    **{"pause": STOP, "halt": STOP, "block": STOP, "freeze": STOP, "cap": STOP},
    **{"kill": END, "terminate": END, "quit": END, "notification": "notify", "desktop": "notify"},
    **{"nothing": NONE, "off": NONE, "": NONE},
}


class Judge(Protocol):
    """Takes note of what is wrong at some keys of the file (`values.py` has one)."""

    def refuse(self, what: str, *keys: str | int) -> None:
        """The value is not used."""

    def note(self, what: str, *keys: str | int) -> None:
        """The setting has no effect."""


class NotMoney(ValueError):
    """No amount in dollars and cents; the text says what it should be."""


def money(value: object) -> Decimal:
    """An amount above zero in whole cents, exactly: 20, 12.5, "12.50", "$20". Raises NotMoney."""
    near = None
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
            raise InvalidOperation
        if isinstance(value, str):
            match = _MONEY.fullmatch(value)
            if match is None:
                if comma := _COMMA_CENTS.fullmatch(value):
                    near = max(Decimal(".".join(comma.groups())).quantize(CENT), CENT)
                raise InvalidOperation
            amount = Decimal(re.sub(r"[,_]", "", match[1]))
        else:
            amount = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
        if not amount.is_finite():
            raise InvalidOperation
        if amount <= 0 or amount > USD_MAX:
            raise NotMoney(f"must be more than $0 and at most ${USD_MAX:,}, not {_shown(value)}")
        if amount == amount.quantize(CENT):
            return amount.quantize(CENT)
        near = max(amount.quantize(CENT), CENT)
    except InvalidOperation:
        pass
    said = f'must be dollars and cents, such as 20 or "12.50", not {_shown(value)}'
    raise NotMoney(said + (f"; did you mean {near}?" if near else ""))


def _shown(value: object) -> str:
    return f"{value}" if isinstance(value, Decimal) else shown_value(value)


def read_budgets(
    judge: Judge, value: Any, providers: Callable[[], tuple[str, ...]]
) -> tuple[Budget, ...]:
    """The budgets of a file's table, without those of which something is wrong.

    `providers` names those that are known.
    """
    if not isinstance(value, Mapping):
        what = (
            f"budgets must be tables, not {shown_value(value)}: write below a line [budgets.daily] "
        )
        judge.refuse(what + _EXAMPLE, "budgets")
        return ()
    found = []
    for name, table in list(value.items())[:BUDGETS_MAX]:
        reading = _Reading(judge, name, providers)
        if (budget := reading.read(table)) is not None:
            found.append(budget)
    if len(value) > BUDGETS_MAX:
        what = f"[budgets] holds {len(value):,} entries; only the first {BUDGETS_MAX} are used"
        judge.refuse(what, "budgets", list(value)[BUDGETS_MAX])
    return tuple(found)


@dataclass(slots=True)
class _Reading:
    """One budget's table being read; `sound` is False once a value of it is wrong."""

    judge: Judge
    name: str
    providers: Callable[[], tuple[str, ...]]
    sound: bool = field(default=True)

    def refuse(self, what: str, *keys: str | int) -> None:
        self.sound = False
        self.judge.refuse(f"[budgets.{self.name}] {what}", "budgets", self.name, *keys)

    def read(self, table: Any) -> Budget | None:
        if not isinstance(table, Mapping):
            near = nearest(self.name, _KEYS)
            if near:  # [budgets] with a budget's keys right below it
                what = (
                    f"{near} belongs to one budget: write it below a line such as [budgets.daily]"
                )
                self.judge.refuse(f"[budgets] {what}", "budgets", self.name)
                return None
            what = f"must be a table, not {shown_value(table)}"
            if isinstance(table, int | float) and not isinstance(table, bool):
                line = f"the line [budgets.{self.name}] and below it usd = {shown_value(table)}"
                what += f"; did you mean {line}?"
            self.refuse(what)
            return None
        if not NAME.fullmatch(self.name):
            self.refuse(f"is no name for a budget: {NAME_RULE}")
        for key in table:
            if key not in _KEYS:
                near = nearest(key, _KEYS)
                hint = f"; did you mean {near}?" if near else f"; known are {', '.join(_KEYS)}"
                self.refuse(f"unknown setting {shown_value(key)}{hint}", key)
        usd = self.usd(table)
        action = self.action(table)
        scope = {name: self.globs(name, table[name]) for name in DIMENSIONS if name in table}
        if "provider" in scope:
            self.known_providers(scope["provider"])
        per = self.word(table, "per", PERIODS, "month", _PERIOD_WORDS)
        each = self.word(table, "each", DIMENSIONS, None) if "each" in table else None
        if each and per == "session":
            what = f'each = "{each}" does not go with per = "session", which holds for each session'
            self.refuse(what, "each")
        counts = self.word(table, "counts", COUNTS, COUNTS[0]) or COUNTS[0]
        at = self.percentages(table.get("at", list(THRESHOLDS)))
        command, webhook = self.command(table), self.webhook(table)
        if not self.sound or usd is None or per is None:
            return None
        return Budget(self.name, usd, per, scope, each, at, action, command, webhook, counts)

    def usd(self, table: Mapping[str, Any]) -> Decimal | None:
        if "usd" not in table:
            self.refuse("has no limit; write usd = 20")
            return None
        try:
            return money(table["usd"])
        except NotMoney as error:
            self.refuse(f"usd {error}", "usd")
        return None

    def word(
        self,
        table: Mapping[str, Any],
        key: str,
        known: tuple[str, ...],
        usual: str | None,
        others: Mapping[str, str] | None = None,
    ) -> str | None:
        value = table.get(key, usual)
        if isinstance(value, str) and value in known:
            return value
        listed = ", ".join(f'"{each}"' for each in known)
        what = f"{key} must be one of {listed}, not {shown_value(value)}"
        text = value.strip().lower() if isinstance(value, str) else ""
        near = (others or {}).get(text) or nearest(value, known)
        self.refuse(what + (f'; did you mean "{near}"?' if near else ""), key)
        return None

    def action(self, table: Mapping[str, Any]) -> tuple[str, ...]:
        value = table.get("action", ["notify"])
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            what = f"action must be a word or a list of words in quotes, not {shown_value(value)}"
            self.refuse(f'{what}; did you mean "notify"?', "action")
            return ()
        for index, word in enumerate(listed):
            if word not in ACTIONS:
                self.unknown_action(word, ("action",) if value is word else ("action", index))
        if STOP in listed and END in listed:
            self.refuse('action holds "stop" and "end"; choose one', "action")
        return tuple(dict.fromkeys(word for word in listed if word != NONE))

    def unknown_action(self, word: str, where: tuple[str | int, ...]) -> None:
        key = "command" if word.lower() in ("command", "run", "exec", "script") else None
        key = "webhook" if word.lower() in ("webhook", "http", "url", "post") else key
        if key:
            example = '"~/bin/alarm"' if key == "command" else '"http://127.0.0.1:9000/spent"'
            self.refuse(
                f"action {shown_value(word)} is a setting of its own: write {key} = {example}",
                *where,
            )
            return
        near = _ACTION_WORDS.get(word.strip().lower()) or nearest(word, ACTIONS)
        listed = ", ".join(f'"{each}"' for each in ACTIONS)
        what = f"action must be of {listed}, not {shown_value(word)}"
        self.refuse(what + (f'; did you mean "{near}"?' if near else ""), *where)

    def globs(self, key: str, value: Any) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if isinstance(listed, list) and 0 < len(listed) <= GLOBS_MAX:
            names = [each for each in listed if isinstance(each, str) and each.strip()]
            if len(names) == len(listed) and all(len(n) <= TEXT_CHARACTERS_MAX for n in names):
                return tuple(dict.fromkeys(names))
        near = f'; did you mean "{value}"?' if type(value) is int else ""
        what = f"{key} must be a name in quotes, or a list of {GLOBS_MAX} at most"
        self.refuse(f"{what}, not {shown_value(value)}{near}", key)
        return ()

    def known_providers(self, globs: tuple[str, ...]) -> None:
        for glob in globs:
            known = self.providers()
            if not set(glob) & set("*?[") and glob.lower() not in known:
                near = nearest(glob, known)
                hint = f'; did you mean "{near}"?' if near else "; see: docs/providers.md"
                what = f"[budgets.{self.name}] no provider is called {shown_value(glob)}{hint}"
                self.judge.note(what, "budgets", self.name, "provider")

    def percentages(self, value: Any) -> tuple[int, ...]:
        listed = [value] if type(value) is int else value
        if isinstance(listed, list) and len(listed) <= THRESHOLDS_MAX:
            for index, each in enumerate(listed):
                if type(each) is not int or not 0 < each <= PERCENT_MAX:
                    self.refuse(_not_percent(each), "at", *(() if value is each else (index,)))
            if self.sound:
                return tuple(sorted(set(listed)))
            return ()
        what = (
            f"at must be a list of at most {THRESHOLDS_MAX} percentages, not {shown_value(value)}"
        )
        self.refuse(f"{what}; did you mean {list(THRESHOLDS)}?", "at")
        return ()

    def command(self, table: Mapping[str, Any]) -> str | tuple[str, ...] | None:
        value = table.get("command")
        if value is None:
            return None
        words = [value] if isinstance(value, str) else value
        sound = isinstance(words, list) and words and all(isinstance(w, str) for w in words)
        if sound and words[0].strip() and sum(map(len, words)) <= COMMAND_CHARACTERS_MAX:
            return value if isinstance(value, str) else tuple(words)
        what = 'command must be a text for the shell, or a list such as ["notify", "--loud"]'
        self.refuse(f"{what}, not {shown_value(value)}", "command")
        return None

    def webhook(self, table: Mapping[str, Any]) -> str | None:
        value = table.get("webhook")
        if value is None:
            return None
        match = _WEBHOOK.fullmatch(value) if isinstance(value, str) else None
        if match and (match[2] is None or 0 < int(match[2][1:]) <= 65535):
            return str(value)
        # Its path may be a secret: it is not shown.
        what = 'webhook must be a URL such as "http://127.0.0.1:9000/spent" or '
        what += '"https://hooks.example.com/…", without a user name'
        near = _webhook_like(value)
        self.refuse(what + (f'; did you mean "{near}"?' if near else ""), "webhook")
        return None


def _not_percent(value: object) -> str:
    what = f"at holds {shown_value(value)}, which is no whole percentage from 1 to {PERCENT_MAX}"
    text = str(value).strip().rstrip("%") if isinstance(value, str | float) else ""
    try:
        number = float(text)
    except ValueError:
        return what
    near = round(number * 100) if 0 < number <= 1 and "%" not in str(value) else round(number)
    return f"{what}; did you mean {near}?" if 0 < near <= PERCENT_MAX else what


def _webhook_like(value: object) -> str | None:
    """The URL that somebody meant who left its scheme out; only where it has no path."""
    if not isinstance(value, str) or "/" in value or "@" in value:
        return None
    near = f"http://{value.strip()}/"
    return near if _WEBHOOK.fullmatch(near) else None


def host_of(webhook: str) -> str:
    """What may be shown of a webhook: "https://hooks.example.com"."""
    scheme, _, rest = webhook.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def described(budget: Budget) -> Iterator[str]:
    """What a budget is limited to, a text a part: "project website", "model claude-*, gpt-5*"."""
    for name, globs in budget.scope.items():
        yield f"{name} {', '.join(globs)}"
    if budget.each:
        yield f"each {budget.each}"
