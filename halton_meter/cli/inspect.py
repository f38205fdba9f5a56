"""`halton-meter inspect FILE|EVENT_ID`: what was seen, layer by layer.

Thin by rule: `halton_meter.inspection` looks with tshark and with our own readers, `pricing
explain` knows how a stored request's price is shown. Exit codes: 0 done; 1 it cannot be read (the
reason and the fix on stderr); 2 wrong usage.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.book import open_book
from halton_meter.cli.configured import Configured
from halton_meter.cli.losses import losses_in_words
from halton_meter.cli.named import FilePath, file_name
from halton_meter.cli.output import (
    PENDING,
    PENDING_NOTE,
    count,
    fail,
    harmless,
    local_time,
    name_typed,
    note,
    outcome_text,
    print_json,
    say,
    shown,
    zone_text,
)
from halton_meter.cli.signalled import ended_in_order
from halton_meter.contract import event_json, rfc3339
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.inspection.packets import Packets, Stream
    from halton_meter.inspection.view import Message, Seen, SeenConnection, View
    from halton_meter.model import PricedEvent

HEADERS_SHOWN = 24
NAME_CHARACTERS_MAX = 120
# Captures that are searched for a stored request.
CAPTURES_LOOKED_AT = 5
# What connects our connection's id with tshark's addresses.
_ID_PARTS = 3


@click.command(cls=Configured)
@click.argument("what", type=file_name, metavar="FILE|EVENT_ID")
@click.option(
    "--keys",
    multiple=True,
    type=FilePath(exists=True, dir_okay=False, path_type=Path),
    help="TLS key log (SSLKEYLOGFILE); may be given again. Not needed for a pcapng with secrets.",
)
@click.option("--show-bodies", is_flag=True, help="Show prompts and answers as they are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, times in UTC.")
def inspect(what: str, keys: tuple[Path, ...], show_bodies: bool, as_json: bool) -> None:
    """Show a capture, or a stored request, layer by layer: for a person who debugs.

    Of a capture: packets and TLS as tshark sees them, HTTP messages and their usage as tshark and
    as Halton Meter see them, and the price. Texts and credentials are hidden; --show-bodies shows
    the bodies.

    Of a stored request, by its id: what the database has, how its price comes about, and, if it was
    replayed from a capture that is still there, its packets.

    \b
    Examples:
      halton-meter inspect capture.pcapng
      halton-meter inspect capture.pcapng --keys sslkeys.log --json
      halton-meter inspect 3f6c0a9d1b2e4f508192a3b4c5d6e7f8
    """
    path = Path(what)
    if path.is_dir():
        fail(Problem(f"{what} is a folder", f"name one capture in it: ls {shlex.quote(what)}"))
    elif path.exists():
        with ended_in_order():
            _inspect_capture(path, keys, show_bodies, as_json)
    elif "/" in what or path.suffix:
        fail(Problem(f"{shown(what, NAME_CHARACTERS_MAX)}: no such file", "ls -l"))
    else:
        _inspect_event(name_typed(what), show_bodies, as_json)


# --- a stored request ---------------------------------------------------------------------------


def _inspect_event(event_id: str, show_bodies: bool, as_json: bool) -> None:
    from halton_meter.cli.pricing import show_priced, stored_event

    event, earlier = stored_event(event_id)
    capture = _capture_of(event, show_bodies)
    if as_json:
        document = event_json(event)
        print_json(document if capture is None else {**document, "capture": _document(*capture)})
        return
    for line in _stored_lines(event):
        say(line)
    say("price")
    show_priced(event, False)
    for list_usd, _, price_book in earlier:
        how = "unpriced" if list_usd is None else f"list price ${list_usd:f}"
        say(f"  before it was repriced: {how}, price book {price_book}")
    if capture is not None:
        say("")
        for line in _lines(*capture):
            say(line)
    elif show_bodies:
        note("no body is stored, of any request; a capture has them: halton-meter inspect FILE")


def _capture_of(event: PricedEvent, bodies: bool) -> tuple[Path, Packets, View] | None:
    """The capture that the request was replayed from, if it is still there: its one connection."""
    from capture.packets.tshark import TsharkMissing
    from halton_meter.inspection.packets import NoPyshark, look
    from halton_meter.inspection.replayed import holding
    from halton_meter.inspection.view import view
    from halton_meter.settings.config import load

    home = home_folder()
    for path in holding(home, event.usage.at_ns)[:CAPTURES_LOOKED_AT]:
        try:
            seen = view(path, (), open_book().price, load(home).extra_hosts, bodies)
            found = [(each, _of_event(each, event.usage.id)) for each in seen.connections]
            chosen = [(each, exchanges) for each, exchanges in found if exchanges]
            if not chosen:
                continue
            packets = look(path)
        except (TsharkMissing, NoPyshark, OSError):
            continue
        for each, exchanges in chosen:
            each.exchanges = exchanges
        seen.connections = [each for each, _ in chosen]
        unmatched = list(packets.streams)
        streams = (_stream_of(each, unmatched) for each in seen.connections)
        packets.streams = [each for each in streams if each is not None]
        return path, packets, seen
    return None


def _of_event(connection: SeenConnection, event_id: str) -> list[Seen]:
    return [
        each
        for each in connection.exchanges
        if any(event.usage.id == event_id for event in each.events)
    ]


def _stored_lines(event: PricedEvent) -> Iterator[str]:
    document = event_json(event)
    usage = event.usage
    yield f"request {document['id']}"
    yield f"  seen by    {_SOURCES.get(document['source'], document['source'])}"
    yield f"  at         {local_time(usage.at_ns, seconds=True)} {zone_text(usage.at_ns)}"
    timed = [
        f"{word} {document[name]:,} ms"
        for name, word in (("ttft_ms", "first byte after"), ("duration_ms", "ended after"))
        if document[name] is not None
    ]
    if timed:
        yield f"  took       {', '.join(timed)}"
    if document["pid"] is not None:
        program, user = shown(document["process"]), shown(document["user"])
        yield f"  process    {program} ({document['pid']}) of {user}"
    if document["project"] is not None:
        yield f"  project    {document['project']}"
    yield f"  host       {shown(document['host'])}"
    status = f", status {document['http_status']}" if document["http_status"] else ""
    error = f", {document['error_class']}" if document["error_class"] else ""
    yield f"  endpoint   {document['provider']} {document['endpoint']}{status}{error}"
    asked, answered = shown(document["request_model"]), shown(document["model"])
    yield f"  models     asked {asked}, answered {answered}"
    ended = outcome_text(usage.outcome.value, usage.gap) or "complete"
    yield f"  ended      {ended}"
    yield f"  usage      {_tokens_text(document['tokens'])} ({document['certainty']})"


_SOURCES = {
    "uprobes": "uprobes",
    "pcap": "a packet capture (replay); inspect that file for its packets",
    "keylog": "live packets and a key log",
    "proxy": "the local proxy",
}


def _tokens_text(tokens: dict[str, Any]) -> str:
    """Counts that are stated, zeros only where there is nothing else."""
    stated = {name: number for name, number in tokens.items() if number is not None}
    some = {name: number for name, number in stated.items() if number} or stated
    return ", ".join(f"{name} {number:,}" for name, number in some.items()) or "not stated"


# --- a capture ----------------------------------------------------------------------------------


def _inspect_capture(path: Path, keys: tuple[Path, ...], bodies: bool, as_json: bool) -> None:
    from capture.packets.tshark import TsharkMissing
    from halton_meter.inspection.packets import NoPyshark, Packets, look
    from halton_meter.inspection.view import view
    from halton_meter.settings.config import load

    hosts = load(home_folder()).extra_hosts
    try:
        seen = view(path, keys, open_book().price, hosts, bodies)
    except TsharkMissing as error:
        fail(Problem(str(error), ""))
    except OSError as error:
        fail(Problem(f"{path}: {error.strerror or error}", f"ls -l {shlex.quote(str(path))}"))
    if not seen.findings.files:
        fail(*(Problem(each, "file " + shlex.quote(str(path))) for each in seen.findings.errors))
    try:
        packets = look(path, keys)
    except NoPyshark as error:
        note(f"packets are not shown: {error}")
        packets = Packets()
    if as_json:
        print_json(_document(path, packets, seen))
        return
    for line in _lines(path, packets, seen):
        say(line)
    if seen.findings.without_keys:
        quoted = shlex.quote(str(path))
        note(f"with the client's key log: halton-meter inspect {quoted} --keys sslkeys.log")


def _lines(path: Path, packets: Packets, seen: View) -> Iterator[str]:
    findings = seen.findings
    size = path.stat().st_size
    yield f"{path}: {size:,} bytes, {count(packets.packets, 'packet')}"
    if packets.cut:
        yield f"  tshark's view is of the first {packets.packets:,} packets only"
    yield (
        f"  {count(findings.connections, 'TCP connection')}: {findings.decrypted:,} decrypted, "
        f"{findings.plain:,} unencrypted, {sum(findings.without_keys.values()):,} without keys, "
        f"{findings.not_wanted:,} to hosts of no known provider"
    )
    if packets.others:
        named = ", ".join(f"{number:,} {name}" for name, number in sorted(packets.others.items()))
        yield f"  not TCP: {named}"
    for what, fix in losses_in_words(findings.losses):
        yield f"  {what}" + (f" ({fix})" if fix else "")
    yield from (f"  {error}" for error in findings.errors)
    unmatched = list(packets.streams)
    for number, connection in enumerate(seen.connections, start=1):
        stream = _stream_of(connection, unmatched)
        if stream is not None:
            unmatched.remove(stream)
        yield ""
        yield from _connection_lines(number, connection, stream)
    for stream in unmatched:
        yield ""
        yield f"connection {stream.client} → {stream.server}: nothing of it was read"
        yield from _stream_lines(stream)
    if seen.cut:
        yield ""
        yield "more exchanges are in it than are shown; halton-meter replay has them all"


def _stream_of(connection: SeenConnection, streams: list[Stream]) -> Stream | None:
    """Tshark's view of a connection of ours, by the addresses in its id."""
    addresses = connection.id.split(":", _ID_PARTS - 1)[-1].split("+")[0]
    for stream in streams:
        names = {f"{stream.client}-{stream.server}", f"{stream.server}-{stream.client}"}
        if addresses in names:
            return stream
    return None


