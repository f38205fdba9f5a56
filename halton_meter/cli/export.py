"""`halton-meter export`: stored requests as a file for other tools, or through a pipe.

A file appears whole or not at all. "-" is standard output, and what is there already and no file (a
pipe, a terminal, /dev/stdout) is written into. Exit codes: 0 done; 1 nothing stored, or the file
exists or cannot be written; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.named import FilePath, file_of, stream_of
from halton_meter.cli.output import count, fail, note, say
from halton_meter.cli.selection import (
    no_match,
    now_ns,
    read_selection,
    selection_options,
    store_problems,
)
from halton_meter.cli.signalled import ended_in_order
from halton_meter.cli.streams import names_stdout
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
    "json": _write_jsonl,
}
_ANOTHER = "name a file in another folder"
_BINARY = frozenset({"sqlite", "parquet"})


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter export sqlite spend.sqlite                  tables projects, requests, …
  halton-meter export csv november.csv --from 2026-11-01 --to 2026-11-30
  halton-meter export jsonl spend.jsonl --since 7d         as `events --json` prints them
  halton-meter export parquet all.parquet --force          replace an earlier file
  halton-meter export csv - --today | head                 to standard output
""",
)
@click.argument("form", metavar="sqlite|csv|parquet|jsonl", type=click.Choice(list(_WRITERS)))
@click.argument("path", type=FilePath(dir_okay=False, allow_dash=True))
@selection_options
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def export(form: str, path: str, force: bool, **options: Any) -> None:
    """Write stored requests to a SQLite, CSV, Parquet or JSON lines file; "-" is standard output.

    Money is exact and times are in UTC. The file appears whole or not at all. In CSV, a name that a
    spreadsheet would run as a formula has an apostrophe before it.
    """
    selection = read_selection(now_ns(), **options)
    if (stream := stream_of(path)) is not None:
        _into_stream(form, stream, selection, path)
    else:
        _new_file(form, Path(path), selection, force)


def _new_file(form: str, path: Path, selection: Selection, force: bool) -> None:
    if path.exists() and not force:
        fail(Problem(f"{path} exists", "add --force to replace it, or name another file"))
    target = file_of(path)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        written = _exported(form, part, selection, path)
        with _disk_problems(path):
            os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    say(f"{count(written, 'request')} in {path}")
    if not written:
        say(no_match(selection, "events"))


def _exported(form: str, part: Path, selection: Selection, path: Path) -> int:
    """Write a new file; the number of requests. `path` is what the user has named."""
    try:
        with store_problems(), Store(home_folder()).reading() as reader, _disk_problems(path):
            return _written(_WRITERS[form], reader, part, selection)
    except NothingStored as nothing:
        fail(Problem(str(nothing), ""))


# --- through a pipe -------------------------------------------------------------------------------


def _into_stream(form: str, stream: BinaryIO, selection: Selection, path: str) -> None:
    """Write into what is there already, once all of it could be read."""
    if form in _BINARY and stream.isatty():
        where = "standard output" if names_stdout(path) else path
        what = f"{form} is not text, and {where} is a terminal"
        fail(Problem(what, f"halton-meter export {form} spend.{form}"))
    with ended_in_order(), tempfile.TemporaryDirectory(prefix="halton-meter-") as folder:
        part = Path(folder) / "export"
        if not _exported(form, part, selection, part):
            note(no_match(selection, "events"))
        try:
            with part.open("rb") as whole:
                shutil.copyfileobj(whole, stream)
            stream.flush()
        except BrokenPipeError:  # its reader has seen enough
            return
        except OSError as error:
            fail(Problem(f"cannot write into {path}: {error.strerror}", "df -h"))
        finally:
            if stream is not sys.stdout.buffer:
                with contextlib.suppress(OSError):
                    stream.close()


@contextlib.contextmanager
def _disk_problems(path: Path) -> Iterator[None]:
    """Fail with the folder that cannot be written: it need not be where the store is."""
    try:
        yield
    except OSError as error:
        folder = file_of(path).parent
        if error.errno == errno.ENOENT and folder.is_dir():  # of the kernel's, as /proc
            fail(Problem(f"cannot write {path}: {folder} takes no new files", _ANOTHER))
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
