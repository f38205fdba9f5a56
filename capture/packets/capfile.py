"""pcap and pcapng files: packets with their times, and the secrets a pcapng carries.

Reads front to back in bounded memory, plain or gzipped. Damage is normal: a file cut short ends
the packets, a spoilt block is skipped up to the next one that hangs together, and both are
counted in `losses`. Where nothing follows within a named distance reading stops, `stopped` says
why, and the bytes not read are counted. A file that is no capture at all raises `NotACapture`.
What is inside a packet is `tcp.py`'s business.
"""

from __future__ import annotations

import re
import shlex
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capture.packets.input_files import UNPACK_RATIO_MAX, InputFile

# A frame is at most 64 KiB and a header; the format's own ceiling is 256 KiB. Queues count on it.
FRAME_BYTES_MAX = 262_144
# The largest block accepted: a decryption secrets block holds a whole key log.
BLOCK_BYTES_MAX = 64 << 20
# How far a spoilt pcapng is searched for the next sound block, and a pcap for the end of zeros.
RESYNC_BYTES_MAX = 16 << 20
# Interfaces of one section; a machine with many containers has some hundreds.
INTERFACES_MAX = 65_536
# Options of an interface that are looked at.
OPTIONS_BYTES_MAX = 64 << 10
# Key log text read from one file's blocks: the secrets of 60,000 connections.
SECRETS_BYTES_MAX = 64 << 20
# Times from here on (the year 2200) are nonsense that dates and the database cannot hold.
TIME_NS_MAX = 7_258_118_400_000_000_000

_SECTION, _INTERFACE, _SIMPLE, _ENHANCED, _SECRETS = 0x0A0D0D0A, 1, 3, 6, 10
_SECRETS_TLS = 0x544C534B
_PCAP_MAGIC = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
_ZEROS = re.compile(rb"\0+")
_MULTIPLE_OF_FOUR = rb"[" + b"".join(rb"\x%02x" % low for low in range(0, 256, 4)) + rb"]"
# The mark of an enhanced packet block that a possible length follows, by byte order: an
# expression finds the few places worth a look among megabytes of marks.
_ENHANCED_HEAD = {
    "<": re.compile(rb"\x06\0\0\0(?=" + _MULTIPLE_OF_FOUR + rb"[\x00-\xff][\0-\x04]\0)"),
    ">": re.compile(rb"\0\0\0\x06(?=\0[\0-\x04][\x00-\xff]" + _MULTIPLE_OF_FOUR + rb")"),
}


class NotACapture(Exception):
    """The file is neither pcap nor pcapng; the message names what it is."""


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


def refusal_of_start(first: bytes, unpack: Path) -> str | None:
    """Why no capture begins with these bytes, as a clause; None where one may.

    So that what has no end need not be read to its end. `unpack` is what a command that unpacks it
    is given.
    """
    zipped = first[:2] == b"\x1f\x8b"
    if zipped:
        try:
            first = zlib.decompressobj(wbits=31).decompress(first, 4)
        except zlib.error:
            first = b""
    return None if _is_magic(first[:4]) else _what_it_is(first[:6], zipped, unpack)


def _is_magic(magic: bytes) -> bool:
    return magic in _PCAP_MAGIC or magic == b"\x0a\x0d\x0d\x0a"


class Frame(NamedTuple):
    """One captured frame; `wire_bytes` is its length before the snap length cut it."""

    at_ns: int
    linktype: int
    data: bytes
    wire_bytes: int


