"""tshark as the decryptor: whole TLS records in, plaintext out, in order, from one process.

tshark is slow per packet and loses its place at the first missing byte, so it is not given the
capture. It reads a stream that `records.py` makes for it: connections already reassembled, several
records a packet, one made-up address a connection. Plaintext comes back through tshark's export
of PDUs, in binary, each with the number of the packet it was in: measured on Wireshark 4.0, that
is 5 times as fast as `-T fields`, which spends its time on hexadecimal. Where tshark answers
nothing although a packet holds application data, or was not asked because records are missing,
`tls.Opener` takes over.

The thread of a `Decryptor` owns all of its plaintext state; the feeding thread only queues.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from capture.packets import tls
from capture.packets.keylog import KeyLog
from halton_meter.model import Connection, Direction, TlsChunk, TlsClosed

# Work queued for one decryptor; each is at most one packet of 64 KiB.
QUEUED_MAX = 512
# Bytes given to one tshark before new connections go to a fresh one: it keeps all it has
# decrypted in memory until it ends.
TSHARK_BYTES_MAX = 96 << 20
# tsharks at a time, each with what it was given in memory. Connections that are still open when
# the oldest has to go are read without it from there on.
TSHARKS_MAX = 8
# How long tshark may say nothing while both we and it wait for one another.
TSHARK_SILENT_SECONDS_MAX = 60.0
_WATCH_SECONDS = 1.0
# What tshark may write for what it is given: plaintext is shorter than its records, but for tags.
OUTPUT_RATIO_MAX = 8
OUTPUT_BYTES_FREE = 16 << 20
PDU_BYTES_MAX = 1 << 20
# Trial decryptions that one decryptor spends in vain: on connections joined in their middle, and
# behind holes on records that no number fits.
TRIALS_MAX = 4_000_000
# A look through the key log for secrets to try, and a key made of one, in trials of that cost.
_HANDSHAKES_PER_TRIAL, _TRIALS_PER_KEY = 8, 16
# A record kept to find out how many handshake records preceded the first data.
SAMPLE_BYTES_MAX = 4_096


def _filler() -> bytes:
    """A packet that tshark exports although it is no TLS: SIP is the smallest such protocol."""
    text = b"OPTIONS sip:a SIP/2.0\r\n\r\n" + b" " * 16_000
    datagram = struct.pack("!HHHH", 5060, 5060, 8 + len(text), 0) + text
    addresses = bytes((192, 0, 2, 2, 192, 0, 2, 3))
    head = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(datagram), 0x4000, 64, 17, 0)
    return head + addresses + datagram


_FILLER = _filler()
_NO_FRAME = 1 << 62
_EXIT_SECONDS_MAX = 5.0


class TsharkMissing(Exception):
    """tshark is not installed."""


@dataclass(slots=True, eq=False)
class Plaintext:
    """One direction of a connection as the decryptor's thread sees it."""

    connection: Connection
    direction: Direction
    offset: int = 0
    end_position: int | None = None  # of the last record dealt with, in the TCP stream
    end_index: int = 0  # encrypted records up to there
    base: int | None = None  # record number = index + base, once proven
    sample: tuple[bytes, int] | None = None
    opener: tls.Opener | None = None
    asked_opener: bool = False


@dataclass(slots=True, eq=False)
class Keys:
    """What a connection's hellos hold; both directions share it."""

    client_random: bytes | None = None
    server_hello: tls.ServerHello | None = None
    claimed: bytes | None = None  # by trial: the handshake that a joined connection belongs to
    halves: dict[Direction, Plaintext] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Records:
    """Whole records of one direction; `index` counts its encrypted records before these."""

    half: Plaintext
    keys: Keys
    payload: bytes
    position: int
    index: int
    encrypted: int
    ciphered: bool  # a ChangeCipherSpec came before
    at_ns: int
    asked: bool  # tshark is given them
    frame: int = 0  # the number of the packet they are in, when asked


