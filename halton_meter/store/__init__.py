"""Keep priced events: a journal on disk first, then one DuckDB file; and read them back whole.

Only this package imports a database, and it does so inside functions: a command that stores
nothing pays nothing. It refuses to know how events were captured, parsed or priced, and which
questions are asked of them (`report.py`). Start at `store.py`; from there `journal.py` and
`intake.py` are the way in, `schema.py` and `rows.py` how an event lies in the file, `reader.py`,
`following.py` and `export.py` the ways out.
"""

from __future__ import annotations

from halton_meter.store.errors import (
    DatabaseDamaged,
    DatabaseTooNew,
    NothingStored,
    StoreBusy,
    StoreError,
    StoreUnusable,
)
from halton_meter.store.journal import Flushed
from halton_meter.store.keys import account_key, known_account_key
from halton_meter.store.reader import Reader, Selection
from halton_meter.store.store import Repriced, Retagged, Store

__all__ = [
    "DatabaseDamaged",
    "DatabaseTooNew",
    "Flushed",
    "NothingStored",
    "Reader",
    "Repriced",
    "Retagged",
    "Selection",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreUnusable",
    "account_key",
    "known_account_key",
]
