"""`halton-meter replay`: recorded packet captures to priced events, without a daemon.

Thin by rule: `capture.pcap` reads, `halton_meter.meter` meters, `halton_meter.store` keeps. This
file finds the files, prints, and decides the exit code: 0 done; 1 something could not be read
(the reason and the next command on stderr); 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.cli.output import harmless, harmless_lines, shown
from halton_meter.contract import event_json, rfc3339, usd_text
from halton_meter.model import Outcome, PricedEvent
from halton_meter.sightings import HeldSightings

if TYPE_CHECKING:
    from capture.packets.records import Findings
    from halton_meter.store import Store

SUFFIXES = (".pcap", ".pcapng", ".cap", ".pcap.gz", ".pcapng.gz", ".cap.gz")
# Captures below this size are read before a progress line could be looked at.
PROGRESS_BYTES_MIN = 20 << 20
# Events handed to the store at a time.
STORE_BATCH = 500
# How long the database may be busy with another process before events stay in the journal.
STORE_WAIT_SECONDS = 10.0
# What is read of each end of a capture to tell it from others.
IDENTITY_BYTES = 64 << 10
# Events held back because a better sighting of the same exchange may still come, and those whose
# turn to be printed came before that.
HELD_EVENTS_MAX = 10_000
PRINTED_EVENTS_MAX = 65_536
NAME_CHARACTERS_MAX = 300  # of a file, in an error
# Host names named one by one in a message.
HOSTS_SHOWN = 8

# What a person can do about a loss, or what it means.
_ADVICE = {
    "answers_not_recognised": "what was asked is lost, and the answer does not tell",
    "early_dropped": "answers whose requests were lost",
    "hpack_lost": "heads that refer to what was not recorded",
    "http1_resync": "places where reading went on behind a hole",
    "http2_resync": "places where reading went on behind a hole",
    "ip_fragments": "packets in pieces are not put together",
    "capture_file_cut_short": "the file's end is missing",
    "packets_with_an_impossible_time": "they take the file's",
    "tls_secret_bytes_not_read": "keep the secrets in a key log of their own: --keys sslkeys.log",
    "frames_cut_by_snap_length": "record whole packets: tcpdump -s 0",
    "packets_without_a_time": "they take the file's",
    "tcp_bytes_missing": "the recorder missed packets; give it a larger buffer: tcpdump -B 65536",
    "tls_records_undecryptable": "their keys are not in the key log, or were renewed in a hole",
    "tshark_failed": "its work was done without it; see: tshark --version",
}
_OWN_HOSTS = (
    "hosts of your own are metered once config.toml names them: "
    'openai_compatible_hosts = ["llm.example.com"]'
)
_LINKS_READ = "Ethernet, PPPoE, raw IP, loopback, Linux cooked (-i any), macOS's pktap"


@dataclass
class Summary:
    """What the table's last lines say."""

    events: int = 0
    total_usd: Decimal = Decimal(0)
    unpriced: int = 0
    implausible: int = 0
    gapped: int = 0
    aborted: int = 0
    models: Counter[str] = field(default_factory=Counter)

    def add(self, event: PricedEvent) -> None:
        """Count one event."""
        self.events += 1
        if event.implausible:
            self.implausible += 1
        elif event.list_usd is None:
            self.unpriced += 1
        else:
            self.total_usd += event.list_usd
        self.gapped += event.usage.outcome is Outcome.GAPPED
        self.aborted += event.usage.outcome is Outcome.ABORTED


