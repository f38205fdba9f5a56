"""pcap and pcapng files: packets with their times, and the secrets a pcapng carries.

Reads front to back in bounded memory, plain or gzipped. Damage is normal: a file cut short ends
the packets, a spoilt block is skipped up to the next one that hangs together, and both are
counted in `losses`. A file that is no capture at all raises `NotACapture`. What is inside a
packet is `tcp.py`'s business.
"""

from __future__ import annotations

import gzip
import shlex
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

# A frame is at most 64 KiB and a header; the format's own ceiling is 256 KiB.
FRAME_BYTES_MAX = 262_144
# The largest block accepted: a decryption secrets block holds a whole key log.
BLOCK_BYTES_MAX = 64 << 20
# How far a spoilt pcapng is searched for the next sound block.
RESYNC_BYTES_MAX = 16 << 20
_READ_BYTES = 1 << 20

_SECTION, _INTERFACE, _SIMPLE, _ENHANCED, _SECRETS = 0x0A0D0D0A, 1, 3, 6, 10
_SECRETS_TLS = 0x544C534B
_PCAP_MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}


class NotACapture(Exception):
    """The file is neither pcap nor pcapng; the message says what it is instead."""


_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\xfd7zX": ("xz", "xz -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"PK\x03\x04": ("zip", "unzip"),
}


def _what_it_is(magic: bytes, zipped: bool, path: Path) -> str:
    if not magic:
        return "holds nothing that gzip can unpack" if zipped else "is empty"
    for start, (name, command) in _COMPRESSED.items():
        if magic.startswith(start):
            unpack = f"{command} {shlex.quote(str(path))}"
            return f"is compressed with {name}; unpack it first: {unpack}"
    return "does not start like a pcap or pcapng file"


class Frame(NamedTuple):
    """One captured frame; `wire_bytes` is its length before the snap length cut it."""

    at_ns: int
    linktype: int
    data: bytes
    wire_bytes: int


