"""A database, copied into a new file without what may not be kept, or without what was deleted.

Changed in place, the old text would stay in blocks of the file that are free. So all tables are
copied, a piece at a time, into a new file that gets the database's name when it is whole. Until
then the old one is as it was: a kill, a full disk or a lock costs nothing but the work, which
begins again at the next opening. Whoever comes meanwhile waits, or leaves events in the journal.
"""

# ruff: noqa: S608 (names of tables come from the database's own catalogue, in quotes; values are bound)

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter.store.cleaning import cleaned, cleaned_line
from halton_meter.store.driver import driver, quoted
from halton_meter.store.errors import StoreBusy, StoreUnusable, first_line
from halton_meter.store.home import DATABASE_NAME, Home
from halton_meter.store.rows import dumps, loads
from halton_meter.store.schema import REWRITTEN_VERSION, migrate_in_place, needs_rewriting
from halton_meter.whole_file import replacing

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# Events copied at a time; it bounds memory and the size of one transaction.
ROWS_AT_ONCE = 20_000
# After so many pieces the new file is closed and opened again, which frees what it kept in memory.
PIECES_BEFORE_REOPENING = 25
POLL_SECONDS = 0.02

Open = Callable[[float], "DuckDBPyConnection"]


def rewrite(home: Home, open_old: Open, wait_seconds: float) -> None:
    """Bring an older database to the version that needs a new file, in one.

    `open_old` opens it for writing. Raises StoreBusy when another process has it, or is at the same
    work, for longer than `wait_seconds`; StoreUnusable when the new file cannot be written.
    """
    deadline = time.monotonic() + wait_seconds
    with _alone(home, deadline):
        while True:
            with contextlib.closing(open_old(max(0.0, deadline - time.monotonic()))) as old:
                if not needs_rewriting(old):
                    return  # another process was faster
                migrate_in_place(old)
                old.execute("FORCE CHECKPOINT")
            with _copy_of(home) as copy:
                if copy is not None:
                    _clean_refused(home.journal / "refused")
                    _copy_tables(copy, _unfinished(home), cleaning=True)
                    _finish(home, copy)
                    return
            _wait(home, deadline)


def compact(home: Home, open_old: Open, wait_seconds: float) -> None:
    """Copy the database without its free blocks, so that nothing of what was deleted stays.

    Raises StoreBusy and StoreUnusable as `rewrite` does; the database is as it was then.
    """
    deadline = time.monotonic() + wait_seconds
    with _alone(home, deadline):
        while True:
            with contextlib.closing(open_old(max(0.0, deadline - time.monotonic()))) as old:
                old.execute("FORCE CHECKPOINT")
            with _copy_of(home) as copy:
                if copy is not None:
                    _copy_tables(copy, _unfinished(home), cleaning=False)
                    _finish(home, copy)
                    return
            _wait(home, deadline)