def _connection_lines(
    number: int, connection: SeenConnection, stream: Stream | None
) -> Iterator[str]:
    ends = f"{stream.client} → {stream.server}  " if stream else ""
    yield f"connection {number}  {ends}{connection.host or 'host unknown'}"
    if stream is not None:
        yield from _stream_lines(stream)
    joined = "; joined in its middle" if connection.joined else ""
    holes = f"; {count(connection.holes, 'hole')}" if connection.holes else ""
    yield (
        f"  plaintext  {connection.bytes_sent:,} bytes sent, "
        f"{connection.bytes_received:,} received{holes}{joined}"
    )
    usage = list(stream.usage) if stream else []
    stated = [seen for seen in connection.exchanges if seen.events]
    pairs = len(usage) == len(stated)
    for seen in connection.exchanges:
        theirs = usage.pop(0) if pairs and seen.events else None
        yield from _exchange_lines(seen, theirs)
    if not pairs:
        for their in usage:
            yield f"  tshark sees usage  {_counts_text(their)}"


def _stream_lines(stream: Stream) -> Iterator[str]:
    trouble = [
        f"{number:,} {word}"
        for number, word in (
            (stream.retransmitted, "retransmitted"),
            (stream.lost, "behind lost ones"),
            (stream.out_of_order, "out of order"),
        )
        if number
    ]
    seconds = stream.last_s - stream.first_s
    yield (
        f"  packets    {stream.packets:,} in {seconds:,.3f} s, {stream.sent_packets:,} sent; "
        f"{stream.bytes_sent:,} bytes sent, {stream.bytes_received:,} received"
        + (f"; {', '.join(trouble)}" if trouble else "; none lost or sent again")
        + ("; ended by a reset" if stream.reset else "")
    )
    if stream.records or stream.server_name:
        parts = [stream.tls_version or "version not seen", stream.cipher or "cipher not seen"]
        parts.append(f"server name {stream.server_name or 'not seen'}")
        if stream.alpn:
            parts.append(f"protocol {stream.alpn}")
        yield f"  TLS        {', '.join(parts)}"
        yield f"  keys       {_keys_text(stream)}"
    if stream.protocols:
        layers = ", ".join(f"{number:,} {name}" for name, number in stream.protocols.items())
        yield f"  tshark     {layers}"