class CaptureFile:
    """One capture file. `position` and `size` (bytes on disk) serve a progress display."""

    def __init__(self, path: Path, on_secrets: Callable[[bytes], object] | None = None) -> None:
        self.path = path
        about = path.stat()
        self.size = about.st_size
        self._written_ns = about.st_mtime_ns  # the time of packets that state none
        self.losses: Counter[str] = Counter()
        self._raw = path.open("rb")
        self._on_secrets = on_secrets
        self._file: BinaryIO = self._raw
        # Of a gzip that breaks off, `read` would throw away what comes before the break.
        self._read_some: Callable[[int], bytes] = self._raw.read
        zipped = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        if zipped:
            unzipped = gzip.GzipFile(fileobj=self._raw)
            self._file, self._read_some = cast(BinaryIO, unzipped), unzipped.read1
        self._buffer = b""
        self._at = 0
        self._have(4)
        self._magic = self._buffer[:4]
        if self._magic not in _PCAP_MAGIC and self._magic != b"\x0a\x0d\x0d\x0a":
            self.close()
            raise NotACapture(f"{path}: {_what_it_is(self._magic, zipped, path)}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes of the file read so far."""
        return self._raw.tell() if not self._raw.closed else self.size

    def frames(self) -> Iterator[Frame]:
        """Every frame in the file's order."""
        if self._magic in _PCAP_MAGIC:
            return self._pcap_frames(*_PCAP_MAGIC[self._magic])
        return self._pcapng_frames()

    # --- reading ---------------------------------------------------------------------------

    def _read(self, count: int) -> bytes:
        try:
            return self._read_some(count)
        except (EOFError, OSError, zlib.error):
            self.losses["capture_file_cut_short"] = 1
            return b""

    def _have(self, count: int) -> bool:
        """Make `count` bytes available at `_at`; False at the end of the file."""
        while len(self._buffer) - self._at < count:
            more = self._read(max(_READ_BYTES, count))
            if not more:
                return False
            self._buffer = self._buffer[self._at :] + more
            self._at = 0
        return True

    def _cut_short(self) -> None:
        if self._at < len(self._buffer):
            self.losses["capture_file_cut_short"] = 1

    # --- pcap ------------------------------------------------------------------------------

    def _pcap_frames(self, order: str, unit_ns: int) -> Iterator[Frame]:
        if not self._have(24):
            self._cut_short()
            return
        linktype = struct.unpack_from(order + "I", self._buffer, 20)[0] & 0x0FFFFFFF
        self._at = 24
        head = struct.Struct(order + "IIII")
        while self._have(16):
            seconds, fraction, caught, original = head.unpack_from(self._buffer, self._at)
            if caught > FRAME_BYTES_MAX:
                # A pcap has no marks to find the next record by.
                self.losses["capture_file_garbage"] += 1
                return
            if not self._have(16 + caught):
                break
            start = self._at + 16
            self._at = start + caught
            data = self._buffer[start : self._at]
            yield Frame(seconds * 1_000_000_000 + fraction * unit_ns, linktype, data, original)
        self._cut_short()

    # --- pcapng ----------------------------------------------------------------------------

    def _pcapng_frames(self) -> Iterator[Frame]:
        order = "<"
        interfaces: list[tuple[int, int, int]] = []
        while self._have(12):
            kind, total = struct.unpack_from(order + "II", self._buffer, self._at)
            if kind == _SECTION:
                order = "<" if self._buffer[self._at + 8 : self._at + 9] == b"\x4d" else ">"
                total = struct.unpack_from(order + "I", self._buffer, self._at + 4)[0]
                interfaces = []
            if total < 12 or total % 4 or total > BLOCK_BYTES_MAX:
                if not self._resync(order):
                    return
                continue
            if not self._have(total):
                if not self._resync(order):
                    return
                continue
            end = self._at + total
            if struct.unpack_from(order + "I", self._buffer, end - 4)[0] != total:
                if not self._resync(order):
                    return
                continue
            body = self._at + 8
            self._at = end
            if kind == _ENHANCED and total >= 32:
                number, high, low, caught, original = struct.unpack_from(
                    order + "IIIII", self._buffer, body
                )
                if number < len(interfaces) and caught <= total - 32:
                    linktype, multiply, divide = interfaces[number]
                    at_ns = ((high << 32) | low) * multiply // divide
                    data = self._buffer[body + 20 : body + 20 + caught]
                    yield Frame(at_ns, linktype, data, original)
                else:
                    self.losses["capture_file_garbage"] += 1
            elif kind == _INTERFACE and total >= 20:
                interfaces.append(_interface(self._buffer[body : end - 4], order))
            elif kind == _SECRETS and total >= 20:
                self._secrets(self._buffer[body : end - 4], order)
            elif kind == _SIMPLE and interfaces and total >= 16:
                self.losses["packets_without_a_time"] += 1
                original = struct.unpack_from(order + "I", self._buffer, body)[0]
                caught = min(original, total - 16)
                data = self._buffer[body + 4 : body + 4 + caught]
                yield Frame(self._written_ns, interfaces[0][0], data, original)
        self._cut_short()

    def _secrets(self, body: bytes, order: str) -> None:
        kind, length = struct.unpack_from(order + "II", body)
        if kind == _SECRETS_TLS and self._on_secrets is not None:
            self._on_secrets(body[8 : 8 + length])

    def _resync(self, order: str) -> bool:
        """Skip garbage up to the next enhanced packet block that hangs together."""
        mark = struct.pack(order + "I", _ENHANCED)
        self._at += 4
        self._have(RESYNC_BYTES_MAX)
        found = self._buffer.find(mark, self._at)
        while found >= 0:
            if found + 8 > len(self._buffer):
                break
            total = struct.unpack_from(order + "I", self._buffer, found + 4)[0]
            end = found + total
            if (
                32 <= total <= FRAME_BYTES_MAX + 4096
                and total % 4 == 0
                and end <= len(self._buffer)
                and struct.unpack_from(order + "I", self._buffer, end - 4)[0] == total
            ):
                self.losses["capture_file_garbage"] += 1
                self._at = found
                return True
            found = self._buffer.find(mark, found + 1)
        self.losses["capture_file_cut_short"] = 1
        self._at = len(self._buffer)
        return False


def _interface(body: bytes, order: str) -> tuple[int, int, int]:
    """An interface's (link type, multiplier, divisor) to turn its ticks into nanoseconds."""
    linktype = struct.unpack_from(order + "H", body)[0]
    multiply, divide = 1000, 1  # microseconds unless if_tsresol says otherwise
    at = 8
    while at + 4 <= len(body):
        code, length = struct.unpack_from(order + "HH", body, at)
        if code == 9 and length >= 1 and at + 4 < len(body):
            resolution = body[at + 4]
            base, exponent = (2, resolution & 0x7F) if resolution & 0x80 else (10, resolution)
            multiply, divide = 1_000_000_000, base**exponent
        if code == 0:
            break
        at += 4 + (length + 3) // 4 * 4
    return linktype, multiply, divide


def secrets_in(path: Path) -> list[bytes]:
    """The key logs inside a pcapng, wherever in the file they are (none for a pcap).

    Wireshark writes secrets before the packets they open, other programs append them at the end,
    where a single pass would meet them too late. Blocks are stepped over, not read.
    """
    found: list[bytes] = []
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        file: BinaryIO = raw
        if magic[:2] == b"\x1f\x8b":
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        order = "<"
        try:
            while len(head := file.read(12)) == 12:
                kind, total = struct.unpack_from(order + "II", head)
                if kind == _SECTION:
                    order = "<" if head[8:9] == b"\x4d" else ">"
                    total = struct.unpack_from(order + "I", head, 4)[0]
                if total < 12 or total > BLOCK_BYTES_MAX:
                    break
                if kind == _SECRETS and total >= 20:
                    body = head[8:] + file.read(total - 12)
                    sort, length = struct.unpack_from(order + "II", body)
                    if sort == _SECRETS_TLS:
                        found.append(body[8 : 8 + length])
                else:
                    file.seek(total - 12, 1)
        except (EOFError, OSError, struct.error, zlib.error):
            pass  # a damaged tail; the pass over the packets counts it
    return found
