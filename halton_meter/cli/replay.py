"""`halton-meter replay`: recorded packet captures to priced requests, without a service.

Thin by rule: `capture.pcap` reads, `halton_meter.meter` meters, `halton_meter.store` keeps. This
file finds the files, prints, and decides the exit code: 0 done; 1 something could not be read
(the reason and the fix on stderr); 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import select
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.cli.book import open_book
from halton_meter.cli.configured import Configured
from halton_meter.cli.losses import losses_in_words, sightings_in_words
from halton_meter.cli.named import FilePath, file_name
from halton_meter.cli.number import Whole
from halton_meter.cli.output import (
    OUTCOMES,
    complain,
    count,
    fail,
    local_time,
    money_text,
    name_typed,
    note,
    outcome_text,
    price_text,
    say,
    shown,
    sum_words,
    write_json_lines,
    wrong_usage,
    zone_text,
)
from halton_meter.cli.signalled import ended_in_order
from halton_meter.cli.streams import OutputRefused, reader_left
from halton_meter.contract import event_json, usd_text
from halton_meter.identity import ID_REPEATED
from halton_meter.model import Outcome, PricedEvent, total_usd
from halton_meter.problem import Problem
from halton_meter.sightings import HeldSightings

if TYPE_CHECKING:
    from capture.packets.findings import Findings
    from halton_meter.store import Store

SUFFIXES = (".pcap", ".pcapng", ".cap", ".pcap.gz", ".pcapng.gz", ".cap.gz")
UNPACK_RATIO_MAX = 1_000_000_000
# Captures below this size are read too fast for a progress line.
PROGRESS_BYTES_MIN = 20 << 20
# Events handed to the store at a time.
STORE_BATCH = 500
# How long the database may be busy with another process before events stay in the journal.
STORE_WAIT_SECONDS = 10.0
# Bytes of standard input that tell whether it is a capture.
START_BYTES = 64 << 10
PIECE_BYTES, WAIT_S = 1 << 20, 0.5
# Bytes read at each end of a capture to identify it.
IDENTITY_BYTES = 64 << 10
# Events held back because a better sighting of the same request may still come, and ids of events
# that had to be printed before one came.
HELD_EVENTS_MAX = 10_000
PRINTED_EVENTS_MAX = 65_536
NAME_CHARACTERS_MAX = 300  # of a file, in an error
# Host names listed in a message.
HOSTS_SHOWN = 8

_OWN_HOSTS = (
    "To meter hosts of your own, name them in config.toml: "
    'openai_compatible_hosts = ["llm.example.com"]'
)
_STDIN, _STDIN_NAME = "-", "standard input"
_STDIN_FILE = re.compile(rf"\S*/{_STDIN_NAME}(?=:| )")
_CAPTURES = (
    "name pcap or pcapng files, a folder that holds some, a glob pattern, or - for standard input"
)
_WHAT_IT_IS = "see what it is: file FILE"
_LINKS_READ = "Ethernet, PPPoE, raw IP, loopback, Linux cooked (-i any), macOS's pktap"


@dataclass
class Summary:
    """The sums of the summary."""

    events: int = 0
    total_usd: Decimal = Decimal(0)
    unpriced: int = 0
    implausible: int = 0
    gapped: int = 0
    aborted: int = 0
    told_apart: int = 0
    seen_again: int = 0
    stored_before: int = 0
    stored_as_one: int = 0
    models: Counter[str] = field(default_factory=Counter)

    def add(self, event: PricedEvent) -> None:
        """Count one request."""
        self.events += 1
        if event.implausible:
            self.implausible += 1
        elif event.list_usd is None:
            self.unpriced += 1
        else:
            self.total_usd = total_usd((self.total_usd, event.list_usd)) or Decimal(0)
        self.gapped += event.usage.outcome is Outcome.GAPPED
        self.aborted += event.usage.outcome is Outcome.ABORTED
        self.told_apart += ID_REPEATED in event.usage.flags


def find_captures(arguments: Sequence[str]) -> tuple[list[Path], list[Problem]]:
    """The capture files that files, folders and glob patterns name, and a problem for each miss."""
    found: dict[Path, None] = {}
    problems: list[Problem] = []
    for argument in arguments:
        try:
            named = _named_by(argument)
        except OSError as error:
            what = f"{shown(argument, NAME_CHARACTERS_MAX)}: {error.strerror or error}"
            problems.append(Problem(what, _CAPTURES))
            continue
        if not named and Path(argument).is_dir():
            what = f"{argument}: no captures ({', '.join(SUFFIXES[:3])}) in this folder"
            problems.append(Problem(what, _CAPTURES))
        elif not named:
            problems.append(Problem(f"{argument}: no such file", _CAPTURES))
        found.update(dict.fromkeys(named))
    return list(found), problems


def _named_by(argument: str) -> list[Path]:
    """The files of one argument. Raises OSError for what cannot be looked at, and for a pipe."""
    from capture.packets.input_files import open_file

    path = Path(argument)
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    if path.exists():
        open_file(path).close()
        return [path]
    return [p for p in sorted(map(Path, glob.glob(argument, recursive=True))) if p.is_file()]


def _size_bytes(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


class Progress:
    """One line on a terminal's stderr: how much was read."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._shown = not quiet and total >= PROGRESS_BYTES_MIN and sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes were read, a few times a second."""
        now = time.monotonic()
        if not self._shown or now - self._last < 0.25:
            return
        self._last = now
        rate = done / max(now - self._began, 0.001) / 1e6
        percent = 100 * done // max(total, 1)
        click.echo(
            f"\r  {percent:3d} %  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {rate:,.0f} MB/s ",
            err=True,
            nl=False,
        )

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            click.echo("\r" + " " * 60 + "\r", err=True, nl=False)


