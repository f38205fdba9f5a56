"""`halton-meter export`: stored requests as a file for other tools.

The file appears whole or not at all. Exit codes: 0 done; 1 nothing stored, or the file exists or
cannot be written; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.output import count, fail, say
from halton_meter.cli.selection import now_ns, read_selection, selection_options, store_problems
from halton_meter.contract import event_json
from halton_meter.problem import Problem
from halton_meter.store import NothingStored, Reader, Selection, Store
from halton_meter.store.errors import disk_trouble
from halton_meter.store.export import write_csv, write_parquet, write_sqlite


def _write_jsonl(reader: Reader, path: Path, selection: Selection) -> int:
    import orjson

    written = 0
    with path.open("xb") as file:
        for event in reader.events(selection):
            file.write(orjson.dumps(event_json(event)) + b"\n")
            written += 1
    return written


_WRITERS: dict[str, Callable[[Reader, Path, Selection], int]] = {
    "sqlite": write_sqlite,
    "csv": write_csv,
    "parquet": write_parquet,
    "jsonl": _write_jsonl,
}


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter export sqlite spend.sqlite                  tables projects, requests, …
  halton-meter export csv november.csv --from 2026-11-01 --to 2026-11-30
  halton-meter export jsonl spend.jsonl --since 7d         as `events --json` prints them
  halton-meter export parquet all.parquet --force          replace an earlier file
""",
)
@click.argument("form", metavar="sqlite|csv|parquet|jsonl", type=click.Choice(list(_WRITERS)))
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@selection_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def export(form: str, path: Path, force: bool, **options: Any) -> None:
    """Write stored requests to a SQLite, CSV, Parquet or JSON lines file.

    Money is exact and times are in UTC. The file appears whole or not at all.
    """
    selection = read_selection(now_ns(), **options)
    if path.exists() and not force:
        fail(Problem(f"{path} exists", "add --force to replace it, or name another file"))
    if path.exists() and not path.is_file():
        fail(Problem(f"{path} is not a regular file", "name another file"))
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with store_problems(), Store(home_folder()).reading() as reader, _disk_problems(path):
            written = _written(_WRITERS[form], reader, part, selection)
            os.replace(part, path)
    except NothingStored as nothing:
        fail(Problem(str(nothing), ""))
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    say(f"{count(written, 'request')} in {path}")


@contextlib.contextmanager
def _disk_problems(path: Path) -> Iterator[None]:
    """Fail with the folder that cannot be written: it need not be where the store is."""
    try:
        yield
    except OSError as error:
        folder = path.absolute().parent
        if error.errno == errno.ENOENT:
            what = f"cannot write {path}: there is no folder {folder}"
            fail(Problem(what, f"mkdir -p {shlex.quote(str(folder))}"))
        fail(Problem(f"cannot write {path}: {disk_trouble(error, folder)}", ""))


def _written(
    write: Callable[[Reader, Path, Selection], int], reader: Reader, part: Path, chosen: Selection
) -> int:
    before = os.umask(0o077)  # no other user may read what was spent
    try:
        return write(reader, part, chosen)
    finally:
        os.umask(before)