class CaptureFile(InputFile):
    """One capture file. `position` and `size` (bytes on disk) serve a progress display.

    `ratio_max` bounds what a gzip may unpack to. `stopped` is a clause for a person, why
    reading ended before the file did, or None.
    """

    def __init__(self, path: Path, ratio_max: int = UNPACK_RATIO_MAX) -> None:
        super().__init__(path, ratio_max)
        self.losses: Counter[str] = Counter()
        self.stopped: str | None = None
        # The time of packets that state none, or an impossible one.
        self._file_ns = min(max(0, self.written_ns), TIME_NS_MAX)
        self.have(4)
        self._magic = self.buffer[:4]
        if not _is_magic(self._magic):
            self.close()
            raise NotACapture(f"{path} {_what_it_is(self._magic, self.zipped, path)}")

    def frames(self) -> Iterator[Frame]:
        """Every frame in the file's order."""
        if self._magic in _PCAP_MAGIC:
            return self._pcap_frames(*_PCAP_MAGIC[self._magic])
        return self._pcapng_frames()

    def _end(self) -> None:
        """The file gives no more: whole, cut short, damaged, or refused."""
        if self.refused:
            self._stop(
                f"it unpacks to more than {self.ratio_max} times its size; if that is right, "
                f"run this again with --unpack-ratio {10 * self.ratio_max}"
            )
        elif self.damaged or self.at < len(self.buffer):
            self.losses["capture_file_cut_short"] = 1

    def _stop(self, reason: str) -> None:
        """Leave the rest of the file alone; its bytes on disk are counted."""
        ahead = 0 if self.zipped else len(self.buffer) - self.at
        self.losses["capture_bytes_not_read"] += max(0, self.size - self.position) + ahead
        self.stopped = reason

    # --- pcap ------------------------------------------------------------------------------

    def _pcap_frames(self, order: str, unit_ns: int) -> Iterator[Frame]:
        if not self.have(24):
            self._end()
            return
        linktype = struct.unpack_from(order + "I", self.buffer, 20)[0] & 0x0FFFFFFF
        self.at = 24
        head = struct.Struct(order + "IIII")
        while self.have(16):
            seconds, fraction, caught, original = head.unpack_from(self.buffer, self.at)
            if caught > FRAME_BYTES_MAX:
                # A pcap has no marks to find the next record by.
                self.losses["capture_file_garbage"] += 1
                self._stop("a damaged packet hides where the next one begins")
                return
            if not (seconds or fraction or caught or original):
                if not self._skip_zeros():
                    return
                continue
            if not self.have(16 + caught):
                break
            start = self.at + 16
            self.at = start + caught
            data = self.buffer[start : self.at]
            yield Frame(seconds * 1_000_000_000 + fraction * unit_ns, linktype, data, original)
        self._end()

    def _skip_zeros(self) -> bool:
        """Step over zeros, as a hole in the file leaves them; False where they go on too long."""
        self.losses["capture_file_garbage"] += 1
        passed = 0
        while self.have(16) and (zeros := _ZEROS.match(self.buffer, self.at)) is not None:
            if passed > RESYNC_BYTES_MAX:
                self._stop(f"there are only zeros for {RESYNC_BYTES_MAX >> 20} MB")
                return False
            records = (zeros.end() - self.at) // 16 * 16  # a record's head is 16 bytes
            if not records:
                break
            self.at += records
            passed += records
        return True

    # --- pcapng ----------------------------------------------------------------------------

    def _pcapng_frames(self) -> Iterator[Frame]:
        order = "<"
        interfaces: list[tuple[int, int, int]] = []
        while self.have(12):
            kind, total = struct.unpack_from(order + "II", self.buffer, self.at)
            if kind == _SECTION:
                order = "<" if self.buffer[self.at + 8 : self.at + 9] == b"\x4d" else ">"
                total = struct.unpack_from(order + "I", self.buffer, self.at + 4)[0]
                interfaces = []
            if (
                not 12 <= total <= BLOCK_BYTES_MAX
                or total % 4
                or not self.have(total)
                or struct.unpack_from(order + "I", self.buffer, self.at + total - 4)[0] != total
            ):
                if not self._resync(order):
                    return
                continue
            body = self.at + 8
            end = self.at = self.at + total
            if kind == _ENHANCED and total >= 32:
                number, high, low, caught, original = struct.unpack_from(
                    order + "IIIII", self.buffer, body
                )
                if number < len(interfaces) and caught <= min(total - 32, FRAME_BYTES_MAX):
                    linktype, multiply, divide = interfaces[number]
                    at_ns = ((high << 32) | low) * multiply // divide
                    if at_ns > TIME_NS_MAX:
                        self.losses["packets_with_an_impossible_time"] += 1
                        at_ns = self._file_ns
                    data = self.buffer[body + 20 : body + 20 + caught]
                    yield Frame(at_ns, linktype, data, original)
                else:
                    self.losses["capture_file_garbage"] += 1
            elif kind == _INTERFACE and total >= 20:
                if len(interfaces) < INTERFACES_MAX:
                    options = self.buffer[body : min(end - 4, body + OPTIONS_BYTES_MAX)]
                    interfaces.append(_interface(options, order))
                else:
                    self.losses["interfaces_over_limit"] += 1
            elif kind == _SIMPLE and interfaces and total >= 16:
                self.losses["packets_without_a_time"] += 1
                original = struct.unpack_from(order + "I", self.buffer, body)[0]
                caught = min(original, total - 16, FRAME_BYTES_MAX)
                data = self.buffer[body + 4 : body + 4 + caught]
                yield Frame(self._file_ns, interfaces[0][0], data, original)
        self._end()

    def _resync(self, order: str) -> bool:
        """Skip garbage up to the next enhanced packet block that hangs together."""
        self.at += 4
        self.have(RESYNC_BYTES_MAX)
        size = len(self.buffer)
        for mark in _ENHANCED_HEAD[order].finditer(self.buffer, self.at):
            found = mark.start()
            total = struct.unpack_from(order + "I", self.buffer, found + 4)[0]
            end = found + total
            if (
                32 <= total <= FRAME_BYTES_MAX + 4096
                and end <= size
                and struct.unpack_from(order + "I", self.buffer, end - 4)[0] == total
            ):
                self.losses["capture_file_garbage"] += 1
                self.at = found
                return True
        searched = size - self.at
        self.at = size
        if self.refused:
            self._end()
        elif self.have(1):
            self._stop(f"no packet follows within {searched >> 20} MB of damage")
        else:
            self.losses["capture_file_cut_short"] = 1
            self._end()
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