_ROW = "{:<20} {:<14} {:<32} {:>10} {:>10} {:>12}  {}"
_HEADER = ("PROVIDER", "MODEL", "IN", "OUT", "LIST PRICE", "")
_CACHE_WRITES = ("cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h")
_SENT = ("input", "cache_read", *_CACHE_WRITES)


def _row(event: PricedEvent) -> str:
    usage, tokens = event.usage, event.tokens
    sent = [known for name in _SENT if (known := getattr(tokens, name)) is not None]
    return _ROW.format(
        local_time(usage.at_ns, seconds=True),
        shown(usage.provider, 14),
        shown(usage.model or usage.request_model or usage.endpoint, 32),
        f"{sum(sent):,}" if sent else "-",
        f"{tokens.output:,}" if tokens.output is not None else "-",
        price_text(event.list_usd, usage.free, money_text(event.list_usd, 6)),
        _remark(event),
    ).rstrip()


def _remark(event: PricedEvent) -> str:
    usage = event.usage
    ended = outcome_text(usage.outcome.value, usage.gap)
    words = [ended] if ended else []
    if usage.error_class:
        words.append(f"{usage.http_status or ''} {usage.error_class}".strip())
    words += sorted({*usage.flags, *event.flags} - {usage.outcome.value})
    return ", ".join(words)


class Output:
    """Prints events; keeps none."""

    def __init__(self, job: Job) -> None:
        self._as_json, self._quiet, self._goes_on = job.as_json, job.quiet, job.keep
        self._began = False

    def event(self, event: PricedEvent) -> None:
        """Print one event. Once a reader such as `head` has left, storing goes on without it."""
        try:
            self._print(event)
        except OutputRefused as refused:
            if not (self._goes_on and reader_left(refused)):
                raise

    def _print(self, event: PricedEvent) -> None:
        if self._as_json:
            write_json_lines([event_json(event)])
            return
        if self._quiet:
            return
        if not self._began:
            click.echo(_ROW.format(f"TIME ({zone_text(event.usage.at_ns)})", *_HEADER).rstrip())
            self._began = True
        say(_row(event))

    def summary(self, summary: Summary, findings: Findings, losses: Counter[str]) -> None:
        """Print the last lines of the table."""
        if self._as_json:
            sys.stdout.flush()
            return
        if self._began:
            click.echo()
        for line in _summary_lines(summary, findings, losses):
            say(line)


def _summary_lines(summary: Summary, findings: Findings, losses: Counter[str]) -> Iterator[str]:
    requests, files = count(summary.events, "request"), count(findings.files, "file")
    of_none = summary.events and summary.unpriced + summary.implausible == summary.events
    known = None if of_none else summary.total_usd
    price = sum_words(known, summary.unpriced, f"${usd_text(summary.total_usd)}")
    yield f"{requests} in {files}: {price}"
    if not summary.events and findings.files:
        yield f"  {_seen(findings)}"
        if findings.not_wanted:
            yield f"  {_OWN_HOSTS}"
    if findings.seen_again:
        yield f"  {count(findings.seen_again, 'connection')} recorded twice, metered once"
    if summary.implausible:
        yield (
            f"  {count(summary.implausible, 'request')} with amounts that no request can have, "
            "not in the sum"
        )
    for outcome, number in (("gapped", summary.gapped), ("aborted", summary.aborted)):
        if number:
            yield f"  {count(number, 'request')} {OUTCOMES[outcome]}"
    seen = sightings_in_words(
        summary.seen_again, summary.told_apart, summary.stored_before, summary.stored_as_one
    )
    yield from (f"  {each}" for each in seen)
    for what, fix in losses_in_words(losses):
        yield f"  {what}" + (f" ({fix})" if fix else "")


