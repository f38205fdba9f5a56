"""Ctrl-C while DuckDB works.

It looks for signals in its own code, and an exception that a handler raises there may end the
process (SIGABRT, "Critical … KeyboardInterrupt"). So the interrupt is noted, the query is ended,
and KeyboardInterrupt raised behind it, in our code. One that comes in the microseconds before the
query begins does not end it; the next one does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@contextlib.contextmanager
def held_back(connection: DuckDBPyConnection | None = None) -> Iterator[None]:
    """Hold Ctrl-C back while a call of DuckDB's runs; it ends a query of `connection`'s early."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if connection is not None:
            connection.interrupt()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception:
        if not came:  # else it is of the query that was ended
            raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