def secrets_in(
    path: Path, losses: Counter[str], ratio_max: int = UNPACK_RATIO_MAX
) -> Iterator[memoryview]:
    """The key logs inside a pcapng, wherever in the file they are (none for a pcap).

    Wireshark writes secrets before the packets they open, other programs append them at the end,
    where a single pass would meet them too late. Blocks are stepped over, not read. Text past
    `SECRETS_BYTES_MAX` is counted in `losses`. A damaged tail ends the search; the pass over the
    packets counts it.
    """
    file = InputFile(path, ratio_max)
    try:
        left = SECRETS_BYTES_MAX
        order = ""
        while file.have(12):
            kind, total = struct.unpack_from((order or "<") + "II", file.buffer, file.at)
            if not order and kind != _SECTION:
                return
            if kind == _SECTION:
                order = "<" if file.buffer[file.at + 8 : file.at + 9] == b"\x4d" else ">"
                total = struct.unpack_from(order + "I", file.buffer, file.at + 4)[0]
            if not 12 <= total <= BLOCK_BYTES_MAX:
                return
            if kind == _SECRETS and total >= 20:
                if total > left:
                    losses["tls_secret_bytes_not_read"] += total - 20
                elif file.have(total):
                    left -= total
                    sort, length = struct.unpack_from(order + "II", file.buffer, file.at + 8)
                    if sort == _SECRETS_TLS:
                        text = memoryview(file.buffer)[file.at + 16 : file.at + total - 4]
                        yield text[:length]
            file.skip(total)
    finally:
        file.close()
