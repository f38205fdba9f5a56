"""The ClientHello in a QUIC connection's first packets, with the host; nothing else is read.

Initial packets are encrypted with keys that follow from the connection's id in them (RFC 9001,
5.2), so anybody may read them; a client may cut its hello over several, in pieces in any order.
Versions 1 (RFC 9000) and 2 (RFC 9369). No secrets, no streams: what follows is `quic_packets.py`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from capture.packets.tls import ClientHello, client_hello, expand_label

CONNECTIONS_MAX = 4_096
# Datagrams of one connection that are looked at: a hello with post-quantum shares takes two.
DATAGRAMS_MAX = 16
HELLO_BYTES_MAX = 16 << 10
CONNECTION_ID_BYTES_MAX = 20


class Version(NamedTuple):
    """What differs between versions: RFC 9001, 5.2 and RFC 9369, 3.3."""

    salt: bytes
    label: bytes
    initial: int  # the type of Initial packets in the first byte


VERSIONS = {
    1: Version(bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a"), b"quic", 0x00),
    0x6B3343CF: Version(bytes.fromhex("0dede3def700a6db819381be6e269dcbf9bd2ed9"), b"quicv2", 0x10),
}


class InitialKeys(NamedTuple):
    """The keys of a client's Initial packets."""

    key: bytes
    iv: bytes
    header: bytes


def initial_keys(version: Version, connection_id: bytes) -> InitialKeys:
    """By the destination connection id of the client's first packet."""
    extract = HMAC(version.salt, SHA256())
    extract.update(connection_id)
    secret = expand_label(extract.finalize(), b"client in", 32)
    names = ((b"key", 16), (b"iv", 12), (b"hp", 16))
    return InitialKeys(
        *(expand_label(secret, version.label + b" " + name, size) for name, size in names)
    )


class Told(NamedTuple):
    """A client's hello, with the version and the datagrams in which it came."""

    hello: ClientHello
    version: Version
    datagrams: list[bytes]


@dataclass(slots=True)
class _Connection:
    keys: InitialKeys
    version: Version
    first_id: bytes
    is_told: bool = False
    crypto: dict[int, bytes] = field(default_factory=dict)
    datagrams: list[bytes] = field(default_factory=list)


class QuicHellos:
    """The hellos of QUIC connections, each told once; `unnamed` counts those without a host."""

    def __init__(self) -> None:
        self._connections: OrderedDict[bytes, _Connection] = OrderedDict()
        self.unnamed = 0

    def hello(self, addresses: bytes, data: bytes) -> Told | None:
        """The hello, once enough of a connection was seen; `addresses` tell connections apart.

        Where addresses and ports are used again, a new connection is known by its first packet: no
        other can be opened with the keys that follow from its own id.
        """
        known = self._connections.get(addresses)
        for version, connection_id, start, end in _initials(data):
            if known is None or (known.is_told and connection_id != known.first_id):
                keys = initial_keys(version, connection_id)
                if known is not None and _opened(keys, data, start, end) is None:
                    continue
                known = _Connection(keys, version, connection_id)
                self._begin(addresses, known)
            if known.is_told:
                continue
            payload = _opened(known.keys, data, start, end)
            for offset, piece in _crypto(payload or b""):
                if offset + len(piece) <= HELLO_BYTES_MAX:
                    known.crypto[offset] = piece
        if known is None or known.is_told:
            return None
        known.datagrams.append(data)
        return self._judge(known)

    def _begin(self, addresses: bytes, connection: _Connection) -> None:
        self._connections[addresses] = connection
        self._connections.move_to_end(addresses)
        if len(self._connections) > CONNECTIONS_MAX:
            _, oldest = self._connections.popitem(last=False)
            self.unnamed += not oldest.is_told

    def _judge(self, known: _Connection) -> Told | None:
        message = _joined(known.crypto)
        whole = len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4])
        if not whole and len(known.datagrams) < DATAGRAMS_MAX:
            return None
        datagrams, known.datagrams, known.crypto = known.datagrams, [], {}
        known.is_told = True
        hello = client_hello(message) if whole else None
        if hello is None or hello.server_name is None:
            self.unnamed += 1
            return None
        return Told(hello, known.version, datagrams)


def _joined(pieces: dict[int, bytes]) -> bytes:
    """What is there from the beginning on, without a gap."""
    found = bytearray()
    for offset in sorted(pieces):
        if offset > len(found):
            break
        found += pieces[offset][len(found) - offset :]
    return bytes(found)


def _initials(data: bytes) -> Iterator[tuple[Version, bytes, int, int]]:
    """The Initial packets in a datagram: (version, destination id, packet number at, start, end).

    `start` is the packet's first byte; RFC 9000, 17.2.2.
    """
    at = 0
    while at + 7 < len(data) and data[at] & 0xC0 == 0xC0:
        version = VERSIONS.get(int.from_bytes(data[at + 1 : at + 5]))
        if version is None:
            return
        length = data[at + 5]
        destination = data[at + 6 : at + 6 + length]
        place = at + 6 + length
        if length > CONNECTION_ID_BYTES_MAX or place >= len(data):
            return
        place += 1 + data[place]
        is_initial = data[at] & 0x30 == version.initial
        if is_initial:
            token, place = number(data, place)
            place += token
        size, place = number(data, place)
        end = place + size
        if place >= len(data) or end > len(data):
            return
        if is_initial:
            yield version, destination, at, end
        at = end


def _opened(keys: InitialKeys, data: bytes, start: int, end: int) -> bytes | None:
    """The payload of an Initial packet; RFC 9001, 5.3 and 5.4."""
    place = start + 6 + data[start + 5]
    place += 1 + data[place]
    token, place = number(data, place)
    _, place = number(data, place + token)
    sample = data[place + 4 : place + 20]
    if len(sample) < 16 or end - place < 20:
        return None
    encryptor = Cipher(algorithms.AES(keys.header), modes.ECB()).encryptor()  # noqa: S305 (RFC 9001)
    mask = encryptor.update(sample)
    first = data[start] ^ (mask[0] & 0x0F)
    size = (first & 3) + 1
    shown = bytes(a ^ b for a, b in zip(data[place : place + size], mask[1:], strict=False))
    head = bytes((first,)) + data[start + 1 : place] + shown
    nonce = int.from_bytes(keys.iv) ^ int.from_bytes(shown)
    try:
        return AESGCM(keys.key).decrypt(nonce.to_bytes(12), data[place + size : end], head)
    except (InvalidTag, ValueError):
        return None


def _crypto(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The pieces of the hello: (offset, bytes) of each CRYPTO frame; RFC 9000, 19."""
    at = 0
    while at < len(payload):
        kind = payload[at]
        if kind in (0, 1):  # PADDING, PING
            at += 1
        elif kind == 6:
            offset, at = number(payload, at + 1)
            length, at = number(payload, at)
            yield offset, payload[at : at + length]
            at += length
        else:  # an ACK or the end of the connection: no piece follows in what clients send first
            return


def number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer and where it ends; RFC 9000, 16. Past the end: past the end."""
    if at >= len(data):
        return 0, len(data)
    size = 1 << (data[at] >> 6)
    return int.from_bytes(data[at : at + size]) & ((1 << (8 * size - 2)) - 1), at + size