def _keys_text(stream: Stream) -> str:
    decrypted = f"tshark decrypts {stream.decrypted:,} of {count(stream.records, 'record')}"
    return f"found; {decrypted}" if stream.decrypted else f"none; {decrypted}"


def _exchange_lines(seen: Seen, theirs: dict[str, Any] | None) -> Iterator[str]:
    status = seen.status if seen.status is not None else "no status"
    ms = max(0, seen.ended_ns - seen.started_ns) / 1e6
    ended = outcome_text(seen.outcome, seen.gap)
    yield (
        f"  {seen.protocol}  {seen.method or 'request not seen'} {seen.target} → {status}, "
        f"{ms:,.1f} ms" + (f", {ended}" if ended else "")
    )
    yield from _message_lines("sent", seen.request)
    yield from _message_lines("received", seen.response)
    for event in seen.events:
        if theirs is not None:
            yield f"    usage    tshark  {_counts_text(theirs)}"
        document = event_json(event)
        yield f"    usage    ours    {_tokens_text(document['tokens'])} ({document['certainty']})"
        yield f"    event    {document['id']}  {_price_text(document)}"
    if not seen.events:
        yield "    event    none: no request of a provider's that costs, or is counted"


def _counts_text(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "no counts"


def _price_text(document: dict[str, Any]) -> str:
    usd = document["list_usd"]
    price = "unpriced" if usd is None else f"${usd} list price, {document['basis']}"
    if PENDING in document["flags"] and usd == "0":
        price = f"{PENDING}, {PENDING_NOTE}"
    flags = f"; {', '.join(document['flags'])}" if document["flags"] else ""
    return (
        f"{document['provider']} {document['model'] or document['request_model']}  {price}{flags}"
    )


def _message_lines(word: str, message: Message) -> Iterator[str]:
    sizes = [f"{message.decoded_bytes:,} bytes"]
    if message.coding:
        sizes = [
            f"{message.wire_bytes:,} bytes {message.coding}",
            f"{message.decoded_bytes:,} decoded",
        ]
    if message.parts > 1:
        sizes.append(f"in {message.parts:,} parts")
    if message.lost_bytes is None:
        sizes.append("an unknown number lost")
    elif message.lost_bytes:
        sizes.append(f"{message.lost_bytes:,} lost")
    elif not message.complete:
        sizes.append("its end not seen")
    yield f"    {word:<8} {', '.join(sizes)}"
    for name, value in message.headers[:HEADERS_SHOWN]:
        yield f"             {name}: {shown(value, NAME_CHARACTERS_MAX)}"
    if len(message.headers) > HEADERS_SHOWN:
        yield f"             and {count(len(message.headers) - HEADERS_SHOWN, 'more header')}"
    if message.text is not None:
        yield from (f"    | {harmless(line)}" for line in message.text.splitlines())


# --- for machines -------------------------------------------------------------------------------


def _document(path: Path, packets: Packets, seen: View) -> dict[str, Any]:
    findings = seen.findings
    return {
        "file": str(path),
        "packets": packets.packets,
        "packets_cut": packets.cut,
        "connections": findings.connections,
        "decrypted": findings.decrypted,
        "unencrypted": findings.plain,
        "without_keys": dict(findings.without_keys),
        "losses": dict(findings.losses),
        "errors": findings.errors,
        "streams": [_stream_document(each) for each in packets.streams],
        "seen": [_connection_document(each) for each in seen.connections],
    }


def _stream_document(stream: Stream) -> dict[str, Any]:
    return {
        "client": stream.client,
        "server": stream.server,
        "packets": stream.packets,
        "bytes_sent": stream.bytes_sent,
        "bytes_received": stream.bytes_received,
        "retransmitted": stream.retransmitted,
        "lost": stream.lost,
        "out_of_order": stream.out_of_order,
        "reset": stream.reset,
        "tls_version": stream.tls_version,
        "cipher": stream.cipher,
        "server_name": stream.server_name,
        "alpn": stream.alpn,
        "tls_records": stream.records,
        "tls_records_decrypted": stream.decrypted,
        "protocols": stream.protocols,
        "usage": stream.usage,
    }


def _connection_document(connection: SeenConnection) -> dict[str, Any]:
    return {
        "id": connection.id,
        "host": connection.host,
        "joined": connection.joined,
        "bytes_sent": connection.bytes_sent,
        "bytes_received": connection.bytes_received,
        "holes": connection.holes,
        "exchanges": [_exchange_document(each) for each in connection.exchanges],
    }


def _exchange_document(seen: Seen) -> dict[str, Any]:
    return {
        "protocol": seen.protocol,
        "method": seen.method,
        "target": seen.target,
        "status": seen.status,
        "at": rfc3339(seen.started_ns),
        "ended_at": rfc3339(seen.ended_ns),
        "outcome": seen.outcome,
        "gap": seen.gap,
        "request": _message_document(seen.request),
        "response": _message_document(seen.response),
        "events": [event_json(each) for each in seen.events],
    }


def _message_document(message: Message) -> dict[str, Any]:
    document = {
        "headers": message.headers,
        "content_encoding": message.coding or None,
        "wire_bytes": message.wire_bytes or None,
        "parts": message.parts or None,
        "decoded_bytes": message.decoded_bytes,
        "complete": message.complete,
        "lost_bytes": message.lost_bytes,
    }
    return document if message.text is None else {**document, "body": message.text}
