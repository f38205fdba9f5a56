"""Changes one value or table of a TOML file that a person wrote: comments, order and style stay.

Takes and gives text; who calls it reads and writes the file (`config_file.py`). tomlkit does the
work; it is imported when something is changed. This file knows no key.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any


def changed(text: str, path: Sequence[str], value: Any) -> str:
    """The text with this value at the end of `path`; tables on the way are made.

    A mapping is merged into a table that is there: keys that it does not have stay. Raises
    ValueError where something on the way is no table.
    """
    import tomlkit
    from tomlkit.items import AbstractTable

    document = tomlkit.parse(text)
    table: Any = document
    *way, last = path
    for depth, name in enumerate(way):
        if name not in table:
            # A table of tables needs no line of its own: [budgets.daily] says it all.
            table.add(name, tomlkit.table(is_super_table=depth < len(way)))
        table = table[name]
        if not isinstance(table, AbstractTable | Mapping):
            raise ValueError(f"{'.'.join(path[: depth + 1])} is no table")
    if isinstance(value, Mapping):
        if last not in table:
            table.add(last, tomlkit.table())
        inner: Any = table[last]
        if not isinstance(inner, MutableMapping):
            raise ValueError(f"{'.'.join(path)} is no table")
        for key, each in value.items():
            inner[key] = each
    else:
        table[last] = value
    return tomlkit.dumps(document)


def removed(text: str, path: Sequence[str]) -> str:
    """The text without what `path` leads to, and without tables that are empty then. Raises
    KeyError where there is nothing."""
    import tomlkit

    document = tomlkit.parse(text)
    tables: list[Any] = [document]
    for name in path[:-1]:
        tables.append(tables[-1][name])
    del tables[-1][path[-1]]
    for table, name in zip(reversed(tables[:-1]), reversed(path[:-1]), strict=True):
        if not len(table[name]):
            del table[name]
    return tomlkit.dumps(document)
