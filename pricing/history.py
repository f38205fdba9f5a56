"""Price histories as data: what changed between two, what may not change, and how one is written.

A history is a provider's models, each with its names and dated rows. Rows are appended, never
altered: a row's identity is (model, from, when, hours), and a second row of one identity with
other rates is a conflict. Used by the maintainers' compiler and by `pricing refresh`, so that
neither can reprice the past. This file refuses to read or write files.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping
from typing import Any

History = dict[str, dict[str, Any]]
Change = tuple[str, str]  # (model, what happened, in words)

_NOT_RATES = frozenset({"from", "when", "hours", "days", "checked", "source", "note", "evidence"})
# What ends a TOML string or may not stand in one as it is: control characters, C1's for the reader.
_NOT_PLAIN = re.compile(r'[\x00-\x1f\x7f-\x9f\\"]')


def row_identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes two rows rows of the same price."""
    when = ",".join(f"{k}={v}" for k, v in sorted(row.get("when", {}).items()))
    days = ",".join(map(str, row.get("days", ())))
    return (str(row.get("from", "")), when, "-".join(row.get("hours", ())), days)


def rates_in(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's rates and tiers, without its date and conditions."""
    return {key: value for key, value in row.items() if key not in _NOT_RATES}


def merged(old: History, new: History) -> tuple[History, list[Change], list[str]]:
    """`old` with the models, names and rows of `new` added: (history, changes, conflicts)."""
    result: History = {}
    changes: list[Change] = []
    conflicts: list[str] = []
    for model in (*old, *(m for m in new if m not in old)):
        was, now = old.get(model), new.get(model)
        if was is None:
            assert now is not None
            result[model] = now
            words = f"new, {_in_words(now['price'][0])}" if now["price"] else "further names"
            changes.append((model, words))
            continue
        if now is None:
            result[model] = was
            changes.append((model, "no longer listed upstream; its history is kept"))
            continue
        rows = list(was["price"])
        have = {row_identity(row): row for row in rows}
        for row in now["price"]:
            known = have.get(row_identity(row))
            if known is None:
                rows.append(row)
                changes.append((model, f"new price {_in_words(row)}"))
            elif rates_in(known) != rates_in(row):
                conflicts.append(f"{model}: {_in_words(known)} is recorded; now {_in_words(row)}")
        names = sorted({*was["names"], *now["names"]})
        if added := sorted({*now["names"]} - {*was["names"]}):
            changes.append((model, "also called " + ", ".join(added)))
        result[model] = {**was, "names": names, "price": rows}
    return result, changes, conflicts


def _in_words(row: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{name} ${value}" for name, value in rates_in(row).items() if name != "tiers"
    )
    words = rates or ("free" if "when" not in row else "as standard")
    if tiers := row.get("tiers"):
        words += f" (+{len(tiers)} long-context tiers)"
    if when := row.get("when"):
        words += " for " + ", ".join(f"{k}={v}" for k, v in when.items())
    if "hours" in row:
        words += " at {}-{} UTC".format(*row["hours"])
    return words + (f" from {row['from']}" if "from" in row else "")


def describe(provider: str, changes: list[Change]) -> Iterator[str]:
    """The changes as lines for a person."""
    for model, what in changes:
        yield f"{provider} {model}: {what}"


# --- writing -----------------------------------------------------------------------------------


def rendered(
    provider: str, upstream: str, compiled: dt.date, history: History, script: str = "compile.py"
) -> str:
    """The history as the TOML of `pricing/data`; `book.py` relies on its layout.

    Every model is a section that starts with a line "[[model]]" and holds its names on one line,
    so that a section can be found without parsing the file, and parsed alone.
    """
    lines = [
        f"# Prices of {provider}, compiled by tools/prices/{script}: add to the overlay instead.",
        "# Tokens, characters: USD per million; _k: per thousand; _each: per one; hours: per hour.",
        f'provider = "{provider}"',
        f"upstream = {toml_value(upstream)}",
        f"compiled = {compiled}",
    ]
    for model, entry in history.items():
        lines += ["", "[[model]]", f"id = {toml_value(model)}"]
        lines += [
            f"names = {toml_value(entry['names'])}",
            f"source = {toml_value(entry['source'])}",
        ]
        for row in entry["price"]:
            lines.append("[[model.price]]")
            lines += [f"{_key(key)} = {toml_value(value)}" for key, value in row.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if name.replace("_", "").isalnum() else f'"{name}"'


def toml_value(value: Any) -> str:
    """`value` as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, dt.date)):
        return str(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return f'"{_NOT_PLAIN.sub(_escaped, str(value))}"'


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if character in '\\"':
        return f"\\{character}"
    return "\\n" if character == "\n" else f"\\u{ord(character):04x}"
