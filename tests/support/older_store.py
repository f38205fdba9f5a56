"""Databases and journal lines as earlier versions of the program left them."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from halton_meter.model import PricedEvent
from halton_meter.store import Store, schema
from halton_meter.store.driver import driver
from halton_meter.store.rows import dumps, price_values, usage_values


def make_old(home: Path, version: int, events: Iterable[PricedEvent]) -> None:
    """A database as the program of that schema version left it."""
    with Store(home / "new") as new:
        new.append(events)
        new.flush()
    with contextlib.closing(driver().connect(str(home / "meter.duckdb"))) as old:
        old.execute(
            "CREATE TABLE schema_version (version INTEGER NOT NULL, "
            "applied_at TIMESTAMP NOT NULL DEFAULT current_timestamp)"
        )
        for number, script in enumerate(schema.MIGRATIONS[:version], start=1):
            if script:
                old.execute(script)
            old.execute("INSERT INTO schema_version (version) VALUES (?)", [number])
        old.execute(f"ATTACH '{new.database_path}' AS new (READ_ONLY)")
        columns = {name for (name, *_) in old.execute("DESCRIBE event").fetchall()}
        names = ", ".join(n for n in (*schema.EVENT_COLUMNS, "revision") if n in columns)
        old.execute(f"INSERT INTO event ({names}) SELECT {names} FROM new.event")
    new.database_path.unlink()


def old_line(event: PricedEvent) -> bytes:
    """A journal line of before lines had a form."""
    rest = dumps({**usage_values(event.usage), **price_values(event)})[1:]
    return b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)


def old_loss_line(cause: str, count: int) -> bytes:
    """A loss, likewise."""
    told = {"id": f"x:{cause}", "loss_cause": cause, "loss_count": count, "at_ns": 1}
    rest = json.dumps(told, separators=(",", ":")).encode()[1:]
    return b'{"crc":%d,%s\n' % (zlib.crc32(rest), rest)
