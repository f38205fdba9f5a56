"""What tshark sees in a capture, through pyshark: packets, TLS, HTTP, and the usage that it shows.

A second reader beside ours, which shares nothing with it but the file. Texts stay in here: what
comes out are counts, names and the numbers of usage objects.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from capture.packets.input_files import open_file
from capture.packets.tshark import find_tshark
from halton_meter.model import Body
from halton_meter.wire import formats

# pyshark reads a thousand packets a second or two.
PACKETS_MAX = 20_000
BODY_BYTES_MAX = 4 << 20
BODIES_MAX = 2_000
# Of what tshark prints.
READ_BYTES = 1 << 18
PACKET_TEXT_BYTES_MAX = 64 << 20
_USAGE_KEYS = (b"usage", b"usageMetadata", b"usage_metadata", b"x_groq")
_TLS_VERSIONS = {"0x0304": "TLS 1.3", "0x0303": "TLS 1.2", "0x0302": "TLS 1.1", "0x0301": "TLS 1.0"}
_SPOKEN = frozenset(("http", "http2", "websocket", "json", "data-text-lines", "media", "data"))
_HEX = re.compile(r"[0-9a-fA-F:]*")


class NoPyshark(Exception):
    """The packets cannot be looked at; the message says why."""


@dataclass(slots=True)
class Stream:
    """One TCP connection as tshark sees it. `usage` has what its answers state, in their order."""

    client: str
    server: str
    packets: int = 0
    sent_packets: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    retransmitted: int = 0
    lost: int = 0
    out_of_order: int = 0
    reset: bool = False
    tls_version: str | None = None
    server_name: str | None = None
    cipher: str | None = None
    alpn: str | None = None
    records: int = 0
    decrypted: int = 0
    protocols: dict[str, int] = field(default_factory=dict)
    usage: list[dict[str, Any]] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    offered: str | None = None
    bodies: dict[str, bytearray] = field(default_factory=dict)


@dataclass(slots=True)
class Packets:
    """All of a capture. `cut` says that only the first `PACKETS_MAX` packets were read."""

    packets: int = 0
    streams: list[Stream] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    cut: bool = False


def look(path: Path, keys: Iterable[Path] = ()) -> Packets:
    """Read a capture with tshark. Raises NoPyshark, TsharkMissing."""
    found = Packets()
    streams: dict[str, Stream] = {}
    with tempfile.TemporaryDirectory(prefix="halton-meter-") as folder:
        for packet in _packets(path, keys, Path(folder)):
            found.packets += 1
            _take(packet, streams, found)
            found.cut = found.packets >= PACKETS_MAX
    for stream in streams.values():
        stream.usage = list(_usages(stream))
        stream.bodies.clear()
    found.streams = list(streams.values())
    return found


def _packets(path: Path, keys: Iterable[Path], folder: Path) -> Iterator[Any]:
    """Pyshark's packets. It reads what tshark prints; tshark is started here.

    Pyshark's own way to start it misses the ends of children, now and then, where other code of
    the process has children, too. A user's own Wireshark profile must not change what is seen.
    """
    try:
        from pyshark.tshark.output_parser import tshark_xml
    except ImportError as error:
        raise NoPyshark(f"pyshark cannot be loaded: {error}") from None
    packet_of: Any = tshark_xml.packet_from_xml_packet
    together = folder / "keys.log"  # tshark takes one
    with together.open("wb") as file:
        for each in keys:  # a pipe was read to its end, by us; what is no file either has none
            with contextlib.suppress(OSError), open_file(each) as log:
                shutil.copyfileobj(log, file)
            file.write(b"\n")
    command = [find_tshark(), "-n", "-r", str(path.resolve()), "-c", str(PACKETS_MAX), "-T", "pdml"]
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        [*command, "-o", f"tls.keylog_file:{together}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", ""), **home},
    )
    assert process.stdout is not None
    try:
        for text in _each_packet(process.stdout):
            yield packet_of(text)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _each_packet(output: IO[bytes]) -> Iterator[bytes]:
    """The text of each packet in PDML; one that is too long is left out."""
    buffer = b""
    while data := output.read(READ_BYTES):
        *whole, buffer = (buffer + data).split(b"</packet>")
        for text in whole:
            start = text.find(b"<packet>")
            if start >= 0:
                yield text[start:] + b"</packet>"
        if len(buffer) > PACKET_TEXT_BYTES_MAX:
            buffer = b""


def _take(packet: Any, streams: dict[str, Stream], found: Packets) -> None:
    if "TCP" not in packet:
        name = str(packet.highest_layer).lower()
        found.others[name] = found.others.get(name, 0) + 1
        return
    tcp = packet.tcp
    network = packet.ip if "IP" in packet else packet.ipv6 if "IPV6" in packet else None
    if network is None:
        return
    source, target = f"{network.src}:{tcp.srcport}", f"{network.dst}:{tcp.dstport}"
    number = str(tcp.stream)
    stream = streams.get(number)
    if stream is None:
        is_answer = int(tcp.srcport) < int(tcp.dstport)
        client, server = (target, source) if is_answer else (source, target)
        stream = streams[number] = Stream(client, server, first_s=float(packet.sniff_timestamp))
    sent = source == stream.client
    stream.last_s = float(packet.sniff_timestamp)
    _count_tcp(stream, tcp, sent)
    names = [layer.layer_name for layer in packet.layers]
    for layer in packet.layers:
        if layer.layer_name == "tls":
            _tls(stream, layer, not _SPOKEN.isdisjoint(names))
        elif layer.layer_name in ("http", "http2", "websocket"):
            stream.protocols[layer.layer_name] = stream.protocols.get(layer.layer_name, 0) + 1
            if not sent:
                _body(stream, layer, names)


def _count_tcp(stream: Stream, tcp: Any, sent: bool) -> None:
    size = int(getattr(tcp, "len", 0) or 0)
    stream.packets += 1
    stream.sent_packets += sent
    if sent:
        stream.bytes_sent += size
    else:
        stream.bytes_received += size
    flags = set(tcp.field_names)
    stream.retransmitted += any(
        f"analysis_{kind}retransmission" in flags for kind in ("", "fast_", "spurious_")
    )
    stream.lost += "analysis_lost_segment" in flags
    stream.out_of_order += "analysis_out_of_order" in flags
    stream.reset = stream.reset or str(getattr(tcp, "flags_reset", "0")) in ("1", "True")


def _values(layer: Any, name: str) -> list[str]:
    found = layer.get_field(name)
    return [] if found is None else [str(each.show) for each in found.all_fields]


def _tls(stream: Stream, layer: Any, is_read: bool) -> None:
    """`is_read`: what the records hold is shown above them."""
    kinds = _values(layer, "handshake_type")
    if "1" in kinds:
        stream.server_name = next(iter(_values(layer, "handshake_extensions_server_name")), None)
    if "2" in kinds:
        chosen = _values(layer, "handshake_extensions_supported_version")
        version = (chosen or _values(layer, "handshake_version") or ["?"])[-1]
        stream.tls_version = _TLS_VERSIONS.get(version, version)
        suite = layer.get_field("handshake_ciphersuite")
        shown = getattr(suite, "showname_value", None) or ""
        stream.cipher = str(shown).split(" (", maxsplit=1)[0] or None
    alpn = _values(layer, "handshake_extensions_alpn_str")
    stream.alpn = alpn[0] if alpn and "2" in kinds else stream.alpn
    encrypted = _values(layer, "record_opaque_type")
    contents = _values(layer, "record_content_type")
    if encrypted:  # a decrypted record shows its inner type, too
        in_the_clear = len(_values(layer, "record_length")) - len(encrypted)
        stream.records += len(encrypted)
        stream.decrypted += max(0, min(len(encrypted), len(contents) - in_the_clear))
    else:
        data = contents.count("23")
        stream.records += data
        stream.decrypted += data if is_read else 0


def _body(stream: Stream, layer: Any, names: list[str]) -> None:
    """Keep what tshark shows of an answer's body until its usage is read."""
    if len(stream.bodies) >= BODIES_MAX:
        return
    if layer.layer_name == "http2":
        for number, data in zip(
            _values(layer, "streamid"), _values(layer, "data_data"), strict=False
        ):
            _keep(stream, f"h2 {number}", _unhexed(data))
    elif layer.layer_name == "websocket":
        for text in _values(layer, "payload_text"):
            _keep(stream, f"ws {len(stream.bodies)}", text.encode())
    else:
        for text in _values(layer, "file_data"):
            is_hex = ":" in text and _HEX.fullmatch(text) is not None
            whole = _unhexed(text) if is_hex else text.encode()
            _keep(stream, f"http {len(stream.bodies)}", whole)


def _keep(stream: Stream, name: str, data: bytes) -> None:
    body = stream.bodies.setdefault(name, bytearray())
    body += data[: max(0, BODY_BYTES_MAX - len(body))]


def _unhexed(text: str) -> bytes:
    try:
        return bytes.fromhex(text.replace(":", ""))
    except ValueError:
        return b""


def _usages(stream: Stream) -> Iterator[dict[str, Any]]:
    for body in stream.bodies.values():
        whole = Body((bytes(body).replace(b"\\r\\n", b"\n"),))
        for key in _USAGE_KEYS:
            found = formats.salvage_object(whole, key)
            if isinstance(found, dict):
                yield dict(_numbers(found))
                break


def _numbers(value: dict[str, Any], before: str = "") -> Iterator[tuple[str, int | float]]:
    """The counts of a usage object, nested ones under a name with a point; zeros are left out."""
    for name, its in value.items():
        if isinstance(its, dict):
            yield from _numbers(its, f"{before}{name}.")
        elif isinstance(its, int | float) and not isinstance(its, bool) and its:
            yield f"{before}{name}", its
