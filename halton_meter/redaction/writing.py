"""Connections as a capture, redacted or as they were: TLS anew, with its secrets; packets by scapy.

Each connection is spoken once more through OpenSSL, in memory, with a certificate made for it. What
was lost is spoken, too, and its packets are left out: so a hole is where and as long as it was.
Addresses are those for documentation (RFC 5737); ports of servers and times stay.
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from capture.packets.keeping import CaptureWriter
from halton_meter.model import Direction, TlsChunk, TlsClosed
from halton_meter.redaction.conversation import Heard

SEGMENT_BYTES = 1400
RECORD_BYTES_MAX = 16 << 10
# Between packets that came as one, so that they have an order.
STEP_NS = 1_000
_VALID_DAYS = 3650

Shown = Callable[[str], str]


class _Certificate:
    """A key and a certificate in files, as OpenSSL wants them."""

    def __init__(self, folder: Path) -> None:
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redacted.invalid")])
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(start)
            .not_valid_after(start + datetime.timedelta(days=_VALID_DAYS))
            .sign(key, hashes.SHA256())
        )
        self.path = folder / "certificate.pem"
        self.path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + made.public_bytes(serialization.Encoding.PEM)
        )


class _Tls:
    """Both ends of one connection, in memory; `say` gives the bytes on the wire."""

    def __init__(self, certificate: Path, keys: Path, host: str | None) -> None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate)
        server.num_tickets = 0
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        client.keylog_filename = str(keys)
        for context in (client, server):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        self._in = {way: ssl.MemoryBIO() for way in Direction}
        self._out = {way: ssl.MemoryBIO() for way in Direction}
        sent, received = Direction.SENT, Direction.RECEIVED
        self._ends = {
            sent: client.wrap_bio(self._in[sent], self._out[sent], server_hostname=host),
            received: server.wrap_bio(self._in[received], self._out[received], server_side=True),
        }

    def shake_hands(self) -> Iterable[tuple[Direction, bytes]]:
        """The handshake, one flight after another."""
        waiting = [Direction.SENT, Direction.RECEIVED]
        while waiting:
            for way in tuple(waiting):
                try:
                    self._ends[way].do_handshake()
                    waiting.remove(way)
                except ssl.SSLWantReadError:
                    pass
                if flight := self._out[way].read():
                    self._in[_other(way)].write(flight)
                    yield way, flight

    def say(self, way: Direction, data: bytes) -> bytes:
        """Plaintext of one side, encrypted."""
        self._ends[way].write(data)
        return self._out[way].read()


def _other(way: Direction) -> Direction:
    return Direction.RECEIVED if way is Direction.SENT else Direction.SENT


class _Out(Protocol):
    """Where packets go."""

    def packet(self, at_ns: int, data: bytes) -> None:
        """A packet from its IP header on."""


@dataclass(slots=True)
class _Packets:
    """One TCP connection's packets."""

    writer: _Out
    client: tuple[str, int]
    server: tuple[str, int]
    at_ns: int = 0
    next: dict[Direction, int] = field(
        default_factory=lambda: {Direction.SENT: 1_000, Direction.RECEIVED: 900_000}
    )

    def send(self, way: Direction, flags: str, data: bytes = b"") -> None:
        """One segment."""
        from scapy.layers.inet import IP, TCP

        source, target = self.client, self.server
        if way is Direction.RECEIVED:
            source, target = target, source
        acknowledged = self.next[_other(way)] if "A" in flags else 0
        packet = IP(src=source[0], dst=target[0]) / TCP(
            sport=source[1],
            dport=target[1],
            flags=flags,
            seq=self.next[way] & 0xFFFFFFFF,
            ack=acknowledged & 0xFFFFFFFF,
            window=65535,
        )
        self.writer.packet(self.at_ns, bytes(packet / data if data else packet))
        self.next[way] += len(data) + ("S" in flags) + ("F" in flags)

    def stream(self, way: Direction, data: bytes) -> None:
        """Bytes of one side, in segments."""
        for start in range(0, len(data), SEGMENT_BYTES):
            self.send(way, "PA", data[start : start + SEGMENT_BYTES])

    def skip(self, way: Direction, size: int) -> None:
        """Bytes of one side that were lost."""
        self.next[way] += size

    def open(self) -> None:
        """The beginning of a connection."""
        self.send(Direction.SENT, "S")
        self.send(Direction.RECEIVED, "SA")
        self.send(Direction.SENT, "A")


