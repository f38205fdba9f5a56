"""What can go wrong with the store, in words for the person in front of it.

Every text says what happened, why if known, and what to do next; commands print it as it is.
"""

from __future__ import annotations


class StoreError(Exception):
    """Something about the store that a person must know; the text says what to do next."""


class NothingStored(StoreError):
    """There is no database yet, and no event waits for one."""


class StoreBusy(StoreError):
    """Another process kept the database locked for longer than we wait."""


class StoreUnusable(StoreError):
    """The disk is full, or files may not be read or written."""


class DatabaseDamaged(StoreError):
    """The database file cannot be read. It is never deleted."""


class DatabaseTooNew(StoreError):
    """The database was written by a newer version of this program or of DuckDB."""


def first_line(error: BaseException) -> str:
    """What a driver's error says, without the query that it repeats and the full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
