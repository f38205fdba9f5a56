"""A capture file of one's own: the packets of chosen connections, and their secrets.

Whether a connection is to be kept is known some packets after its beginning, so packets wait,
within limits, until somebody says `keep`; what nobody wants is forgotten. The file is pcapng
(https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-02.html) with raw IP packets in ns, and
each connection's secrets in a decryption secrets block before its packets: it needs no key log.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from pathlib import Path

# What waits of one connection, and of all together: a decision comes with the first bytes read.
CONNECTION_BYTES_MAX = 4 << 20
WAITING_BYTES_MAX = 64 << 20
PACKET_COST_BYTES = 128
# Connections that are remembered as forgotten.
CUT_MAX = 65_536
FILE_BYTES_MAX = 2 << 30

_RAW_IP, _NANOSECONDS = 101, 9
_SECTION, _INTERFACE, _SECRETS, _PACKET = 0x0A0D0D0A, 1, 10, 6
_TLS_KEY_LOG = 0x544C534B
_TCP, _UDP = 6, 17
_SYN, _ACK = 2, 16


class CaptureWriter:
    """Writes a new file that only this user may read. Raises OSError, FileExistsError too."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self.bytes = 0
        self._write(_SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
        resolution = struct.pack("<HHB3xHH", 9, 1, _NANOSECONDS, 0, 0)
        self._write(_INTERFACE, struct.pack("<HHI", _RAW_IP, 0, 0) + resolution)

    def secrets(self, lines: bytes) -> None:
        """Key log lines."""
        self._write(_SECRETS, struct.pack("<II", _TLS_KEY_LOG, len(lines)) + lines)

    def packet(self, at_ns: int, data: bytes) -> None:
        """A packet from its IP header on."""
        size = len(data)
        head = struct.pack("<IIIII", 0, at_ns >> 32, at_ns & 0xFFFFFFFF, size, size)
        self._write(_PACKET, head + data)

    def flush(self) -> None:
        """What was written so far is in the file, whatever becomes of this process."""
        self._file.flush()

    def close(self) -> None:
        """The file is whole."""
        self._file.close()

    def _write(self, kind: int, body: bytes) -> None:
        padded = body + bytes(-len(body) % 4)
        total = len(padded) + 12
        block = struct.pack("<II", kind, total) + padded + struct.pack("<I", total)
        self.bytes += len(block)
        self._file.write(block)


class Keeping:
    """Puts the packets of connections that are kept into a writer.

    A connection is known by the bytes of its addresses and ports, either way around. `error` is
    why nothing more is written, None while all is well.
    """

    def __init__(self, writer: CaptureWriter) -> None:
        self._writer = writer
        self._waiting: OrderedDict[bytes, list[tuple[int, bytes]]] = OrderedDict()
        self._bytes: dict[bytes, int] = {}
        self._waiting_bytes = 0
        self._kept: set[bytes] = set()
        self.connections = 0
        self.packets = 0
        self.forgotten = 0  # connections of which too much waited
        self._cut: OrderedDict[bytes, None] = OrderedDict()  # those of them that may be kept yet
        self.without_beginning = 0  # connections that are kept although too much of them waited
        self.error: str | None = None

    def packet(self, at_ns: int, data: bytes) -> None:
        """The next packet, from its IP header on."""
        found = _key(data)
        if found is None:
            return
        key, flags = found
        if flags & (_SYN | _ACK) == _SYN:  # another connection between these ports
            self._kept.discard(key)
            self._cut.pop(key, None)
            self._forget(key)
        if key in self._kept:
            self._write(at_ns, data)
            return
        self._waiting.setdefault(key, []).append((at_ns, data))
        cost = len(data) + PACKET_COST_BYTES
        self._bytes[key] = self._bytes.get(key, 0) + cost
        self._waiting_bytes += cost
        if self._bytes[key] > CONNECTION_BYTES_MAX:
            self._cut_off(key)
        while self._waiting_bytes > WAITING_BYTES_MAX:
            self._cut_off(next(iter(self._waiting)))

    def keep(self, key: bytes, secrets: bytes) -> None:
        """Keep a connection from its beginning on; `secrets` are its key log lines."""
        key = min(key, _reverse(key))
        if self.error is None:
            try:
                self._writer.secrets(secrets)
            except OSError as error:
                self._fail(error)
        self.connections += 1
        if key in self._kept:  # a UDP socket's next connection to the same server
            return
        self._kept.add(key)
        self.without_beginning += key in self._cut
        self._cut.pop(key, None)
        for at_ns, data in self._waiting.get(key, ()):
            self._write(at_ns, data)
        self._forget(key)

    def flush(self) -> None:
        """Nothing more comes for a moment."""
        if self.error is None:
            try:
                self._writer.flush()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Nothing more comes."""
        try:
            self._writer.close()
        except OSError as error:
            self._fail(error)

    def _write(self, at_ns: int, data: bytes) -> None:
        if self.error is not None:
            return
        if self._writer.bytes > FILE_BYTES_MAX:
            self.error = f"only {FILE_BYTES_MAX >> 30} GB are recorded"
            return
        try:
            self._writer.packet(at_ns, data)
        except OSError as error:
            self._fail(error)
            return
        self.packets += 1

    def _fail(self, error: OSError) -> None:
        self.error = self.error or error.strerror or str(error)

    def _cut_off(self, key: bytes) -> None:
        """Forget what waits of a connection, as it is too much; it may be kept from here on."""
        self._forget(key)
        self.forgotten += 1
        self._cut[key] = None
        if len(self._cut) > CUT_MAX:
            self._cut.popitem(last=False)

    def _forget(self, key: bytes) -> None:
        self._waiting.pop(key, None)
        self._waiting_bytes -= self._bytes.pop(key, 0)


def _key(packet: bytes) -> tuple[bytes, int] | None:
    """(addresses and ports, TCP's flags, UDP has none); None for all else."""
    if len(packet) >= 28 and packet[0] >> 4 == 4:
        protocol, addresses, at = packet[9], packet[12:20], (packet[0] & 15) * 4
    elif len(packet) >= 48 and packet[0] >> 4 == 6:
        protocol, addresses, at = packet[6], packet[8:40], 40
    else:
        return None
    if protocol not in (_TCP, _UDP) or len(packet) < at + (20 if protocol == _TCP else 8):
        return None
    key = addresses + packet[at : at + 4]
    return min(key, _reverse(key)), packet[at + 13] if protocol == _TCP else 0


def _reverse(key: bytes) -> bytes:
    half = (len(key) - 4) // 2
    return key[half : 2 * half] + key[:half] + key[-2:] + key[-4:-2]
