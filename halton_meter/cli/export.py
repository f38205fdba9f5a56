"""`halton-meter export`: stored events as a file for other tools.

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
from halton_meter.cli.output import harmless
from halton_meter.cli.selection import explained, now_ns, read_selection, selection_options
from halton_meter.contract import event_json
from halton_meter.store import NothingStored, Reader, Selection, Store
from halton_meter.store.errors import disk_trouble
from halton_meter.store.export import write_csv, write_parquet, write_sqlite


def _write_jsonl(reader: Reader, path: Path, selection: Selection) -> int:
    import orjson

    count = 0
    with path.open("xb") as file:
        for event in reader.events(selection):
            file.write(orjson.dumps(event_json(event)) + b"\n")
            count += 1
    return count


_WRITERS: dict[str, Callable[[Reader, Path, Selection], int]] = {
    "sqlite": write_sqlite,
    "csv": write_csv,
    "parquet": write_parquet,
    "jsonl": _write_jsonl,
}


@click.command(
    epilog="""\b
Examples:
  halton-meter export sqlite spend.sqlite                  tables projects, requests, …
  halton-meter export csv november.csv --from 2026-11-01 --to 2026-11-30
  halton-meter export parquet all.parquet --force          replace the last one
"""
)
@click.argument("form", metavar="sqlite|csv|parquet|jsonl", type=click.Choice(list(_WRITERS)))
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@selection_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def export(form: str, path: Path, force: bool, **options: Any) -> None:
    """Write events to SQLite, CSV, Parquet or JSON lines; money exact, times in UTC."""
    selection = read_selection(now_ns(), **options)
    if path.exists() and not force:
        raise click.ClickException(f"{path} exists. Replace it with --force, or name another.")
    if path.exists() and not path.is_file():
        raise click.ClickException(f"{path} is no file to be replaced. Name another.")
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with explained(), Store(home_folder()).reading() as reader, _told_of(path):
            count = _written(_WRITERS[form], reader, part, selection)
            os.replace(part, path)
    except NothingStored as nothing:
        raise click.ClickException(str(nothing)) from nothing
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    click.echo(harmless(f"{count:,} events in {path}"))


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Say of what cannot be written where it was to go: it need not be where the store is."""
    try:
        yield
    except OSError as error:
        folder = path.absolute().parent
        why = disk_trouble(error, folder)
        if error.errno == errno.ENOENT:
            why = f"there is no folder {folder}. Make it: mkdir -p {shlex.quote(str(folder))}"
        raise click.ClickException(f"Cannot write {path}: {why}.") from error


def _written(
    write: Callable[[Reader, Path, Selection], int], reader: Reader, part: Path, chosen: Selection
) -> int:
    before = os.umask(0o077)  # what was spent on what is nobody else's business
    try:
        return write(reader, part, chosen)
    finally:
        os.umask(before)