def _seen(findings: Findings) -> str:
    """Why the connections gave no request."""
    without = sum(findings.without_keys.values())
    counts = (
        (findings.decrypted, "decrypted"),
        (findings.plain, "unencrypted"),
        (without, "without keys"),
        (findings.not_wanted, "to hosts of no known provider"),
        (findings.nameless, "joined mid-connection, server name not in the capture"),
    )
    named = ", ".join(f"{number:,} {what}" for number, what in counts if number)
    seen = f"{count(findings.connections, 'connection')} seen"
    return f"{seen}: {named}" if named else seen


def _problems(
    findings: Findings, without_keys: Counter[str], arguments: Sequence[str]
) -> Iterator[Problem]:
    """What could not be read, why, and what to do."""
    errors = [_STDIN_FILE.sub(_STDIN_NAME, error) for error in findings.errors]
    for number, error in enumerate(errors, start=1):
        yield Problem(error, _WHAT_IT_IS if number == len(errors) else "")
    if without_keys:
        yield _keys_missing(findings, without_keys, arguments)
    for link, packets in findings.unread_links.most_common():
        what = (
            f"{count(packets, 'packet')} of link type {link} not read; halton-meter reads "
            f"{_LINKS_READ}"
        )
        fix = "record on another interface, where the client runs: tcpdump -i any -w capture.pcap"
        yield Problem(what, fix)


def _keys_missing(
    findings: Findings, without_keys: Counter[str], arguments: Sequence[str]
) -> Problem:
    hosts = [name for name, _ in without_keys.most_common(HOSTS_SHOWN)]
    hidden = len(without_keys) - len(hosts)
    names = ", ".join(hosts) + (f" and {hidden} more" if hidden else "")
    what = f"{count(sum(without_keys.values()), 'encrypted connection')} without keys, to {names}"
    if known := findings.handshakes_with_keys:
        what += f"; the keys given belong to {count(known, 'other handshake')}"
    paths = " ".join(map(shlex.quote, arguments))
    return Problem(
        what,
        "give the key log that the client wrote during the recording:\n"
        f"halton-meter replay {paths} --keys sslkeys.log\n"
        "A client writes one if it is started with SSLKEYLOGFILE=sslkeys.log "
        "(curl, Python, browsers; Node: --tls-keylog)",
    )


@dataclass(frozen=True)
class Job:
    """One call of the command."""

    paths: tuple[str, ...]
    keys: tuple[Path, ...]
    as_json: bool
    keep: bool
    project: str | None
    quiet: bool
    unpack_ratio: int