@contextlib.contextmanager
def _alone(home: Home, deadline: float) -> Iterator[None]:
    """Of several processes, let one do it. The lock goes with the process that has it."""
    import fcntl

    # Not the data folder itself: a service that runs has that one locked.
    fd = os.open(home.journal, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _wait(home, deadline)
        yield
    finally:
        os.close(fd)


def _wait(home: Home, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise StoreBusy(
            f"Another process is migrating or copying {home.database}. "
            "Wait until it is done, then run this command again."
        )
    time.sleep(POLL_SECONDS)


def _unfinished(home: Home) -> Path:
    return home.database.with_name(f"{DATABASE_NAME}.rewritten")


def _log(path: Path) -> Path:
    return path.with_name(f"{path.name}.wal")


@contextlib.contextmanager
def _copy_of(home: Home) -> Iterator[DuckDBPyConnection | None]:
    """The old database, which nobody can write to now, and an empty new one beside it.

    None when somebody wrote to the old one, or does, since it was looked at.
    """
    problem, unfinished = driver(), _unfinished(home)
    connection = problem.connect(":memory:")
    try:
        connection.execute("SET temp_directory = ''; SET threads = 1")
        try:
            connection.execute(f"ATTACH '{quoted(home.database)}' AS old (READ_ONLY)")
        except problem.IOException:
            yield None
            return
        if _log(home.database).exists():
            yield None
            return
        for left in (unfinished, _log(unfinished)):  # by one that was killed
            left.unlink(missing_ok=True)
        connection.execute(f"ATTACH '{quoted(unfinished)}' AS new")
        unfinished.chmod(0o600)
        yield connection
    except (problem.Error, OSError) as error:
        raise StoreUnusable(
            f"Cannot migrate {home.database}: {first_line(error)}. It is unchanged. "
            f"A copy needs as much space again; see: df -h {home.path}"
        ) from error
    finally:
        connection.close()
        unfinished.unlink(missing_ok=True)
        _log(unfinished).unlink(missing_ok=True)


def _copy_tables(connection: DuckDBPyConnection, unfinished: Path, *, cleaning: bool) -> None:
    """All tables, a person's own too; with `cleaning`, events without what may not be kept."""
    connection.execute("COPY FROM DATABASE old TO new (SCHEMA)")
    found = connection.execute(
        "SELECT schema_name, table_name FROM duckdb_tables() WHERE database_name = 'old'"
    ).fetchall()
    for schema, table in found:
        if (schema, table) == ("main", "event"):
            _copy_events(connection, unfinished, cleaning)
        else:
            name = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, table))
            connection.execute(f"INSERT INTO new.{name} SELECT * FROM old.{name}")
    if not cleaning:
        return
    connection.execute(
        "INSERT INTO new.schema_version (version) SELECT unnest(range(max(version) + 1, ?)) "
        "FROM old.schema_version",
        [REWRITTEN_VERSION + 1],
    )


_ARGV = "usage_document->'$.process.argv'"
_CLEAN = (
    "CASE WHEN c.argv IS NULL THEN usage_document ELSE json_merge_patch(usage_document, "
    "json_object('process', json_object('argv', CAST(c.argv AS JSON)))) END"
)


def _copy_events(connection: DuckDBPyConnection, unfinished: Path, cleaning: bool) -> None:
    rows = connection.execute("SELECT max(rowid) + 1 FROM old.event").fetchall()[0][0] or 0
    for number, first in enumerate(range(0, rows, ROWS_AT_ONCE)):
        if number and number % PIECES_BEFORE_REOPENING == 0:
            connection.execute("CHECKPOINT new")
            connection.execute("DETACH new")
            connection.execute(f"ATTACH '{quoted(unfinished)}' AS new")
        piece = f"rowid >= {first} AND rowid < {first + ROWS_AT_ONCE}"
        if not cleaning:
            connection.execute(f"INSERT INTO new.event SELECT * FROM old.event WHERE {piece}")
            continue
        found = connection.execute(
            f"SELECT DISTINCT CAST({_ARGV} AS VARCHAR) FROM old.event WHERE {piece}"
        ).fetchall()
        texts = [text for (text,) in found if text is not None]
        connection.execute("CREATE OR REPLACE TABLE memory.main.clean (was VARCHAR, argv VARCHAR)")
        connection.execute(
            "INSERT INTO clean SELECT unnest(?), unnest(?)",
            [texts, [dumps(cleaned(loads(text))).decode() for text in texts]],
        )
        connection.execute(
            f"INSERT INTO new.event SELECT e.* REPLACE ({_CLEAN} AS usage_document) "
            f"FROM (SELECT * FROM old.event WHERE {piece}) e "
            f"LEFT JOIN clean c ON CAST(e.{_ARGV} AS VARCHAR) = c.was"
        )


def _finish(home: Home, connection: DuckDBPyConnection) -> None:
    """Give the copy the database's name, while still nobody can write to the old one."""
    connection.execute("CHECKPOINT new")
    connection.execute("DETACH new")
    unfinished = _unfinished(home)
    if (owner := home.file_owner()) is not None:
        os.chown(unfinished, *owner, follow_symlinks=False)
    os.rename(unfinished, home.database)


def _clean_refused(path: Path) -> None:
    """The lines that the database refused, which are kept beside it."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as old, replacing(path) as new:
            new.writelines(line for each in old if (line := cleaned_line(each)))
            status = os.fstat(old.fileno())
            os.fchown(new.fileno(), status.st_uid, status.st_gid)