class _Speaker:
    """Says one connection once more."""

    def __init__(self, heard: Heard, packets: _Packets, tls: _Tls | None) -> None:
        self._heard, self._packets, self._tls = heard, packets, tls
        self._said = {
            way: heard.halves[way].first if heard.connection.joined else 0 for way in Direction
        }

    def begin(self, at_ns: int) -> None:
        """What stands before the first byte, unless the capture began later."""
        self._packets.at_ns = at_ns
        joined = self._heard.connection.joined
        if not joined:
            self._packets.open()
        if self._tls is not None:
            for way, flight in self._tls.shake_hands():
                if joined:
                    self._packets.skip(way, len(flight))
                else:
                    self._packets.stream(way, flight)

    def say(self, item: TlsChunk | TlsClosed) -> None:
        """The next delivery, or the end."""
        packets = self._packets
        packets.at_ns = item.at_ns
        if isinstance(item, TlsClosed):
            if item.clean:
                packets.send(Direction.SENT, "FA")
                packets.send(Direction.RECEIVED, "FA")
                packets.send(Direction.SENT, "A")
            return
        way = item.direction
        half, offset = self._heard.halves[way], item.offset
        fresh = offset + len(item.data) - max(offset, self._said[way])
        if offset > self._said[way]:
            self._lose(way, offset - self._said[way])
        if fresh > 0:
            start = offset + len(item.data) - fresh
            self._stream(way, half.instead(start, fresh))
            self._said[way] = start + fresh
        if (missing := offset + item.length - self._said[way]) > 0:
            self._lose(way, missing)

    def _stream(self, way: Direction, data: bytes) -> None:
        if self._tls is None:
            self._packets.stream(way, data)
            return
        for start in range(0, len(data), RECORD_BYTES_MAX):
            self._packets.stream(way, self._tls.say(way, data[start : start + RECORD_BYTES_MAX]))

    def _lose(self, way: Direction, count: int) -> None:
        self._said[way] += count
        if self._tls is None:
            self._packets.skip(way, count)
            return
        while count:
            size = min(count, RECORD_BYTES_MAX)
            self._packets.skip(way, len(self._tls.say(way, b"x" * size)))
            count -= size


def write(heards: list[Heard], path: Path, shown: Shown) -> tuple[int, int]:
    """Write a new file; (connections, packets). `shown` says how a host is named in it.

    Raises FileExistsError, OSError.
    """
    writer = _Counting(path)
    try:
        with tempfile.TemporaryDirectory(prefix="halton-meter-") as folder:
            certificate = _Certificate(Path(folder))
            speakers = _Speakers(writer, certificate.path, Path(folder), shown)
            items = [
                (item.at_ns, number, item)
                for number, heard in enumerate(heards)
                for item in heard.items
            ]
            for _, number, item in sorted(items, key=lambda each: each[0]):
                speakers.of(number, heards[number], item.at_ns).say(item)
    finally:
        writer.close()
    return len(heards), writer.packets


class _Counting(CaptureWriter):
    """A writer that counts its packets."""

    packets = 0

    def packet(self, at_ns: int, data: bytes) -> None:
        """A packet from its IP header on."""
        self.packets += 1
        super().packet(at_ns, data)


class _Speakers:
    """All connections of a file; each begins when its first byte is due."""

    def __init__(
        self, writer: CaptureWriter, certificate: Path, folder: Path, shown: Shown
    ) -> None:
        self._writer, self._certificate, self._shown = writer, certificate, shown
        self._keys = folder / "keys.log"
        self._addresses: dict[str, str] = {}
        self._speaking: dict[int, _Speaker] = {}

    def of(self, number: int, heard: Heard, at_ns: int) -> _Speaker:
        """The one of a connection."""
        found = self._speaking.get(number)
        if found is None:
            found = self._speaking[number] = self._begun(number, heard)
            found.begin(at_ns)
        return found

    def _begun(self, number: int, heard: Heard) -> _Speaker:
        connection = heard.connection
        host = connection.peer
        shown = self._shown(host) if host else None
        server = self._address(shown or f"connection {number}")
        client = f"198.51.{100 + number // 50_000 % 100}.2", 10_000 + number % 50_000
        packets = _Packets(self._writer, client, (server, connection.peer_port or 443))
        if host is None and not connection.joined:
            return _Speaker(heard, packets, None)  # it was not encrypted
        tls = _Tls(self._certificate, self._keys, shown)
        return _WithSecrets(heard, packets, tls, self._writer, self._keys)

    def _address(self, host: str) -> str:
        """One address for each host: connections that began before have their name by it."""
        number = len(self._addresses) + 1
        found: str = self._addresses.setdefault(host, f"198.18.{number >> 8 & 255}.{number & 255}")
        return found


class _WithSecrets(_Speaker):
    """Puts the connection's secrets into the file before its first packet."""

    def __init__(
        self, heard: Heard, packets: _Packets, tls: _Tls, writer: CaptureWriter, keys: Path
    ) -> None:
        super().__init__(heard, packets, tls)
        self._writer, self._keys = writer, keys

    def begin(self, at_ns: int) -> None:
        """The handshake, of which the secrets come."""
        before = self._keys.stat().st_size if self._keys.exists() else 0
        held = self._packets.writer = _Held()
        super().begin(at_ns)
        with self._keys.open("rb") as file:
            file.seek(before)
            self._writer.secrets(file.read())
        held.release(self._writer)
        self._packets.writer = self._writer


class _Held:
    """Packets that wait for the secrets to stand before them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, bytes]] = []

    def packet(self, at_ns: int, data: bytes) -> None:
        """A packet."""
        self._waiting.append((at_ns, data))

    def release(self, writer: _Out) -> None:
        """Write them."""
        for at_ns, data in self._waiting:
            writer.packet(at_ns, data)