def find_captures(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The capture files that files, folders and glob patterns name, and an error for each miss."""
    found: dict[Path, None] = {}
    errors: list[str] = []
    for argument in arguments:
        try:
            named = _named_by(argument)
        except OSError as error:
            errors.append(f"{shown(argument, NAME_CHARACTERS_MAX)}: {error.strerror or error}")
            continue
        if not named and Path(argument).is_dir():
            errors.append(f"{argument}: no captures ({', '.join(SUFFIXES[:3])}) in this folder")
        elif not named:
            errors.append(f"{argument}: no such file")
        found.update(dict.fromkeys(named))
    return list(found), errors


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
    """One line on a terminal's stderr that says how far reading has come."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._shown = not quiet and total >= PROGRESS_BYTES_MIN and sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Say that `done` of `total` bytes were read, a few times a second."""
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
        """Take the line away."""
        if self._shown:
            click.echo("\r" + " " * 60 + "\r", err=True, nl=False)


_ROW = "{:<20} {:<12} {:<30} {:>10} {:>10} {:>12}  {}"


def _row(event: PricedEvent) -> str:
    usage, tokens = event.usage, event.tokens
    sent = (
        tokens.input,
        tokens.cache_read,
        tokens.cache_write,
        tokens.cache_write_5m,
        tokens.cache_write_1h,
        tokens.cache_write_12h,
    )
    known = [count for count in sent if count is not None]
    return _ROW.format(
        rfc3339(usage.at_ns)[:19].replace("T", " "),
        usage.provider[:12],
        (usage.model or usage.request_model or usage.endpoint)[:30],
        f"{sum(known):,}" if known else "-",
        f"{tokens.output:,}" if tokens.output is not None else "-",
        _usd(event.list_usd),
        _remark(event),
    ).rstrip()


def _remark(event: PricedEvent) -> str:
    usage = event.usage
    words = [] if usage.outcome is Outcome.COMPLETE else [usage.outcome.value]
    if usage.error_class:
        words.append(f"{usage.http_status or ''} {usage.error_class}".strip())
    words += sorted({*usage.flags, *event.flags} - {usage.outcome.value})
    return ", ".join(words)


def _usd(amount: Decimal | None) -> str:
    if amount is None:
        return "unpriced"
    return f"${amount:.6f}" if amount else "$0"


class Output:
    """Prints events; keeps none."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self._as_json = as_json
        self._quiet = quiet
        self._began = False

    def event(self, event: PricedEvent) -> None:
        """Print one event."""
        if self._as_json:
            import orjson

            sys.stdout.buffer.write(orjson.dumps(event_json(event)) + b"\n")
            return
        if self._quiet:
            return
        if not self._began:
            click.echo(_ROW.format("at (UTC)", "provider", "model", "in", "out", "list price", ""))
            self._began = True
        click.echo(harmless(_row(event)))

    def summary(self, summary: Summary, findings: Findings, losses: Counter[str]) -> None:
        """Print the last lines of the table."""
        if self._as_json:
            sys.stdout.buffer.flush()
            return
        if self._began:
            click.echo()
        events = f"{summary.events:,} event{'s' * (summary.events != 1)}"
        files = f"{findings.files} file{'s' * (findings.files != 1)}"
        click.echo(f"{events} in {files}: ${usd_text(summary.total_usd)} at list prices")
        if not summary.events and findings.files:
            click.echo(f"  {_seen(findings)}")
            if findings.not_wanted:
                click.echo(f"  {_OWN_HOSTS}")
        if findings.seen_again:
            click.echo(f"  {findings.seen_again:,} connections recorded twice were read once")
        if summary.unpriced:
            click.echo(
                f"  {summary.unpriced:,} unpriced: no price is known, they are not in the sum"
            )
        if summary.implausible:
            click.echo(
                f"  {summary.implausible:,} with amounts that no request can have: they are not "
                "in the sum"
            )
        if summary.gapped or summary.aborted:
            click.echo(f"  {summary.gapped:,} with gaps, {summary.aborted:,} cut off")
        if losses:
            click.echo("  lost or given up:")
            for cause, count in sorted(losses.items()):
                advice = f" ({_ADVICE[cause]})" if cause in _ADVICE else ""
                click.echo(f"    {cause.replace('_', ' ')}: {count:,}{advice}")


def _seen(findings: Findings) -> str:
    """What the connections were that gave no event."""
    without = sum(findings.without_keys.values())
    counts = (
        (findings.decrypted, "decrypted"),
        (findings.plain, "unencrypted"),
        (without, "without keys"),
        (findings.not_wanted, "to hosts that are no provider's"),
        (findings.nameless, "already under way, to servers whose names the capture does not hold"),
    )
    said = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    connections = findings.connections
    return f"{connections:,} connection{'s' * (connections != 1)} seen" + (said and f": {said}")


def _complain(findings: Findings, told: Counter[str], arguments: Sequence[str]) -> None:
    """Say on stderr what could not be read, why, and what to do."""
    for error in findings.errors:
        click.echo(harmless_lines(f"Error: {error}"), err=True)
    if told:
        count = sum(told.values())
        hosts = [name for name, _ in told.most_common(HOSTS_SHOWN)]
        names = harmless(", ".join(hosts)) + (
            f" and {len(told) - len(hosts)} more" * (len(told) > len(hosts))
        )
        paths = " ".join(map(shlex.quote, arguments))
        known = findings.handshakes_with_keys
        given = (
            f"; the secrets given are of {known:,} other handshake{'s' * (known != 1)}"
            if known
            else ""
        )
        click.echo(
            f"{count} encrypted connection{'s' * (count != 1)} without keys, to {names}{given}.\n"
            "  To read them, give the key log that the client wrote while they were recorded:\n"
            f"    halton-meter replay {paths} --keys sslkeys.log\n"
            "  A client writes one when it is started with SSLKEYLOGFILE=sslkeys.log "
            "(curl, Python, browsers; Node: --tls-keylog).",
            err=True,
        )
    for link, count in findings.unread_links.most_common():
        click.echo(
            f"Error: {count:,} packets of link type {link} are not read, only those of "
            f"{_LINKS_READ}.\n"
            "  Record on another interface, where the client runs: tcpdump -i any -w capture.pcap",
            err=True,
        )
    if findings.quic:
        click.echo(f"{findings.quic} QUIC (HTTP/3) connections are not read.", err=True)


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

    def __init__(self, job: Job, files: list[Path], errors: list[str]) -> None:
        from capture.pcap import PcapSource
        from halton_meter import accounts, config
        from halton_meter.memory import keep_freed_memory
        from halton_meter.meter import Meter
        from halton_meter.providers.registry import Registry
        from halton_meter.tokenizer import Tokenizer
        from pricing.book import PriceBook

        keep_freed_memory()
        home = accounts.home_folder()
        extra_hosts = config.load(home).extra_hosts
        self._extra_names = {host.rpartition(":")[0] or host for host in extra_hosts}
        self._registry = Registry(extra_hosts, Tokenizer())
        self._job = job
        self._meter = Meter(PriceBook.load(home).price, registry=self._registry)
        self._progress = Progress(_size_bytes(files), job.quiet)
        self._files = files
        self._source = PcapSource(
            files, job.keys, self._is_wanted, self._progress, job.unpack_ratio
        )
        self._source.findings.errors += errors
        self._output, self._summary = Output(job.as_json, job.quiet), Summary()
        self._sightings = HeldSightings(HELD_EVENTS_MAX, PRINTED_EVENTS_MAX)
        self._store = _open_store(home) if job.keep else None
        self._waiting: list[PricedEvent] = []

    def run(self) -> bool:
        """Do it; True when everything that was asked could be read, and kept."""
        for item in self._source.items():
            self._take(self._meter.receive(item))
        findings = self._source.findings
        self._take(self._meter.finish(findings.last_ns))
        self._print(self._sightings.rest())
        self._progress.clear()
        losses = findings.losses + Counter(self._meter.losses)
        losses += Counter(better_sightings_not_shown=self._sightings.late)
        kept = self._keep(losses)
        self._output.summary(self._summary, findings, losses)
        without_keys = findings.without_keys
        told = Counter({n: c for n, c in without_keys.items() if self._is_wanted(n)})
        nothing_read = bool(without_keys) and not findings.decrypted and not findings.plain
        if nothing_read:
            told = without_keys
        _complain(findings, told, self._job.paths)
        unread = bool(findings.unread_links) and not findings.connections
        return kept and not findings.errors and not nothing_read and not unread

    def _is_wanted(self, name: str) -> bool:
        """Whether a server name is a provider's: only those are decrypted."""
        return name in self._extra_names or bool(self._registry.of_host(name))

    def _take(self, events: Iterable[PricedEvent]) -> None:
        for event in events:
            booked = event
            if self._job.project is not None:
                booked = replace(event, usage=replace(event.usage, project=self._job.project))
            self._print(self._sightings.take(booked))
            if self._store is not None:
                self._waiting.append(booked)
                if len(self._waiting) >= STORE_BATCH:
                    self._store.append(self._waiting)
                    self._waiting.clear()

    def _print(self, events: Iterable[PricedEvent]) -> None:
        for event in events:
            self._summary.add(event)
            self._output.event(event)

    def _keep(self, losses: Counter[str]) -> bool:
        """Bring what waits into the database; False when events are neither there nor on disk."""
        store = self._store
        if store is None:
            return True
        store.append(self._waiting)
        key = _identity(self._files)
        for cause, count in losses.items():
            store.count_loss(cause, count, self._source.findings.last_ns, key)
        done = store.flush(wait_seconds=STORE_WAIT_SECONDS)
        store.close()
        if store.trouble:  # in memory alone, and that ends here
            click.echo(
                f"Error: not everything could be stored: {store.trouble}.\n"
                "  Then run this again: what is stored already is not counted twice.",
                err=True,
            )
        elif done.reason:
            click.echo(
                f"{done.waiting} events wait in the journal: {done.reason.rstrip('.')}. "
                "They are added when it is next possible.",
                err=True,
            )
        return store.trouble is None


def _identity(files: Iterable[Path]) -> str:
    """The same for the same captures wherever they lie: a second replay must not count twice.

    Sizes and both ends tell captures apart (times and TLS randoms stand there) without reading a
    large file a second time.
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


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…")
@click.option(
    "--keys",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TLS key log (SSLKEYLOGFILE); may be given again. Secrets in a pcapng need none.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--store", "keep", is_flag=True, help="Keep the events, for `report` and `events`.")
@click.option("--project", metavar="NAME", help="Book the events on this project.")
@click.option("--quiet", is_flag=True, help="Print the summary only, no progress.")
@click.option(
    "--unpack-ratio",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    metavar="N",
    help="Read of a gzip at most N times its size (64 MB are always read).",
)
def replay(**options: Any) -> None:
    """Meter recorded packet captures: pcap or pcapng files, folders, globs.

    \b
    Examples:
      halton-meter replay capture.pcapng
      halton-meter replay traffic/ --keys sslkeys.log --json
      halton-meter replay 'day-*.pcap' --keys sslkeys.log --store
    """
    job = Job(**options)
    files, errors = find_captures(job.paths)
    if not files:
        for error in errors:
            click.echo(harmless_lines(f"Error: {error}"), err=True)
        raise SystemExit(1)
    raise SystemExit(0 if _run(job, files, errors) else 1)


def _run(job: Job, files: list[Path], errors: list[str]) -> bool:
    from capture.packets.tshark import TsharkMissing
    from halton_meter.config import ConfigError
    from pricing.rates import PriceError

    try:
        return Replay(job, files, errors).run()
    except (TsharkMissing, ConfigError, PriceError) as problem:
        click.echo(harmless_lines(f"Error: {problem}"), err=True)
        return False
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    except OSError as problem:  # a full disk under the output, the secrets, or the store
        where = f" ({problem.filename})" if problem.filename else ""
        click.echo(harmless(f"Error: {problem.strerror or problem}{where}"), err=True)
        return False
