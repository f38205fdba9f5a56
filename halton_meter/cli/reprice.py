"""`halton-meter reprice`: price stored requests again with today's price book, as a new revision.

The earlier price is kept (`superseded_price` in the database). Exit codes: 0 done, also when
nothing changes; 1 the store cannot be read or written; 2 wrong usage.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import open_book
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import count, money_text, print_json, say, shown
from halton_meter.cli.selection import (
    no_match,
    now_ns,
    read_selection,
    selection_options,
    store_problems,
)
from halton_meter.contract import usd_text
from halton_meter.store import NothingStored, Repriced, Selection, Store

# Models listed one by one for people; --json lists all.
MODELS_SHOWN = 20


@dataclass
class Change:
    """What repricing does to one model's requests."""

    provider: str
    model: str | None
    events: int = 0
    before_usd: Decimal | None = None
    after_usd: Decimal | None = None
    newly_priced: int = 0
    newly_unpriced: int = 0

    def add(self, changed: Repriced) -> None:
        """Count one request."""
        before, after = changed.before.list_usd, changed.after.list_usd
        self.events += 1
        if before is not None:
            self.before_usd = (self.before_usd or Decimal(0)) + before
        if after is not None:
            self.after_usd = (self.after_usd or Decimal(0)) + after
        self.newly_priced += before is None and after is not None
        self.newly_unpriced += before is not None and after is None

    def words(self) -> str:
        """One line for people."""
        line = (
            f"{shown(self.provider)} {shown(self.model)}: {count(self.events, 'request')}, "
            f"{money_text(self.before_usd, 4)} -> {money_text(self.after_usd, 4)}"
        )
        if self.newly_priced:
            line += f", {self.newly_priced:,} priced for the first time"
        if self.newly_unpriced:
            line += f", {self.newly_unpriced:,} no longer priced"
        return line

    def json(self) -> dict[str, Any]:
        """As in `reprice --json`."""
        return {
            "provider": self.provider,
            "model": self.model,
            "events": self.events,
            "before_usd": usd_text(self.before_usd),
            "after_usd": usd_text(self.after_usd),
            "newly_priced": self.newly_priced,
            "newly_unpriced": self.newly_unpriced,
        }


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter reprice --dry-run                   what today's price book would change
  halton-meter reprice --model my-model            one model, e.g. after: pricing set
  halton-meter reprice --since 30d --json          the changes, for a script
""",
)
@selection_options
@click.option("--dry-run", is_flag=True, help="Show what would change; store nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as one JSON object.")
def reprice(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Price stored requests again with today's price book.

    Each request gets the price in force at its own time. The earlier price is kept as an earlier
    revision.
    """
    now = now_ns()
    selection = read_selection(now, **options)
    book = open_book()
    changes: dict[tuple[str, str | None], Change] = {}
    try:
        with store_problems():
            for changed in Store(home_folder()).reprice(book.price, selection, now, dry_run):
                usage = changed.before.usage
                key = (usage.provider, usage.model)
                changes.setdefault(key, Change(*key)).add(changed)
    except NothingStored as nothing:
        if not as_json:
            say(str(nothing))
            return
    ranked = sorted(changes.values(), key=lambda c: (-c.events, c.provider, c.model or ""))
    if as_json:
        print_json({"stored": not dry_run, "changes": [change.json() for change in ranked]})
    elif not ranked and not _matching(selection):
        say(no_match(selection, "reprice --dry-run"))
    else:
        say(_in_words(ranked, dry_run))


def _matching(selection: Selection) -> int:
    """How many stored requests are in the selection."""
    where, parameters = selection.where()
    with store_problems(), Store(home_folder()).reading() as reader:
        sql = f"SELECT count(*) FROM event WHERE {where}"  # noqa: S608 (values are bound)
        return int(reader.rows(sql, parameters)[0][0])


def _in_words(changes: list[Change], dry_run: bool) -> str:
    if not changes:
        return "Nothing changes: every request has today's price already."
    requests = count(sum(change.events for change in changes), "request")
    lines = [f"{requests} {'would change' if dry_run else 'changed'} price:"]
    lines += [f"  {change.words()}" for change in changes[:MODELS_SHOWN]]
    if len(changes) > MODELS_SHOWN:
        lines.append(f"  and {count(len(changes) - MODELS_SHOWN, 'more model')}: add --json")
    lines.append(
        "Nothing was stored. To store it, leave --dry-run out."
        if dry_run
        else "The earlier prices are kept as earlier revisions."
    )
    return "\n".join(lines)
