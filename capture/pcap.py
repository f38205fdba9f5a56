"""Packet captures as a source of plaintext: pcap and pcapng files in, `TlsChunk`s out.

    source = PcapSource([path], keys=[keylog])
    for item in source.items():
        meter.receive(item)
    source.findings

The way of a byte: `capfile.py` reads frames, `tcp.py` puts connections together,
`tcp_connections.py` says which are read, `records.py` cuts TLS records and hands whole ones to
`tshark.py`, which decrypts. A connection goes on from one file to the next where a recorder has
changed files. This file refuses to know what is in them.

What it cannot do: QUIC (counted); TLS 1.2 with CBC suites after a hole; a connection joined in
its middle under TLS 1.2 (its keys depend on the hellos). All of it is counted.
Memory is bounded by the limits named here and in these files, whatever the capture's size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capture.packets.capfile import CaptureFile, Frame, NotACapture, secrets_in
from capture.packets.findings import Findings
from capture.packets.input_files import UNPACK_RATIO_MAX
from capture.packets.keylog import KeyLog, read_key_log
from capture.packets.tcp import Datagram, Reassembly
from capture.packets.tcp_connections import TcpConnections
from capture.packets.tshark import Decryptors, PrivateKeyLog, TsharkMissing, find_tshark
from halton_meter.model import Source, TlsChunk, TlsClosed

if TYPE_CHECKING:
    from capture.packets.quic_connections import QuicConnections

# Chunks decrypted but not yet taken.
READY_MAX = 256
# A recorder that changes files goes on with the next packet: a file that begins so soon after the
# one before it carries that one's connections on.
NEXT_FILE_NS_MAX = 60 * 1_000_000_000


class PcapSource:
    """Read captures one after the other. Use `items` once, then look at `findings`.

    `keys` are key log files; secrets inside the captures are used too. `wanted` says by server
    name which connections are worth decrypting (None: all). `progress` is called now and then
    with (bytes read, bytes in all). `ratio_max` is how many times its size a gzip may unpack to.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        keys: Sequence[Path] = (),
        wanted: Callable[[str], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
        ratio_max: int = UNPACK_RATIO_MAX,
    ) -> None:
        self.findings = Findings()
        self._paths = list(paths)
        self._progress = progress
        self._ratio_max = ratio_max
        self._keys = KeyLog()
        self._private: PrivateKeyLog | None = None  # exists only while `items` runs
        self._ready: queue.Queue[TlsChunk | TlsClosed | BaseException | None] = queue.Queue(
            READY_MAX
        )
        self._decryptors = Decryptors(self._keys, self._private_path, self._ready.put)
        self._connections = TcpConnections(self.findings, self._keys, self._decryptors, wanted)
        self._reassembly: Reassembly | None = None
        self._wanted = wanted
        self._quic: QuicConnections | None = None
        self._stopping = False
        self._first_handshake = 0  # of the capture that is being read, in the key log
        for path in keys:
            if (trouble := read_key_log(path, self._keys)) is not None:
                self.findings.errors.append(f"{path}: {trouble}")

    def items(self) -> Iterator[TlsChunk | TlsClosed]:
        """Plaintext and ends of connections, in order within each connection.

        Raises `capture.packets.tshark.TsharkMissing`. Stopping early ends tshark as well.
        """
        find_tshark()
        private = PrivateKeyLog()
        try:
            for line in self._keys.lines():
                private.add(line)
            private.flush()
            self._private = private
            yield from self._fed()
        finally:
            private.close()

    def _fed(self) -> Iterator[TlsChunk | TlsClosed]:
        feeder = threading.Thread(target=self._feed, name="captures", daemon=True)
        feeder.start()
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._stopping = True
            while feeder.is_alive():
                try:
                    self._ready.get(timeout=0.02)
                except queue.Empty:
                    continue
            self._decryptors.kill()

    # --- the feeding thread ---------------------------------------------------------------------

    def _feed(self) -> None:
        try:
            sizes = [_size_bytes(path) for path in self._paths]
            done = 0
            for path, size in zip(self._paths, sizes, strict=True):
                self._feed_file(path, done, sum(sizes))
                if self._stopping:
                    return
                done += size
            self._finish_connections()
            self._join_decryptors()
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _join_decryptors(self) -> None:
        for decryptor in self._decryptors.join():
            self.findings.losses.update(decryptor.losses)
            self.findings.decrypted += decryptor.decrypted
        self.findings.losses = +self.findings.losses  # without zeros
        self.findings.handshakes_with_keys = len(self._keys)

    def _feed_file(self, path: Path, done: int, total: int) -> None:
        try:
            file = CaptureFile(path, self._ratio_max)
            self._first_handshake = len(self._keys)
            for text in secrets_in(path, self.findings.losses, self._ratio_max):
                self._add_secrets(text)
        except NotACapture as error:
            self.findings.errors.append(str(error))
            return
        except OSError as error:
            self.findings.errors.append(f"{path}: {error.strerror or error}")
            return
        self.findings.files += 1
        try:
            self._feed_frames(file, done, total)
        except TsharkMissing:
            raise
        except Exception as error:  # a bug of ours costs this file, not the others
            self._reassembly = None
            fault = f"a fault of Halton Meter ended its reading: {type(error).__name__}"
            self.findings.errors.append(f"{path}: {fault}")
        finally:
            file.close()
            self._note_losses(file)

    def _feed_frames(self, file: CaptureFile, done: int, total: int) -> None:
        for count, frame in enumerate(file.frames()):
            if not count:
                self._begin_file(frame)
            assert self._reassembly is not None
            self._reassembly.feed(*frame)
            if not count & 0xFFF:
                if self._stopping:
                    return
                if self._progress is not None:
                    self._progress(done + file.position, total)

    def _note_losses(self, file: CaptureFile) -> None:
        self.findings.losses.update(file.losses)
        if file.stopped is not None:
            unread = file.losses["capture_bytes_not_read"]
            self.findings.errors.append(
                f"{file.path}: the last {unread:,} of its {file.size:,} bytes were not read: "
                f"{file.stopped}"
            )

    def _begin_file(self, first: Frame) -> None:
        """Go on with the connections of the file before, if this one is its continuation."""
        before = self._reassembly
        if before is not None and 0 <= first.at_ns - before.at_ns <= NEXT_FILE_NS_MAX:
            return
        self._finish_connections()
        self._connections.capture_begins(self._first_handshake)
        self._reassembly = Reassembly(self._connections, self._take_quic)

    def _take_quic(self, datagram: Datagram) -> None:
        if self._quic is None:  # most captures have none, and its libraries take a while to load
            from capture.packets.quic_connections import QuicConnections

            self._quic = QuicConnections(
                self._keys,
                self._wanted or (lambda host: True),
                lambda client: None,
                self._ready.put,
                lambda process, host: None,
                source=Source.PCAP,
            )
        self._quic.datagram(datagram)

    def _finish_connections(self) -> None:
        reassembly, self._reassembly = self._reassembly, None
        quic, self._quic = self._quic, None
        if reassembly is None:
            return
        reassembly.finish()
        read = 0
        if quic is not None:
            quic.finish()
            read = quic.read
            self.findings.decrypted += read
            self.findings.losses.update(quic.losses)
        self.findings.quic += max(0, reassembly.quic_connections - read)
        self.findings.losses.update(reassembly.losses)
        self.findings.unread_links.update(reassembly.unread)
        self.findings.last_ns = max(self.findings.last_ns, reassembly.at_ns)

    def _private_path(self) -> Path:
        assert self._private is not None  # made before the feeder starts
        return self._private.path

    def _add_secrets(self, text: memoryview) -> None:
        assert self._private is not None  # made before the feeder starts
        self._keys.add(text, self._private.add)
        self._private.flush()


def _size_bytes(path: Path) -> int:
    """A file's size for the progress display; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
