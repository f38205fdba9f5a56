"""tshark as the decryptor: whole TLS records in, plaintext out, in order, from one process.

tshark is slow per packet and loses its place at the first missing byte, so it is not given the
capture. It reads a stream that `records.py` makes for it: connections already reassembled, several
records a packet, one made-up address a connection. Plaintext comes back through tshark's export
of PDUs, in binary, each with the number of the packet it was in: measured on Wireshark 4.0, that
is 5 times as fast as `-T fields`, which spends its time on hexadecimal. Where tshark answers
nothing although a packet holds application data, or was not asked because records are missing,
`opening.py` takes over.

The thread of a `Decryptor` owns its `Opening`; the feeding thread only queues.
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
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from capture.packets.keylog import KeyLog
from capture.packets.opening import Opening, Records, Work
from halton_meter.model import TlsChunk, TlsClosed

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


_Work = Work | None  # None: no more


class Decryptor:
    """One tshark and the thread that pairs its output with what was asked."""

    def __init__(
        self, keys: KeyLog, keylog_path: Path, give: Callable[[TlsChunk | TlsClosed], None]
    ) -> None:
        self._keylog_path = keylog_path
        self._work: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._frames = 0
        self._pdu: tuple[int, bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = False
        self._opening = Opening(keys, give)
        self.losses = self._opening.losses
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

    def put(self, work: Work) -> None:
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

    @property
    def decrypted(self) -> int:
        """Connections of which something was read."""
        return self._opening.decrypted

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
                frame = work.frame if isinstance(work, Records) and work.asked else None
                self._opening.do(work, b"" if frame is None else self._answer(frame))
            except Exception as error:  # a bug of ours costs these records, not the run
                self.losses[f"tls_records_unreadable_{type(error).__name__}"] += 1

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

    def leave(self, reader: object) -> None:
        """A connection has ended. The last one ends a decryptor that has had its share."""
        assert isinstance(reader, Decryptor)
        reader.open_connections -= 1
        if not reader.open_connections and reader is not self._live[-1]:
            self._live.remove(reader)
            reader.finish()

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
