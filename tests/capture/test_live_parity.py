"""Whatever TLS does, a live capture reads what the recording's reader makes of it with tshark.

Each recorded capture is played over a sniffer's link: TLS 1.2 and 1.3 in every suite, resumed by
ticket and by PSK, early data, updated keys, renegotiation, lost and repeated packets.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from capture import sniffer
from capture.live_capture import LiveCapture
from capture.packets.capfile import CaptureFile, secrets_in
from capture.packets.keeping import Keeping
from capture.packets.tcp import _network_layer
from capture.pcap import PcapSource
from halton_meter.model import Direction, TlsChunk, TlsClosed
from tests.support.quick import every

ROOT = Path(__file__).parents[2]
OF_TLS = Path(__file__).parent / "packets" / "captures"
# Only tshark follows a second handshake of TLS 1.2; a test below says what is counted.
RENEGOTIATED = OF_TLS / "renegotiated.pcapng"
CAPTURES = [
    *sorted((ROOT / "fixtures" / "pcaps").glob("*.pcapng")),
    *sorted(each for each in OF_TLS.glob("*.pcapng") if each != RENEGOTIATED),
]

Said = dict[tuple[int, Direction], tuple[bytes, tuple[tuple[int, int], ...]]]


def said(items: Iterable[TlsChunk | TlsClosed], *, joined: bool = False) -> Said:
    """By connection and direction: the bytes, and the holes in them (from, to).

    A live capture reads no connection that was there before it (`joined`).
    """
    numbers: dict[str, int] = {}
    pieces: defaultdict[tuple[int, Direction], list[TlsChunk]] = defaultdict(list)
    for item in items:
        if isinstance(item, TlsChunk) and (joined or not item.connection.joined):
            number = numbers.setdefault(item.connection.id, len(numbers))
            pieces[number, item.direction].append(item)
    found: Said = {}
    for key, chunks in pieces.items():
        whole, holes = bytearray(), []
        for chunk in chunks:
            if chunk.offset > len(whole):
                holes.append((len(whole), chunk.offset))
                whole += bytes(chunk.offset - len(whole))
            whole[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        found[key] = bytes(whole), tuple(holes)
    return found


def live(
    path: Path,
    keys: Path,
    wanted: Callable[[str], bool] = lambda host: True,
    keeping: Keeping | None = None,
) -> tuple[list[TlsChunk | TlsClosed], LiveCapture]:
    """What a live capture makes of a recorded one, and what it counted."""
    keys.write_bytes(b"".join(bytes(text) + b"\n" for text in secrets_in(path, _Ignored(), 100)))
    ours, its = socket.socketpair()
    source = LiveCapture(its, [keys], wanted, lambda *_: None, lambda *_: None, lambda: 0, keeping)
    items: list[TlsChunk | TlsClosed] = []
    file = CaptureFile(path)
    for frame in file.frames():
        at = _network_layer(frame.linktype, frame.data)
        if at < 0:
            continue
        packet = frame.data[at:]
        ours.sendall(sniffer.HEAD.pack(sniffer.PACKET, len(packet), frame.at_ns) + packet)
        items += source.read()
    file.close()
    ours.shutdown(socket.SHUT_WR)
    items += source.finish()
    ours.close()
    return items, source


class _Ignored(dict[str, int]):
    def __missing__(self, key: str) -> int:
        return 0


@pytest.mark.parametrize("path", every(6, zip(CAPTURES)), ids=lambda path: path.stem)
def test_a_live_capture_reads_what_replay_reads(path: Path, tmp_path: Path) -> None:
    items, _ = live(path, tmp_path / "keys.log")
    assert said(items) == said(PcapSource([path]).items())


def test_a_second_handshake_of_tls_1_2_is_counted_and_nothing_behind_it_is_read(
    tmp_path: Path,
) -> None:
    path = RENEGOTIATED
    items, source = live(path, tmp_path / "keys.log")
    read, replayed = said(items), said(PcapSource([path]).items())
    for key, (data, holes) in read.items():
        assert replayed[key][0].startswith(data)
        assert holes == ()
    assert source.losses["tls_records_undecryptable"] > 0


def test_early_data_that_a_server_refused_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end is then not told of; the client sends the request again."""
    monkeypatch.setattr("capture.packets.opening._END_OF_EARLY_DATA", b"\xff")
    path = OF_TLS / "early_data.pcapng"
    items, _ = live(path, tmp_path / "keys.log")
    read, replayed = said(items), said(PcapSource([path]).items())
    sent = 1, Direction.SENT
    assert replayed[sent][0] == read[sent][0] * 2, "the first request alone was early"
    assert read[sent][1] == ()
