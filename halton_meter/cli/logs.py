"""`halton-meter logs [-f]`: what the service has logged, wherever its log is.

Under systemd that is the journal, which `journalctl` reads; else a file in the data folder. A log
holds no prompt, answer or credential. Exit codes: 0 shown; 1 there is no log, or it cannot be read;
2 wrong usage.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import click

from halton_meter.cli.number import Whole
from halton_meter.cli.output import fail, note, say
from halton_meter.cli.systemd_unit import UNIT_NAME, UNIT_PATH, has_systemd
from halton_meter.problem import Problem

LINES = 50
LINES_MAX = 1_000_000  # more than are read of a file
READ_BYTES_MAX = 16 << 20  # of a file, from its end
FOLLOW_S = 0.5
FILES = {"uprobes": "daemon.log", "proxy": "proxy.log", "keylog": "keylog.log"}
_ABSENT = {
    "uprobes": "sudo halton-meter start",
    "proxy": "halton-meter start --via proxy",
    "keylog": "sudo halton-meter start --via keylog",
}


@click.command(
    epilog="""\b
Examples:
  halton-meter logs                      the last 50 lines
  halton-meter logs -f                   and what follows, until Ctrl-C
  halton-meter logs --via proxy -n 500
"""
)
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines, until Ctrl-C.")
@click.option("--lines", "-n", type=Whole(0, LINES_MAX), metavar="N", help="Default: 50.")
@click.option(
    "--via",
    type=click.Choice(["auto", "uprobes", "proxy", "keylog"]),
    default="auto",
    help="Which service; auto: the uprobes service where it has a log, else the local proxy.",
)
def logs(follow: bool, lines: int | None, via: str) -> None:
    """Show the log of the service. No prompt, answer or credential is in it.

    Where the service runs under systemd, its log is in the journal: that of the uprobes service
    needs sudo.
    """
    from halton_meter import accounts

    count = LINES if lines is None else lines
    if from_journal(via):
        _journal(["-u", UNIT_NAME], count, follow, "sudo halton-meter logs")
        return
    home = accounts.home_folder()
    found = _chosen(home, via)
    if found is None and via in ("auto", "proxy") and _users_unit() is not None:
        _journal(["--user", "-u", str(_users_unit())], count, follow, "halton-meter status")
        return
    if found is None:
        service = via if via in _ABSENT else "uprobes"
        what = f"there is no log in {home}: the service has not run in the background"
        fail(Problem(what, f"{_ABSENT[service]}   (what runs: halton-meter status)"))
    if via == "auto" and found.name == FILES["uprobes"] and (home / FILES["proxy"]).exists():
        note("the log of the local proxy: halton-meter logs --via proxy")
    try:
        _show_file(found, count, follow)
    except OSError as error:
        fail(
            Problem(f"{found} cannot be read: {error.strerror}", f"ls -l {shlex.quote(str(found))}")
        )


def from_journal(via: str | None) -> bool:
    """Whether the log that is asked for is the system service's, in the system's journal."""
    return (
        sys.platform == "linux"
        and via not in ("proxy", "keylog")
        and has_systemd()
        and UNIT_PATH.exists()
    )


def _chosen(home: Path, via: str) -> Path | None:
    """The file that holds the log; None where there is none."""
    names = [FILES[via]] if via in FILES else [*FILES.values()]
    return next((home / name for name in names if (home / name).exists()), None)


def _users_unit() -> str | None:
    """The unit of the local proxy that `init` installed for this user, under systemd."""
    from proxy_fallback.setup import service_files

    unit = Path.home() / ".config/systemd/user" / f"{service_files.UNIT}.service"
    return service_files.UNIT if sys.platform == "linux" and unit.exists() else None


def _journal(which: list[str], count: int, follow: bool, fix: str) -> None:
    command = ["journalctl", *which, "-n", str(count), "-o", "short-iso", "--no-pager", "-q"]
    try:
        done = subprocess.run([*command, *(["-f"] if follow else [])], check=False)
    except KeyboardInterrupt:
        return
    except OSError as error:
        fail(Problem(f"journalctl cannot be run: {error.strerror}", fix))
    if done.returncode:
        fail(Problem(f"journalctl ended with code {done.returncode}", fix))
    if os.geteuid() != 0 and "--user" not in which:
        note("without root, parts of the log may be missing; all of it: sudo halton-meter logs")


# --- a file ---------------------------------------------------------------------------------------


def _show_file(path: Path, count: int, follow: bool) -> None:
    """Print the last lines, and with `follow` what comes; names in it can move no cursor."""
    with _opened(path) as fd:
        end = os.fstat(fd).st_size
        start = max(0, end - READ_BYTES_MAX)
        raw = os.pread(fd, end - start, start)
    for line in deque(raw.decode(errors="replace").splitlines(), maxlen=count):
        say(line)
    if follow:
        with contextlib.suppress(KeyboardInterrupt):
            for line in _following(path, end):
                say(line)
                sys.stdout.flush()


def _following(path: Path, at: int) -> Iterator[str]:
    """New lines of a file, for ever. One that was made anew, or cut, is read from its beginning."""
    rest, known = b"", path.stat().st_ino
    while True:
        time.sleep(FOLLOW_S)
        with contextlib.suppress(FileNotFoundError), _opened(path) as fd:
            found = os.fstat(fd)
            if found.st_ino != known or found.st_size < at:
                rest, at, known = b"", 0, found.st_ino
            raw = os.pread(fd, min(found.st_size - at, READ_BYTES_MAX), at)
            at += len(raw)
            *lines, rest = (rest + raw).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
