"""Opening the DuckDB file: waiting for whoever has it, making it, naming what is wrong with it.

One process may write, or many may read; DuckDB locks the file between processes. So whoever opens
it closes it soon, and whoever meets a lock waits and then says who to look for.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from halton_meter import installed
from halton_meter.store.driver import driver
from halton_meter.store.errors import (
    DatabaseDamaged,
    DatabaseTooNew,
    NothingStored,
    StoreBusy,
    StoreError,
    StoreUnusable,
    first_line,
)
from halton_meter.store.home import DATABASE_NAME, Home
from halton_meter.store.interrupts import held_back
from halton_meter.store.rewriting import compact, rewrite
from halton_meter.store.schema import is_newest, migrate, needs_rewriting, version_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# How long a reader waits for a writer. One batch takes some 0.1 s.
BUSY_WAIT_SECONDS = 10.0
BUSY_POLL_SECONDS = 0.02
_DAMAGED = f"{DATABASE_NAME}.damaged-"


class Database:
    """The database file of a home; one that `puts_aside` a damaged file moves it away."""

    def __init__(self, home: Home, puts_aside: bool = False) -> None:
        self._home, self._puts_aside = home, puts_aside
        self._path = home.database

    def open_for_reading(self, wait_seconds: float) -> DuckDBPyConnection:
        """A read-only connection; an older database is migrated first."""
        connection = self._connect(self._path, True, wait_seconds)
        if is_newest(connection):
            return connection
        connection.close()
        self.open_for_writing(wait_seconds).close()
        return self._connect(self._path, True, wait_seconds)

    def open_for_writing(self, wait_seconds: float) -> DuckDBPyConnection:
        """A connection to a database of the newest version, made where there is none.

        Raises DatabaseDamaged, before which the file is put aside where that is wanted.
        """
        self._home.make_directories()
        if not self._path.exists():
            self._create()
        connection = self._open(wait_seconds)
        try:
            if needs_rewriting(connection):
                connection.close()
                rewrite(self._home, self._open, wait_seconds)
                connection = self._open(wait_seconds)
            migrate(connection)
        except BaseException:
            connection.close()
            raise
        self._home.own_database()
        return connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[DuckDBPyConnection]:
        """A connection in a transaction that is committed at the end, unless that raises.

        A full disk refuses the commit, mostly: StoreUnusable, and nothing has changed.
        """
        connection = self.open_for_writing(BUSY_WAIT_SECONDS)
        try:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        except driver().ProgrammingError:  # a fault of ours, not the disk's
            raise
        except driver().Error as error:
            raise StoreUnusable(
                f"Nothing was changed, {self._path} cannot be written: {first_line(error)}. "
                f"See: df -h {self._home.path}"
            ) from error
        finally:
            connection.close()
            self._home.own_database()

    def compact(self) -> None:
        """Copy the file without its free blocks. Raises StoreBusy, StoreUnusable."""
        compact(self._home, self._open, BUSY_WAIT_SECONDS)
        self._home.own_database()

    def schema_version(self) -> int:
        """The file's version as it is; it is not migrated. Raises what opening it raises."""
        with contextlib.closing(self._connect(self._path, True, 0)) as connection:
            return version_of(connection)

    def size_bytes(self) -> int:
        """The file and its log on disk; 0 where there is none."""
        log = self._path.with_name(f"{DATABASE_NAME}.wal")
        found = 0
        for path in (self._path, log):
            with contextlib.suppress(OSError):
                found += path.stat().st_size
        return found

    def _open(self, wait_seconds: float) -> DuckDBPyConnection:
        try:
            return self._connect(self._path, False, wait_seconds)
        except DatabaseDamaged as error:
            if not self._puts_aside:
                raise
            raise self._put_aside(error) from error

    def _create(self) -> None:
        """Make the database elsewhere and give it its name when it is whole: a crash or a full
        disk must not leave half a file, and no reader may see one without tables.
        """
        path = Path(os.path.realpath(self._path))  # of a link, what it leads to
        unfinished = path.with_name(f"{DATABASE_NAME}.new-{os.getpid()}-{threading.get_ident()}")
        log = unfinished.with_name(f"{unfinished.name}.wal")
        try:
            with contextlib.closing(self._connect(unfinished, False, 0)) as connection:
                unfinished.chmod(0o600)
                migrate(connection)
            self._name_database(unfinished, path)
        except (driver().Error, DatabaseDamaged) as error:
            raise StoreUnusable(
                f"Cannot make {self._path}: {first_line(error)}. See: df -h {self._home.path}"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
            log.unlink(missing_ok=True)

    def _name_database(self, unfinished: Path, path: Path) -> None:
        try:
            os.link(unfinished, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # a file system without hard links
            if not path.exists():
                os.rename(unfinished, path)

    def _connect(self, path: Path, read_only: bool, wait_seconds: float) -> DuckDBPyConnection:
        with held_back():
            duckdb = driver()
        deadline = time.monotonic() + wait_seconds
        # Nothing may be downloaded at run time, not even because a query names a function.
        config = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
        while True:
            try:
                with held_back():
                    opened: DuckDBPyConnection = duckdb.connect(
                        str(path), read_only=read_only, config=config
                    )
            except duckdb.Error as error:
                problem = self._open_problem(error)
                if not isinstance(problem, StoreBusy) or time.monotonic() >= deadline:
                    raise problem from error
            else:
                # Of a query of some seconds it would print one on stdout, between our lines.
                opened.execute("SET enable_progress_bar = false")
                return opened
            time.sleep(BUSY_POLL_SECONDS)

    def _open_problem(self, error: Exception) -> StoreError:
        text, path = str(error), self._path
        if any(
            sign in text
            for sign in ("set lock", "different configuration", "already open", "already attached")
        ):
            return StoreBusy(
                f"Another process keeps {path} locked. Close it there (who: fuser -v {path}), "
                "then run this command again."
            )
        if "does not exist" in text:
            return NothingStored(
                f"{path} was damaged and has just been moved away. Run this command again."
            )
        if any(sign in text for sign in ("version number", "newer version", "storage version")):
            return DatabaseTooNew(
                f"{path} was written by a newer DuckDB: {first_line(error)}. "
                f"{installed.update(' and DuckDB')}."
            )
        if any(
            sign in text
            for sign in (
                "Permission denied",
                "No space left",
                "Read-only file",
                "File too large",
                "Disk quota",
                "Cannot open file",
            )
        ):
            return StoreUnusable(f"Cannot open {path}: {first_line(error)}. See: ls -l {path}")
        return DatabaseDamaged(
            f"{path} is damaged: {first_line(error)}. Nothing was changed; new events wait in "
            f"the journal. Keep the file and start a new one: mv {path} {path}.damaged"
        )

    def put_aside(self) -> list[Path]:
        """Damaged databases that are kept, oldest first."""
        with contextlib.suppress(OSError):
            names = sorted(n for n in os.listdir(self._home.path) if n.startswith(_DAMAGED))
            return [self._home.path / name for name in names if not name.endswith(".wal")]
        return []

    def _put_aside(self, error: DatabaseDamaged) -> DatabaseDamaged:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        kept = self._path.with_name(f"{_DAMAGED}{stamp}")
        os.replace(self._path, kept)
        log = self._path.with_name(f"{DATABASE_NAME}.wal")
        with contextlib.suppress(FileNotFoundError):
            os.replace(log, kept.with_name(f"{kept.name}.wal"))
        cause = first_line(error.__cause__ or error)
        return DatabaseDamaged(
            f"{self._path} is damaged: {cause}. It is kept as {kept}; the next events go "
            "to a new file, and those in the journal are safe. Run: halton-meter report"
        )