class Replay:
    """Runs a job: files to events, events to the output and the store."""

    def __init__(self, job: Job, files: list[Path], problems: list[Problem]) -> None:
        from capture.pcap import PcapSource
        from halton_meter import accounts
        from halton_meter.memory import keep_freed_memory
        from halton_meter.meter import Meter
        from halton_meter.providers.registry import Registry
        from halton_meter.settings import config
        from halton_meter.store import account_key, known_account_key
        from halton_meter.tokenizer import Tokenizer

        keep_freed_memory()
        home = accounts.home_folder()
        extra_hosts = config.load(home).extra_hosts
        self._extra_names = {host.rpartition(":")[0] or host for host in extra_hosts}
        # Who keeps nothing makes no key either: accounts are then unknown.
        key = account_key(home) if job.keep else known_account_key(home)
        self._registry = Registry(extra_hosts, Tokenizer(), key)
        self._job = job
        self._meter = Meter(open_book().price, registry=self._registry)
        self._progress = Progress(_size_bytes(files), job.quiet)
        self._files = files
        self._source = PcapSource(
            files, job.keys, self._is_wanted, self._progress, job.unpack_ratio
        )
        self._problems = problems
        self._output, self._summary = Output(job), Summary()
        self._sightings = HeldSightings(HELD_EVENTS_MAX, PRINTED_EVENTS_MAX)
        self._store = _open_store(home) if job.keep else None
        self._waiting: list[PricedEvent] = []
        self._home = home
        self._first_ns, self._last_ns = 0, 0  # of what is stored

    def run(self) -> bool:
        """Do it; True when everything was read and, if asked, stored."""
        for item in self._source.items():
            self._take(self._meter.receive(item))
        findings = self._source.findings
        self._take(self._meter.finish(findings.last_ns))
        self._print(self._sightings.rest())
        self._progress.clear()
        losses = findings.losses + Counter(self._meter.losses)
        losses += Counter(better_sightings_not_shown=self._sightings.late)
        self._summary.seen_again = self._meter.seen_again
        kept = self._keep(losses)
        self._output.summary(self._summary, findings, losses)
        without_keys = findings.without_keys
        named = Counter({n: c for n, c in without_keys.items() if self._is_wanted(n)})
        nothing_read = bool(without_keys) and not findings.decrypted and not findings.plain
        complain(
            *self._problems,
            *_problems(findings, without_keys if nothing_read else named, self._job.paths),
        )
        if findings.quic:
            note(f"{count(findings.quic, 'QUIC (HTTP/3) connection')} not read")
        unread = bool(findings.unread_links) and not findings.connections
        read = not (self._problems or findings.errors or nothing_read or unread)
        return kept and read

    def _is_wanted(self, name: str) -> bool:
        """Whether a server name is a provider's: only those are decrypted."""
        return name in self._extra_names or bool(self._registry.of_host(name))

    def _take(self, events: Iterable[PricedEvent]) -> None:
        for event in events:
            booked = event
            if self._job.project is not None:
                booked = replace(event, usage=replace(event.usage, project=self._job.project))
            self._print(self._sightings.take(booked))
            self._store_later(booked)
        for event in self._meter.told_again():
            self._store_later(event)

    def _store_later(self, event: PricedEvent) -> None:
        if self._store is not None:
            at_ns = event.usage.at_ns
            self._first_ns = min(self._first_ns or at_ns, at_ns)
            self._last_ns = max(self._last_ns, at_ns)
            self._waiting.append(event)
            if len(self._waiting) >= STORE_BATCH:
                self._store.append(self._waiting)
                self._waiting.clear()

    def _print(self, events: Iterable[PricedEvent]) -> None:
        for event in events:
            self._summary.add(event)
            self._output.event(event)

    def _keep(self, losses: Counter[str]) -> bool:
        """Move events into the database; False when some are neither there nor in the journal."""
        from halton_meter.inspection.replayed import remember
        from halton_meter.store import StoreError

        store = self._store
        if store is None:
            return True
        store.append(self._waiting)
        key = _identity(self._files)
        for cause, number in losses.items():
            store.count_loss(cause, number, self._source.findings.last_ns, key)
        try:
            done = store.flush(wait_seconds=STORE_WAIT_SECONDS)
        except StoreError as error:  # what was read waits in the journal
            store.close()
            complain(Problem(str(error), ""))
            return False
        if done.own is not None:  # those that a better sighting came of were handed over twice
            new = done.own.stored - done.own.replaced
            not_new = max(0, self._summary.events - new - done.own.damaged)
            self._summary.stored_before = min(not_new, done.own.known)
            self._summary.stored_as_one = not_new - self._summary.stored_before
        if self._last_ns and _STDIN not in self._job.paths:
            remember(self._home, self._files, self._first_ns, self._last_ns)
        store.close()
        if store.trouble:  # the rest is in memory only, and this process ends
            complain(
                Problem(
                    f"not everything could be stored: {store.trouble}",
                    "solve that, then run the same command again; no request is counted twice",
                )
            )
        elif done.reason:
            note(
                f"{count(done.waiting, 'request')} not in the database yet: "
                f"{done.reason.rstrip('.')}. The next command that reads it adds them."
            )
        return store.trouble is None


def _identity(files: Iterable[Path]) -> str:
    """The same for the same captures in any folder: a second replay must not count losses twice.

    Size and both ends identify a capture (they hold times and TLS randoms) without reading a large
    file a second time.
    """
    from capture.packets.input_files import open_file

    parts = []
    for file in files:
        with contextlib.suppress(OSError), open_file(file) as capture:
            size = capture.seek(0, os.SEEK_END)
            capture.seek(0)
            first = capture.read(IDENTITY_BYTES)
            capture.seek(max(0, size - IDENTITY_BYTES))
            parts.append(b"%d:" % size + first + capture.read(IDENTITY_BYTES))
    digests = sorted(hashlib.blake2b(part, digest_size=16).digest() for part in parts)
    return f"replay:{hashlib.blake2b(b''.join(digests), digest_size=16).hexdigest()}"


