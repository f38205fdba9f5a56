"""`halton-meter replay`: recorded packet captures to priced events, without a daemon.

Thin by rule: `capture.pcap` reads, `halton_meter.meter` meters, `halton_meter.store` keeps. This
file finds the files, prints, and decides the exit code: 0 done; 1 something could not be read
(the reason and the next command on stderr); 2 wrong usage.
"""

from __future__ import annotations

import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from halton_meter.model import Outcome, PricedEvent, event_json, rfc3339, usd_text

if TYPE_CHECKING:
    from capture.pcap import Findings
    from halton_meter.store import Store

SUFFIXES = (".pcap", ".pcapng", ".cap", ".pcap.gz", ".pcapng.gz", ".cap.gz")
# Captures below this size are read before a progress line could be looked at.
PROGRESS_BYTES_MIN = 20 << 20
# Events handed to the store at a time.
STORE_BATCH = 500
# Host names named one by one in a message.
HOSTS_SHOWN = 8


@dataclass
class Summary:
    """What the table's last lines say."""

    events: int = 0
    total_usd: Decimal = Decimal(0)
    unpriced: int = 0
    gapped: int = 0
    aborted: int = 0
    models: Counter[str] = field(default_factory=Counter)

    def add(self, event: PricedEvent) -> None:
        """Count one event."""
        self.events += 1
        if event.list_usd is None:
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
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            if not inside:
                errors.append(f"{argument}: no captures ({', '.join(SUFFIXES[:3])}) in this folder")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        else:
            matches = sorted(Path(match) for match in glob.glob(argument, recursive=True))
            if not matches:
                errors.append(f"{argument}: no such file")
            found.update(dict.fromkeys(match for match in matches if match.is_file()))
    return list(found), errors


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


def _home() -> Path:
    return Path(os.environ.get("HALTON_METER_HOME") or Path.home() / ".halton-meter")


_ROW = "{:<20} {:<12} {:<30} {:>10} {:>10} {:>12}  {}"


def _row(event: PricedEvent) -> str:
    usage, tokens = event.usage, event.usage.tokens
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
    return ", ".join([*words, *sorted({*usage.flags, *event.flags})])


def _usd(amount: Decimal | None) -> str:
    if amount is None:
        return "unpriced"
    return f"${amount:.6f}" if amount else "$0"


class Output:
    """Prints each event as it comes; keeps none."""

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
        click.echo(_row(event))

    def summary(self, summary: Summary, findings: Findings, losses: Counter[str]) -> None:
        """Print the last lines of the table."""
        if self._as_json:
            sys.stdout.buffer.flush()
            return
        if self._began:
            click.echo()
        click.echo(
            f"{summary.events:,} events in {findings.files} file{'s' * (findings.files != 1)}: "
            f"${usd_text(summary.total_usd)} at list prices"
        )
        if summary.unpriced:
            click.echo(
                f"  {summary.unpriced:,} unpriced: no price is known, they are not in the sum"
            )
        if summary.gapped or summary.aborted:
            click.echo(f"  {summary.gapped:,} with gaps, {summary.aborted:,} cut off")
        if losses:
            click.echo("  lost or given up:")
            for cause, count in sorted(losses.items()):
                click.echo(f"    {cause.replace('_', ' ')}: {count:,}")


def _complain(findings: Findings, events: int, arguments: Sequence[str]) -> bool:
    """Say on stderr what could not be read and what to do; True when the run has failed."""
    for error in findings.errors:
        click.echo(f"Error: {error}", err=True)
    if findings.without_keys:
        count = sum(findings.without_keys.values())
        hosts = [name for name, _ in findings.without_keys.most_common(HOSTS_SHOWN)]
        more = len(findings.without_keys) - len(hosts)
        names = ", ".join(hosts) + (f" and {more} more" if more > 0 else "")
        click.echo(
            f"{count} encrypted connection{'s' * (count != 1)} without keys, to {names}.\n"
            "  To read them, give the key log that the client wrote while it was recorded:\n"
            f"    halton-meter replay {' '.join(map(_quoted, arguments))} --keys sslkeys.log\n"
            "  A client writes one when started with SSLKEYLOGFILE=sslkeys.log "
            "(curl, Python, Node with --tls-keylog, browsers).",
            err=True,
        )
    if findings.quic:
        click.echo(f"{findings.quic} QUIC (HTTP/3) connections are not read.", err=True)
    nothing_read = bool(findings.without_keys) and not findings.decrypted and not findings.plain
    return bool(findings.errors) or (nothing_read and not events)


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _append(store: Store | None, events: Iterable[PricedEvent], *, flush: bool = False) -> None:
    if store is not None:
        store.append(list(events))
        if flush:
            store.flush()


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
def replay(
    paths: tuple[str, ...],
    keys: tuple[Path, ...],
    as_json: bool,
    keep: bool,
    project: str | None,
    quiet: bool,
) -> None:
    """Meter recorded packet captures: pcap or pcapng files, folders, globs.

    \b
    Examples:
      halton-meter replay capture.pcapng
      halton-meter replay traffic/ --keys sslkeys.log --json
      halton-meter replay 'day-*.pcap' --keys sslkeys.log --store
    """
    files, errors = find_captures(paths)
    if not files:
        for error in errors:
            click.echo(f"Error: {error}", err=True)
        raise SystemExit(1)
    try:
        failed = _replay(files, errors, keys, as_json, keep, project, quiet, paths)
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        failed = False
    raise SystemExit(1 if failed else 0)


def _replay(
    files: list[Path],
    errors: list[str],
    keys: tuple[Path, ...],
    as_json: bool,
    keep: bool,
    project: str | None,
    quiet: bool,
    arguments: Sequence[str],
) -> bool:
    from capture.pcap import PcapSource
    from capture.tshark import TsharkMissing
    from halton_meter.meter import Meter
    from pricing.book import PriceBook

    meter = Meter(PriceBook.load().price)
    progress = Progress(sum(path.stat().st_size for path in files), quiet)
    source = PcapSource(files, keys, progress=progress)
    source.findings.errors += errors
    store = _open_store() if keep else None
    output, summary = Output(as_json, quiet), Summary()
    waiting: list[PricedEvent] = []

    def take(events: Iterable[PricedEvent]) -> None:
        for event in events:
            booked = event
            if project is not None:
                booked = replace(event, usage=replace(event.usage, project=project))
            summary.add(booked)
            output.event(booked)
            if store is not None:
                waiting.append(booked)
        if len(waiting) >= STORE_BATCH:
            _append(store, waiting)
            waiting.clear()

    try:
        for item in source.items():
            take(meter.receive(item))
    except TsharkMissing as missing:
        click.echo(f"Error: {missing}", err=True)
        return True
    take(meter.finish(source.findings.last_ns))
    _append(store, waiting, flush=True)
    progress.clear()
    output.summary(summary, source.findings, source.findings.losses + Counter(meter.losses))
    return _complain(source.findings, summary.events, arguments)


def _open_store() -> Store:
    from halton_meter.store import Store

    return Store(_home())