@dataclass(frozen=True, slots=True)
class Clear:
    """Bytes of a connection that was never encrypted."""

    half: Plaintext
    data: bytes
    lost: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a direction whose last bytes are missing, at `position` of the TCP stream."""

    half: Plaintext
    keys: Keys
    position: int
    at_ns: int


_Work = Records | Clear | Tail | TlsClosed | None

# An alert's plaintext: what a hole at the very end may have held instead of data.
_ALERT_BYTES = 2


class Decryptor:
    """One tshark and the thread that pairs its output with what was asked."""

    def __init__(
        self, keys: KeyLog, keylog_path: Path, give: Callable[[TlsChunk | TlsClosed], None]
    ) -> None:
        self._keys = keys
        self._keylog_path = keylog_path
        self._give = give
        self._work: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._frames = 0
        self._pdu: tuple[int, bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = False
        self._trials_left = TRIALS_MAX
        self._claimed: set[bytes] = set()
        self.losses: Counter[str] = Counter()
        self.decrypted = 0  # connections of which something was read
        self._being_read: set[str] = set()
        self.fed_bytes = 0
        self._told_bytes = 0
        self.open_connections = 0
        self.is_spent = False
        # Since when the decryptor's thread waits for tshark, and since when the feeding one does.
        self._reading_since: float | None = None
        self._writing_since: float | None = None
        self._given_up = False
        self._joined = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decryptor", daemon=True)
        self._thread.start()

    # --- the feeding side --------------------------------------------------------------------

    def ask(self, records: Records, packet: bytes) -> None:
        """Have tshark decrypt `records`, which `packet` (IP) carries."""
        if self._process is None:
            self._process = start_tshark(self._keylog_path)
            threading.Thread(target=self._watch, name="tshark's watch", daemon=True).start()
        self._put(records)
        self._write(packet)

    def put(self, work: Records | Clear | Tail | TlsClosed) -> None:
        """Queue what needs no tshark, in its place between what does."""
        self._put(work)

    def spend(self) -> None:
        """Let tshark go: what its open connections say from here on is read without it."""
        self.is_spent = True
        self._close_input()

    def finish(self) -> None:
        """No more work; returns at once, or as soon as tshark has taken the last of it."""
        self._put(None)
        self._close_input()

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with self._waiting(), contextlib.suppress(OSError):
                self._process.stdin.close()

    def join(self) -> None:
        """Wait until everything was given out, and for tshark to be gone."""
        with self._waiting():
            self._thread.join()
        self.kill()

    def kill(self) -> None:
        """End tshark, by its process id, if it is still there."""
        self._joined.set()
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            try:
                process.wait(0.5 if self._failed else _EXIT_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._given_up or process.returncode not in (0, -9):
            self.losses["tshark_failed"] += 1
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """The feeding thread waits for tshark, perhaps for ever: see `_watch`."""
        self._writing_since = time.monotonic()
        try:
            yield
        finally:
            self._writing_since = None

    def _watch(self) -> None:
        """End a tshark that neither takes nor gives anything while both our threads wait for it.

        A slow reader of what we print blocks neither clock: then nobody waits for tshark.
        """
        while not self._joined.wait(min(_WATCH_SECONDS, TSHARK_SILENT_SECONDS_MAX / 4)):
            reading, writing = self._reading_since, self._writing_since
            if reading is None or writing is None:
                continue
            if time.monotonic() - max(reading, writing) > TSHARK_SILENT_SECONDS_MAX:
                self._give_up()
                return

    def _give_up(self) -> None:
        """Go on without tshark; its work is done by `tls.Opener`, as far as that can."""
        self._failed = self._given_up = True
        if self._process is not None:
            self._process.kill()

    def _put(self, work: _Work) -> None:
        with self._changed:
            while len(self._work) >= QUEUED_MAX:
                # tshark may sit on the last packets until its input and output buffers fill: fill
                # them, or the thread would wait for tshark, tshark for us, and we for the thread.
                if self._process is not None and not self._failed and not self.is_spent:
                    self._changed.release()
                    try:
                        self._write(_FILLER)
                        self._write(_FILLER)
                    finally:
                        self._changed.acquire()
                self._writing_since = self._writing_since or time.monotonic()
                self._changed.wait_for(lambda: len(self._work) < QUEUED_MAX, 1.0)
            self._writing_since = None
            if isinstance(work, Records) and work.asked:
                work.frame = self._frames + 1
            self._work.append(work)
            self._changed.notify_all()

    def _write(self, packet: bytes) -> None:
        size = len(packet)
        self.fed_bytes += size
        self._frames += 1
        assert self._process is not None
        assert self._process.stdin is not None
        self._writing_since = self._writing_since or time.monotonic()
        try:
            self._process.stdin.write(struct.pack("<IIII", 0, 0, size, size) + packet)
            if packet is _FILLER:
                self._process.stdin.flush()
        except OSError:
            self._failed = True
        if packet is not _FILLER:
            self._writing_since = None

    # --- the decryptor's thread ----------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._take()) is not None:
            try:
                self._do(work)
            except Exception as error:  # a bug of ours costs these records, not the run
                self.losses[f"tls_records_unreadable_{type(error).__name__}"] += 1

    def _do(self, work: Records | Clear | Tail | TlsClosed) -> None:
        if isinstance(work, TlsClosed):
            self._being_read.discard(work.connection.id)
            self._give(work)
        elif isinstance(work, Records):
            self._records(work)
        elif isinstance(work, Tail):
            self._tail(work)
        else:
            work.half.offset += work.lost
            self._plain(work.half, work.data, work.at_ns)

    def _take(self) -> _Work:
        with self._changed:
            self._changed.wait_for(lambda: self._work)
            work = self._work.popleft()
            if len(self._work) == QUEUED_MAX // 2:
                self._changed.notify_all()
            return work

    def _answer(self, frame: int) -> bytes:
        """The plaintext tshark found in packet `frame`: what it exported up to the next one's."""
        found: list[bytes] = []
        while True:
            if self._pdu is None:
                self._pdu = self._next_pdu()
            if self._pdu[0] > frame:
                return b"".join(found)
            if self._pdu[0] == frame:
                found.append(self._pdu[1])
            self._pdu = None

    def _next_pdu(self) -> tuple[int, bytes]:
        assert self._process is not None
        assert self._process.stdout is not None
        self._reading_since = time.monotonic()
        try:
            pdu = read_pdu(self._process.stdout)
        except ValueError:
            self._give_up()
            pdu = None
        self._reading_since = None
        if pdu is None:
            return _NO_FRAME, b""
        self._told_bytes += len(pdu[1])
        if self._told_bytes > OUTPUT_RATIO_MAX * self.fed_bytes + OUTPUT_BYTES_FREE:
            self._give_up()
            return _NO_FRAME, b""
        return pdu

    def _records(self, work: Records) -> None:
        half = work.half
        data = self._answer(work.frame) if work.asked else b""
        if not data or self._is_short(work, len(data)):
            if work.encrypted:
                self._open(work, data)
            return
        if half.sample is None:
            half.sample = _sample(work)
        opener = self._opener(work.half, work.keys)
        missing = work.index - half.end_index
        if opener is not None and opener.overhead is not None:
            half.offset += self._gap(half, work.position, missing * opener.overhead)
        self._handled(half, work.position + len(work.payload), work.index + work.encrypted)
        self._plain(half, data, work.at_ns)

    def _tail(self, work: Tail) -> None:
        """Say that the end is missing; how long it was is known but for the number of records."""
        opener, half = self._opener(work.half, work.keys), work.half
        overhead = (opener.overhead if opener else None) or 22
        lost = self._gap(half, work.position, overhead)
        if lost > _ALERT_BYTES:
            self._give(
                TlsChunk(half.connection, half.direction, half.offset, b"", lost, work.at_ns)
            )
            half.offset += lost

    def _is_short(self, work: Records, length: int) -> bool:
        """Whether tshark gave less than the records hold: one of them is spoilt, or no data."""
        opener = self._opener(work.half, work.keys)
        if opener is None or opener.overhead is None:
            return False
        return length != len(work.payload) - work.encrypted * opener.overhead

    @staticmethod
    def _gap(half: Plaintext, position: int, overhead: int) -> int:
        """Plaintext bytes between the last record dealt with and the one at `position`."""
        if half.end_position is None or position <= half.end_position:
            return 0
        return max(0, position - half.end_position - overhead)

    @staticmethod
    def _handled(half: Plaintext, position: int, index: int) -> None:
        half.end_position, half.end_index = position, index

    def _plain(self, half: Plaintext, data: bytes, at_ns: int) -> None:
        if not data:
            return
        if half.connection.id not in self._being_read:
            self._being_read.add(half.connection.id)
            self.decrypted += 1
        self._give(TlsChunk(half.connection, half.direction, half.offset, data, len(data), at_ns))
        half.offset += len(data)

    # --- without tshark ------------------------------------------------------------------------

    def _open(self, work: Records, found: bytes) -> None:
        """Decrypt records one by one, holes before and between them included.

        `found` is what tshark made of them, for suites that only it can decrypt.
        """
        opener = self._opener(work.half, work.keys)
        if opener is None and found:
            self._plain(work.half, found, work.at_ns)
            return
        before = work.half.offset
        for record, index, position in encrypted_records(work):
            if opener is None or opener.hopeless:
                self.losses["tls_records_undecryptable"] += record[0] == tls.APPLICATION
            elif record[0] == tls.APPLICATION or not opener.tls13:
                self._open_one(work, opener, record, index, position)
        if found and work.half.offset == before:  # early data: under a key of its own
            self._plain(work.half, found, work.at_ns)

    def _open_one(
        self, work: Records, opener: tls.Opener, record: bytes, index: int, position: int
    ) -> None:
        half = work.half
        numbers = self._numbers(work, opener, index, position, len(record))
        opened = opener.open(record, numbers)
        if opened is None:
            self._trials_left -= len(numbers)
            # Handshake records under other keys come first; they hold no data.
            if record[0] != tls.APPLICATION and work.asked and half.end_position is not None:
                # A second handshake, under keys that only tshark follows: no data is missing.
                self._handled(half, position + len(record), index + 1)
            before_data = half.base is None and half.sample is None
            if not before_data or index >= tls.HANDSHAKE_RECORDS_MAX:
                self.losses["tls_records_undecryptable"] += record[0] == tls.APPLICATION
            return
        kind, plain, number = opened
        self._claim(work, opener)
        key = opener.key
        assert key is not None
        missing = 0 if half.base is None else number - (half.end_index + half.base)
        half.offset += self._gap(half, position, missing * key.overhead)
        half.base = number - index
        self._handled(half, position + len(record), index + 1)
        if kind == tls.APPLICATION:
            self._plain(half, plain, work.at_ns)
        elif kind == tls.HANDSHAKE and plain[:1] == b"\x18" and key.tls13:  # KeyUpdate
            opener.advance()
            half.base = -(index + 1)

    def _numbers(
        self, work: Records, opener: tls.Opener, index: int, position: int, size: int
    ) -> range:
        """Which record numbers to try."""
        half, keys = work.half, work.keys
        if half.base is None and half.sample is not None:
            self._calibrate(half, opener)
        if half.base is not None:
            known = index + half.base
            gap = position - (half.end_position or 0)
            ahead = min(gap // 22, tls.LOST_RECORDS_MAX) if self._trials_left > 0 else 0
            return range(known, known + 1 + ahead)
        if self._trials_left <= 0:
            return range(0)
        if keys.client_random is not None or keys.claimed is not None:
            joined = keys.client_random is None
            ahead = tls.TRIAL_RECORDS_MAX if joined else tls.LOST_RECORDS_MAX
            # Where nothing is missing these may be handshake records or tickets.
            return range(
                max(0, index - tls.HANDSHAKE_RECORDS_MAX), index + 1 + (0 if work.asked else ahead)
            )
        cost = len(opener) * tls.TRIAL_RECORDS_MAX
        if opener.key is None and (size > tls.TRIAL_BYTES_MAX or cost > self._trials_left):
            return range(0)
        self._trials_left -= cost if opener.key is None else 0
        return range(tls.TRIAL_RECORDS_MAX)

    def _opener(self, half: Plaintext, keys: Keys) -> tls.Opener | None:
        sent = half.direction is Direction.SENT
        random = keys.client_random or keys.claimed
        if half.opener is None and random is not None and not half.asked_opener:
            half.opener = tls.opener(self._keys, random, keys.server_hello, sent=sent)
            half.asked_opener = keys.server_hello is not None
        elif half.opener is None and random is None and not half.asked_opener:
            half.asked_opener = True
            if self._trials_left > 0:
                half.opener = tls.trial_opener(self._keys, self._claimed, sent=sent)
                self._trials_left -= len(self._keys) // _HANDSHAKES_PER_TRIAL
                self._trials_left -= len(half.opener) * _TRIALS_PER_KEY
        return half.opener

    def _claim(self, work: Records, opener: tls.Opener) -> None:
        """A joined connection's secret is known: the other direction need not be searched."""
        keys = work.keys
        if keys.client_random is not None or keys.claimed is not None or opener.secret is None:
            return
        keys.claimed = opener.random_of.get(opener.secret)
        if keys.claimed is not None:
            self._claimed.add(keys.claimed)
            for half in keys.halves.values():
                if half.opener is not opener:
                    half.opener, half.asked_opener = None, False

    @staticmethod
    def _calibrate(half: Plaintext, opener: tls.Opener) -> None:
        """Find out how many encrypted records were handshake, by a record that tshark read."""
        assert half.sample is not None
        record, index = half.sample
        opened = opener.open(record, range(max(0, index - tls.HANDSHAKE_RECORDS_MAX), index + 1))
        half.base = opened[2] - index if opened else None


class Decryptors:
    """The decryptors of a run: a new one begins once the newest has had its share of bytes."""

    def __init__(
        self,
        keys: KeyLog,
        keylog_path: Callable[[], Path],
        give: Callable[[TlsChunk | TlsClosed], None],
    ) -> None:
        self._keys = keys
        self._keylog_path = keylog_path
        self._give = give
        self._all: list[Decryptor] = []
        self._live: list[Decryptor] = []  # those not finished, the newest last

    def join_newest(self) -> Decryptor:
        """The one for a new connection, which must `leave` it."""
        if not self._live or self._live[-1].fed_bytes > TSHARK_BYTES_MAX:
            made = Decryptor(self._keys, self._keylog_path(), self._give)
            self._all.append(made)
            self._live.append(made)
            unspent = [each for each in self._live if not each.is_spent]
            for each in unspent[:-TSHARKS_MAX]:
                each.spend()
        decryptor = self._live[-1]
        decryptor.open_connections += 1
        return decryptor

    def leave(self, decryptor: Decryptor) -> None:
        """A connection has ended. The last one ends a decryptor that has had its share."""
        decryptor.open_connections -= 1
        if not decryptor.open_connections and decryptor is not self._live[-1]:
            self._live.remove(decryptor)
            decryptor.finish()

    def join(self) -> Iterator[Decryptor]:
        """Wait until everything was given out; the decryptors, each when it is done."""
        for decryptor in self._live:
            decryptor.finish()
        for decryptor in self._all:
            decryptor.join()
            yield decryptor

    def kill(self) -> None:
        """End every tshark that is still there."""
        for decryptor in self._all:
            decryptor.kill()


def _sample(work: Records) -> tuple[bytes, int] | None:
    """The first small application record of a packet, with its index."""
    for record, index, _ in encrypted_records(work):
        if record[0] == tls.APPLICATION and len(record) <= SAMPLE_BYTES_MAX:
            return record, index
    return None


def encrypted_records(work: Records) -> Iterator[tuple[bytes, int, int]]:
    """The encrypted records of `work`, each with its index and position."""
    index, position, ciphered = work.index, work.position, work.ciphered
    for record in records_of(work.payload):
        if record[0] == tls.CHANGE_CIPHER_SPEC:
            ciphered = True
        elif record[0] == tls.APPLICATION or ciphered:
            yield record, index, position
            index += 1
        position += len(record)


def records_of(payload: bytes) -> list[bytes]:
    """Cut whole records apart."""
    found: list[bytes] = []
    at = 0
    while at + 5 <= len(payload):
        end = at + 5 + (payload[at + 3] << 8 | payload[at + 4])
        found.append(payload[at:end])
        at = end
    return found


_PACKET_BLOCK = 6
_PDU_NAME, _PDU_FRAME, _PDU_END = 0x0D, 0x1E, 0
_PDU_TAGS_BEFORE_FRAME = 5 * 8  # two IPv4 addresses, port type, two ports


def read_pdu(stream: IO[bytes]) -> tuple[int, bytes] | None:
    """The next exported PDU as (number of the packet it was in, bytes); None at the end.

    tshark writes pcapng; a PDU's packet begins with tags (16-bit kind and length, big-endian).
    Raises ValueError for what no tshark writes.
    """
    while True:
        head = stream.read(8)
        if len(head) < 8:
            return None
        kind, total = struct.unpack("=II", head)
        if not 12 <= total <= PDU_BYTES_MAX or (kind == _PACKET_BLOCK and total < 32):
            raise ValueError("not what tshark exports")
        body = stream.read(total - 8)
        if len(body) < total - 8:
            return None
        if kind == _PACKET_BLOCK:
            return _pdu(body[20 : 20 + struct.unpack_from("=I", body, 12)[0]])


def _pdu(packet: bytes) -> tuple[int, bytes]:
    at, frame = 0, 0
    while at + 4 <= len(packet):
        kind, length = packet[at] << 8 | packet[at + 1], packet[at + 2] << 8 | packet[at + 3]
        at += 4
        if kind == _PDU_END:
            break
        if kind == _PDU_FRAME:
            frame = int.from_bytes(packet[at : at + length])
        at += length
        if kind == _PDU_NAME and packet[at + 40 : at + 44] == b"\0\x1e\0\4":
            at += _PDU_TAGS_BEFORE_FRAME  # the usual case, without a look at each
    return frame, packet[at:]


def find_tshark() -> str:
    """Where tshark is; `TsharkMissing` with the command to run otherwise."""
    path = shutil.which("tshark")
    if path is None:
        raise TsharkMissing("tshark is not installed; run: sudo apt install tshark")
    return path


def start_tshark(keylog_path: Path) -> subprocess.Popen[bytes]:
    """Start tshark on a pcap that comes through its standard input."""
    command = [find_tshark(), "-n", "-r", "-", "-U", "OSI layer 7", "-w", "-"]
    for name in ("http", "http2", "json", "websocket", "quic", "xml", "media", "image-jfif"):
        command += ["--disable-protocol", name]
    for option in (
        f"tls.keylog_file:{keylog_path}",
        "tls.desegment_ssl_application_data:FALSE",
        "tcp.desegment_tcp_streams:FALSE",
        "tcp.analyze_sequence_numbers:FALSE",
        "tcp.track_bytes_in_flight:FALSE",
        "tcp.calculate_timestamps:FALSE",
        "ip.defragment:FALSE",
    ):
        command += ["-o", option]
    # A user's own Wireshark profile must not change what we read.
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "LC_ALL": "C.UTF-8",
        "HOME": str(keylog_path.parent),
        "XDG_CONFIG_HOME": str(keylog_path.parent),
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=1 << 18,
        pipesize=1 << 20,
    )
    stdin: IO[bytes] | None = process.stdin
    assert stdin is not None
    stdin.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262_144, 101))
    return process


class PrivateKeyLog:
    """The merged secrets in a file that only this user may read, gone when closed."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="halton-meter-"))  # mode 0700
        self.path = self._folder / "keys.log"
        descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        self._file = os.fdopen(descriptor, "wb")

    def add(self, line: bytes) -> None:
        """Add a line in key log format; tshark reads what is appended while it runs."""
        self._file.write(line)

    def flush(self) -> None:
        """Put what was added where tshark sees it."""
        self._file.flush()

    def close(self) -> None:
        """Delete it, with the folder that was ours alone."""
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