def _open_store(home: Path) -> Store:
    from halton_meter.store import Store

    return Store(home)


@click.command(cls=Configured)
@click.argument("paths", nargs=-1, required=True, type=file_name, metavar="PATH…")
@click.option(
    "--keys",
    multiple=True,
    type=FilePath(exists=True, dir_okay=False, path_type=Path),
    help="TLS key log (SSLKEYLOGFILE); may be given again. Not needed for a pcapng with secrets.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, times in UTC.")
@click.option(
    "--store", "keep", is_flag=True, help="Store the requests, for `report` and `events`."
)
@click.option(
    "--project", type=name_typed, metavar="NAME", help="Count the requests under this project."
)
@click.option("--quiet", is_flag=True, help="Print only the summary, no progress.")
@click.option(
    "--unpack-ratio",
    type=Whole(1, UNPACK_RATIO_MAX),
    default=100,
    show_default=True,
    metavar="N",
    help="Unpack a gzip file to at most N times its size (64 MB are always read).",
)
def replay(**options: Any) -> None:
    """Meter recorded packet captures: pcap or pcapng files, folders, globs, "-" for standard input.

    Times are local, with --json in UTC.

    \b
    Examples:
      halton-meter replay capture.pcapng
      halton-meter replay traffic/ --keys sslkeys.log --json
      halton-meter replay 'day-*.pcap' --keys sslkeys.log --store
      cat capture.pcapng | halton-meter replay -
    """
    job = Job(**options)
    if job.paths.count(_STDIN) > 1:
        wrong_usage('"-" is standard input, and can be given once')
    with ended_in_order(), contextlib.ExitStack() as stack:
        refused: list[Problem] = []
        paths = [
            path
            for each in job.paths
            if (path := _from_stdin(stack, refused) if each == _STDIN else each) is not None
        ]
        files, problems = find_captures(paths)
        problems = [*refused, *problems]
        if not files:
            fail(*problems)
        raise SystemExit(0 if _run(job, files, problems) else 1)


def _from_stdin(stack: contextlib.ExitStack, refused: list[Problem]) -> str | None:
    """A file with what comes through standard input: a capture is read from both of its ends.

    None, and the problem in `refused`, where what comes is none, which need not have an end.
    """
    from capture.packets.capfile import refusal_of_start
    from halton_meter.live.keylog.private_folder import PIPED, private_folder

    pieces, first = _pieces_of_stdin(), b""
    while len(first) < START_BYTES and (piece := next(pieces, b"")):
        first += piece
    if (why := refusal_of_start(first, Path("FILE"))) is not None:
        refused.append(Problem(f"{_STDIN_NAME} {why}", _CAPTURES))
        return None
    folder = Path(tempfile.gettempdir())
    try:
        folder = stack.enter_context(private_folder(PIPED))
        path = folder / _STDIN_NAME
        with path.open("xb") as file:
            file.write(first)
            file.writelines(pieces)
    except OSError as error:
        fail(Problem(f"standard input cannot be kept in {folder}: {error.strerror}", "df -h"))
    return str(path)


def _pieces_of_stdin() -> Iterator[bytes]:
    """What comes, as it comes. Python sees a signal that came just before it waits for more only
    once it has waited, so it does not wait for long."""
    try:
        fd = sys.stdin.fileno()
    except OSError:  # no file of the system's
        yield sys.stdin.buffer.read()
        return
    waiting = select.poll()
    waiting.register(fd, select.POLLIN | select.POLLHUP)
    while True:
        if waiting.poll(WAIT_S * 1000):
            if not (piece := os.read(fd, PIECE_BYTES)):
                return
            yield piece


def _run(job: Job, files: list[Path], problems: list[Problem]) -> bool:
    from capture.packets.tshark import TsharkMissing
    from halton_meter.settings.config import ConfigError

    try:
        return Replay(job, files, problems).run()
    except ConfigError as error:
        fail(*error.problems)
    except TsharkMissing as error:
        fail(Problem(str(error), ""))
    except OSError as error:  # a full disk under the output, the secrets, or the store
        where = f" ({error.filename})" if error.filename else ""
        fail(Problem(f"{error.strerror or error}{where}", "df -h"))
