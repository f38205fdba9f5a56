"""DuckDB itself: the one place that imports it, and only when a database is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def driver() -> Any:
    """DuckDB's extension module alone: the `duckdb` package around it costs 80 ms at start-up."""
    try:
        import _duckdb
    except ImportError:
        import duckdb

        return duckdb
    return _duckdb


def quoted(path: Path) -> str:
    """A path as it stands between the quotes of an SQL string."""
    return str(path).replace("'", "''")
