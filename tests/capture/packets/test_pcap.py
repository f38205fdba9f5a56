"""Captures to plaintext: every byte that is there, every hole measured, whatever happened to it."""

from __future__ import annotations

import gzip
import os
import random
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from capture.packets import tls, tshark
from capture.packets.findings import Findings
from capture.pcap import NEXT_FILE_NS_MAX, PcapSource
from halton_meter.model import Direction, TlsChunk, TlsClosed
from tests.support.quick import first
from tests.support.recorder import damage
from tests.support.recorder.damage import Damage
from tests.support.recorder.packets import Packet, TcpFlow, ethernet, pcap, pcapng, write
from tests.support.recorder.relay import BEGINNING_NS, Recording, Step, record

HOST = "api.example.com"
REQUEST = b"POST / HTTP/1.1\r\nhost: api.example.com\r\n\r\n"
BODY = b"".join(b"%07d\n" % number for number in range(9_000))
ANSWERS = [BODY[at : at + 3_000] for at in range(0, len(BODY), 3_000)]
STEPS = [
    Step(True, REQUEST),
    *(Step(False, answer) for answer in ANSWERS[:20]),
    Step(True, REQUEST),
    *(Step(False, answer) for answer in ANSWERS[20:]),
]
SUITES: dict[str, dict[str, Any]] = {
    "tls13": {},
    "tls12_aes128": {"version": "1.2", "suites": "ECDHE-ECDSA-AES128-GCM-SHA256"},
    "tls12_aes256": {"version": "1.2", "suites": "ECDHE-ECDSA-AES256-GCM-SHA384"},
    "tls12_chacha": {"version": "1.2", "suites": "ECDHE-ECDSA-CHACHA20-POLY1305"},
    "tls12_cbc": {"version": "1.2", "suites": "ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0"},
}


@cache
def recording(suite: str = "tls13") -> Recording:
    return record(HOST, STEPS, **SUITES[suite])


def read(*paths: Path, keys: Sequence[Path] = ()) -> tuple[list[TlsChunk | TlsClosed], Findings]:
    source = PcapSource(paths, keys)
    return list(source.items()), source.findings


def read_bytes(data: bytes, folder: Path) -> tuple[list[TlsChunk | TlsClosed], Findings]:
    return read(write(folder / "capture.pcapng", data))


def said(items: Sequence[TlsChunk | TlsClosed], direction: Direction) -> list[tuple[int, bytes]]:
    """(offset, bytes) of one direction."""
    return [
        (item.offset, item.data)
        for item in items
        if isinstance(item, TlsChunk) and item.direction is direction
    ]


def whole(items: Sequence[TlsChunk | TlsClosed], direction: Direction) -> bytes:
    """The bytes of one direction, which must be contiguous."""
    out = b""
    for offset, data in said(items, direction):
        assert offset == len(out), "a hole"
        out += data
    return out


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_gives_what_was_said(suite: str, tmp_path: Path) -> None:
    given = recording(suite)
    items, findings = read_bytes(pcapng(given.packets, given.secrets), tmp_path)
    assert whole(items, Direction.SENT) == REQUEST * 2
    assert whole(items, Direction.RECEIVED) == BODY
    assert items[-1] == TlsClosed(items[0].connection, items[-1].at_ns, clean=True)
    assert (items[0].connection.peer, items[0].connection.peer_port) == (HOST, 443)
    assert not items[0].connection.joined
    assert findings.losses == {}


@pytest.mark.parametrize(
    "harm",
    [
        damage.duplicate(2),
        damage.reorder(4),
        damage.reorder(30),
        damage.both(damage.reorder(6), damage.duplicate(3)),
    ],
    ids=["repeated", "moved a little", "moved far", "moved and repeated"],
)
@pytest.mark.parametrize("suite", first(["tls13", "tls12_aes128"]))
def test_moved_and_repeated_packets_cost_nothing(suite: str, harm: Damage, tmp_path: Path) -> None:
    given = recording(suite)
    items, findings = read_bytes(pcapng(harm(given.packets), given.secrets), tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert findings.losses == {}


@pytest.mark.parametrize("seed", first(range(12), 2))
@pytest.mark.parametrize("suite", ["tls13", "tls12_aes128"])
def test_packets_moved_at_the_very_beginning_cost_nothing(
    suite: str, seed: int, tmp_path: Path
) -> None:
    given = recording(suite)
    chance = random.Random(seed)
    places = [(number + chance.random() * 4, number) for number in range(len(given.packets))]
    moved = [given.packets[number] for _, number in sorted(places)]
    items, findings = read_bytes(pcapng(moved, given.secrets), tmp_path)
    assert whole(items, Direction.SENT) == REQUEST * 2
    assert whole(items, Direction.RECEIVED) == BODY
    assert (findings.connections, findings.joined, findings.losses) == (1, 0, {})


@pytest.mark.parametrize("suite", ["tls13", "tls12_aes128", "tls12_chacha"])
def test_a_first_request_that_was_lost_is_a_hole_of_its_length(suite: str, tmp_path: Path) -> None:
    given = recording(suite)
    overhead = {"tls13": 22, "tls12_aes128": 29, "tls12_chacha": 21}[suite]
    sizes = [each.payload if each.sent else 0 for each in given.packets]
    lost = sizes.index(len(REQUEST) + overhead)
    left = [*given.packets[:lost], *given.packets[lost + 1 :]]
    items, _ = read_bytes(pcapng(left, given.secrets), tmp_path)
    assert said(items, Direction.SENT) == [(len(REQUEST), REQUEST)]
    assert whole(items, Direction.RECEIVED) == BODY


@pytest.mark.parametrize("suite", first(["tls13", "tls12_aes128"]))
def test_connections_outlive_the_tshark_they_began_with(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tshark, "TSHARK_BYTES_MAX", 0)  # a new one for every connection
    monkeypatch.setattr(tshark, "TSHARKS_MAX", 2)
    talks = [record(HOST, STEPS, number=number, **SUITES[suite]) for number in range(5)]
    late = [number * 8 for number in range(5)]  # packets that each begins after the one before
    placed = [
        (place + late[number], packet)
        for number, talk in enumerate(talks)
        for place, packet in enumerate(talk.packets)
    ]
    packets = [packet for _, packet in sorted(placed, key=lambda each: each[0])]
    secrets = "".join(talk.secrets for talk in talks)
    spent: list[tshark.Decryptor] = []
    spend = tshark.Decryptor.spend
    monkeypatch.setattr(tshark.Decryptor, "spend", lambda self: (spent.append(self), spend(self)))
    items, findings = read_bytes(pcapng(packets, secrets), tmp_path)
    assert len(spent) == 3
    for name in {item.connection.id for item in items}:
        mine = [item for item in items if item.connection.id == name]
        assert whole(mine, Direction.RECEIVED) == BODY
        assert whole(mine, Direction.SENT) == REQUEST * 2
    assert (findings.decrypted, findings.losses) == (5, {})


@pytest.mark.parametrize("begin", [1, 2, 3])
def test_a_capture_that_begins_between_the_syn_and_the_hello_misses_nothing(
    begin: int, tmp_path: Path
) -> None:
    given = recording()
    items, findings = read_bytes(pcapng(given.packets[begin:], given.secrets), tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert not items[0].connection.joined
    assert findings.joined == 0


@pytest.mark.parametrize("later_ns", [0, 40_000, 900_000_000])
def test_a_connection_recorded_on_two_interfaces_is_read_once(
    later_ns: int, tmp_path: Path
) -> None:
    given = recording()
    outside = TcpFlow(("198.51.100.7", 61_000), ("192.0.2.10", 443), client_seq=77)
    for packet in given.packets:  # as NAT passes it on
        if packet.payload:
            outside.data(packet.at_ns + later_ns, packet.sent, packet.frame[-packet.payload :])
    both = sorted([*given.packets, *outside.packets], key=lambda packet: packet.at_ns)
    items, findings = read_bytes(pcapng(both, given.secrets), tmp_path)
    assert whole(items, Direction.SENT) == REQUEST * 2
    assert whole(items, Direction.RECEIVED) == BODY
    assert (findings.connections, findings.seen_again, findings.losses) == (2, 1, {})


def test_segments_of_one_byte(tmp_path: Path) -> None:
    given = record(HOST, [Step(True, REQUEST), Step(False, ANSWERS[0])], mss=1)
    items, findings = read_bytes(pcapng(given.packets, given.secrets), tmp_path)
    assert whole(items, Direction.SENT) == REQUEST
    assert whole(items, Direction.RECEIVED) == ANSWERS[0]
    assert (findings.joined, findings.losses) == (0, {})


@pytest.mark.parametrize("lost", [[20], [20, 21, 45], range(10, 40)], ids=["one", "some", "many"])
@pytest.mark.parametrize(
    "suite", first(["tls13", "tls12_aes128", "tls12_aes256", "tls12_chacha"], 2)
)
def test_lost_packets_leave_holes_of_exact_length(
    suite: str, lost: Sequence[int], tmp_path: Path
) -> None:
    given = recording(suite)
    harmed = damage.drop(lost)(given.packets)
    items, findings = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    pieces = said(items, Direction.RECEIVED)
    assert all(BODY[offset : offset + len(data)] == data for offset, data in pieces)
    assert pieces[-1][0] + len(pieces[-1][1]) == len(BODY)
    missing = len(BODY) - sum(len(data) for _, data in pieces)
    # A record is lost whole: at most one more at each end of what is missing.
    assert 3_000 <= missing <= len(list(lost)) * 1_448 + 3_000 * 2 * 3
    assert whole(items, Direction.SENT) == REQUEST * 2
    assert findings.losses["tcp_bytes_missing"] > 0


def test_a_hole_at_the_very_end_is_told(tmp_path: Path) -> None:
    given = recording()
    harmed = damage.drop([-2, -3])(given.packets)
    items, _ = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    last = [item for item in items if isinstance(item, TlsChunk)][-1]
    assert last.direction is Direction.RECEIVED
    assert last.data == b""
    assert last.offset + last.length == pytest.approx(len(BODY), abs=60)


def test_a_lost_server_hello_is_made_up_for_under_tls_1_3(tmp_path: Path) -> None:
    given = recording()
    harmed = damage.drop([0])(given.packets)
    items, _ = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert whole(items, Direction.SENT) == REQUEST * 2


def test_a_connection_joined_in_its_middle_is_opened_by_trial(tmp_path: Path) -> None:
    given = recording()
    harmed = damage.start_after(30, sent=False)(given.packets)
    items, findings = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    received = b"".join(data for _, data in said(items, Direction.RECEIVED))
    assert len(received) > 20_000
    assert BODY.endswith(received)
    assert items[0].connection.joined
    assert findings.joined == 1


def test_a_joined_connection_is_opened_by_its_own_capture_s_secrets_first(tmp_path: Path) -> None:
    given = recording()
    harmed = damage.start_after(30, sent=False)(given.packets)
    others = tmp_path / "others.log"
    others.write_text(
        "".join(
            f"{label}_TRAFFIC_SECRET_0 {number:064x} {number:064x}\n"
            for number in range(200)
            for label in ("CLIENT", "SERVER")
        )
    )
    path = write(tmp_path / "capture.pcapng", pcapng(harmed, given.secrets))
    items, _ = read(path, keys=[others])
    received = b"".join(data for _, data in said(items, Direction.RECEIVED))
    assert len(received) > 20_000
    assert BODY.endswith(received)


def test_secrets_of_the_next_capture_come_while_a_joined_connection_s_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recording()
    harmed = damage.start_after(30, sent=False)(given.packets)
    path = write(tmp_path / "capture.pcapng", pcapng(harmed, given.secrets))
    source = PcapSource([path])
    made = tls.key13

    def meanwhile(secret: bytes, suite: int) -> tls.Key:
        """What the thread that reads files may do at any time."""
        number = len(source._keys)
        source._keys.add(f"SERVER_TRAFFIC_SECRET_0 {number:064x} {number:064x}\n".encode())
        return made(secret, suite)

    monkeypatch.setattr(tls, "key13", meanwhile)
    items = list(source.items())
    assert BODY.endswith(b"".join(data for _, data in said(items, Direction.RECEIVED)))
    assert source.findings.losses == {}
    assert said(items, Direction.SENT)


@pytest.mark.parametrize("suite", first(["tls13", "tls12_aes128"]))
@pytest.mark.parametrize("after_hole", [False, True])
def test_each_record_has_the_time_at_which_it_came(
    suite: str, after_hole: bool, tmp_path: Path
) -> None:
    given = recording(suite)
    packets = damage.drop([9])(given.packets) if after_hole else given.packets

    def quicker(at_ns: int) -> int:
        """A hundred times as fast: several answers come within a batch of records."""
        return BEGINNING_NS + (at_ns - BEGINNING_NS) // 100

    def times(packets: list[Packet]) -> list[tuple[int, bytes]]:
        items, _ = read_bytes(pcapng(packets, given.secrets), tmp_path)
        return [
            (item.at_ns, item.data)
            for item in items
            if isinstance(item, TlsChunk) and item.direction is Direction.RECEIVED and item.data
        ]

    slow = times(packets)
    assert len(slow) > 15
    squeezed = [replace(each, at_ns=quicker(each.at_ns)) for each in packets]
    assert times(squeezed) == [(quicker(at_ns), data) for at_ns, data in slow]


def test_a_connection_joined_under_tls_1_2_is_counted_not_guessed(tmp_path: Path) -> None:
    given = recording("tls12_aes128")
    harmed = damage.start_after(30, sent=False)(given.packets)
    items, findings = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    assert [item for item in items if isinstance(item, TlsChunk)] == []
    assert findings.losses["tls_records_undecryptable"] > 0


def test_a_capture_that_ends_early_closes_its_connections_uncleanly(tmp_path: Path) -> None:
    given = recording()
    harmed = damage.end_before(30)(given.packets)
    items, _ = read_bytes(pcapng(harmed, given.secrets), tmp_path)
    assert BODY.startswith(whole(items, Direction.RECEIVED))
    assert [item.clean for item in items if isinstance(item, TlsClosed)] == [False]


def test_frames_cut_by_a_snap_length_are_holes(tmp_path: Path) -> None:
    given = recording()
    middle = len(given.packets) // 2
    packets = [
        packet.cut(300) if middle <= n < middle + 3 else packet
        for n, packet in enumerate(given.packets)
    ]
    items, findings = read_bytes(pcapng(packets, given.secrets), tmp_path)
    pieces = said(items, Direction.RECEIVED)
    assert pieces[-1][0] + len(pieces[-1][1]) == len(BODY)
    assert findings.losses["frames_cut_by_snap_length"] > 0


# --- files -----------------------------------------------------------------------------------


def test_a_classic_pcap_with_a_key_log_beside_it(tmp_path: Path) -> None:
    given = recording()
    capture = write(tmp_path / "capture.pcap", pcap(given.packets))
    keys = write(tmp_path / "keys.log", b"# a comment\r\n" + given.secrets.encode())
    items, _ = read(capture, keys=[keys])
    assert whole(items, Direction.RECEIVED) == BODY


def test_a_gzipped_capture(tmp_path: Path) -> None:
    given = recording()
    packed = gzip.compress(pcapng(given.packets, given.secrets), 1)
    items, _ = read(write(tmp_path / "capture.pcapng.gz", packed))
    assert whole(items, Direction.RECEIVED) == BODY


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_gzip_that_breaks_off_gives_what_it_has(share: float, tmp_path: Path) -> None:
    given = recording()
    packed = gzip.compress(pcapng(given.packets, given.secrets), 1)
    cut = packed[: int(len(packed) * share)]
    items, findings = read(write(tmp_path / "capture.pcapng.gz", cut))
    heard = whole(items, Direction.RECEIVED)
    assert heard == BODY[: len(heard)]
    assert len(heard) > len(BODY) * share / 2
    assert findings.losses["capture_file_cut_short"] == 1
    _, findings = read(write(tmp_path / "capture.gz", packed[:15]))
    assert findings.errors == [f"{tmp_path / 'capture.gz'} holds nothing that gzip can unpack"]


def test_packets_without_a_time_take_the_files(tmp_path: Path) -> None:
    given = recording()
    timed = pcapng([], given.secrets)
    simple = b"".join(
        struct.pack("<III", 3, size, len(p.frame)) + frame + struct.pack("<I", size)
        for p in given.packets
        for frame in [p.frame + bytes(-len(p.frame) % 4)]
        for size in [len(frame) + 16]
    )
    capture = write(tmp_path / "simple.pcapng", timed + simple)
    os.utime(capture, ns=(BEGINNING_NS, BEGINNING_NS))
    items, findings = read(capture)
    assert whole(items, Direction.RECEIVED) == BODY
    assert {item.at_ns for item in items} == {BEGINNING_NS}
    assert findings.losses == {"packets_without_a_time": len(given.packets)}


def test_secrets_at_the_end_of_the_file_are_found(tmp_path: Path) -> None:
    given = recording()
    plain = pcapng(given.packets)
    secrets = pcapng([], given.secrets)[len(pcapng([])) :]
    items, _ = read_bytes(plain + secrets, tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY


def test_several_files_one_of_them_no_capture(tmp_path: Path) -> None:
    given = recording()
    good = write(tmp_path / "good.pcapng", pcapng(given.packets, given.secrets))
    text = write(tmp_path / "notes.txt", b"not a capture at all")
    empty = write(tmp_path / "empty.pcap", b"")
    items, findings = read(text, good, empty)
    assert whole(items, Direction.RECEIVED) == BODY
    assert findings.errors == [
        f"{text} does not start like a pcap or pcapng file",
        f"{empty} is empty",
    ]
    assert findings.files == 1


def test_a_truncated_file_gives_what_it_has_and_is_counted(tmp_path: Path) -> None:
    given = recording()
    data = pcapng(given.packets, given.secrets)
    items, findings = read_bytes(data[: len(data) * 2 // 3], tmp_path)
    received = whole(items, Direction.RECEIVED)
    assert BODY.startswith(received)
    assert len(received) > len(BODY) // 2
    assert findings.losses["capture_file_cut_short"] == 1


def test_garbage_between_blocks_is_stepped_over(tmp_path: Path) -> None:
    given = recording()
    blocks = [pcapng([packet])[len(pcapng([])) :] for packet in given.packets]
    head = pcapng([], given.secrets)
    data = head + b"".join(blocks[:40]) + b"\xff\x00garbage" * 30 + b"".join(blocks[40:])
    items, findings = read_bytes(data, tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert findings.losses["capture_file_garbage"] == 1


def test_other_link_layers(tmp_path: Path) -> None:
    given = recording()
    wrappers = {
        101: lambda frame: frame[14:],
        113: lambda frame: bytes(14) + frame[12:],
        276: lambda frame: frame[12:14] + bytes(18) + frame[14:],
        0: lambda frame: bytes(4) + frame[14:],
        14: lambda frame: frame[14:],
        258: lambda frame: struct.pack("<III", 108, 1, 1) + bytes(96) + frame,
        149: lambda frame: struct.pack("<III", 40, 1, 12) + bytes(28) + frame[14:],
    }
    for linktype, wrap in wrappers.items():
        packets = [Packet(p.at_ns, wrap(p.frame), p.sent, p.payload) for p in given.packets]
        data = bytearray(pcap(packets))
        data[20:24] = struct.pack("<I", linktype)
        capture = write(tmp_path / "capture.pcap", bytes(data))
        keys = write(tmp_path / "keys.log", given.secrets.encode())
        assert whole(read(capture, keys=[keys])[0], Direction.RECEIVED) == BODY, linktype


def test_packets_within_pppoe(tmp_path: Path) -> None:
    given = recording()
    session = b"\x88\x64" + struct.pack("!BBHHH", 0x11, 0, 7, 42, 0x21)
    packets = [
        Packet(p.at_ns, p.frame[:12] + session + p.frame[14:], p.sent, p.payload)
        for p in given.packets
    ]
    items, findings = read_bytes(pcapng(packets, given.secrets), tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert findings.losses == {}


def test_a_link_layer_that_is_not_read_is_named(tmp_path: Path) -> None:
    data = bytearray(pcap(recording().packets))
    data[20:24] = struct.pack("<I", 105)  # 802.11
    items, findings = read(write(tmp_path / "capture.pcap", bytes(data)))
    assert items == []
    assert findings.unread_links == {105: len(recording().packets)}


@pytest.mark.parametrize("cut", [1, 40, 90, 200])
def test_a_connection_goes_on_in_the_next_file(cut: int, tmp_path: Path) -> None:
    given = recording()
    first = write(tmp_path / "ring_00001.pcapng", pcapng(given.packets[:cut], given.secrets))
    second = write(tmp_path / "ring_00002.pcapng", pcapng(given.packets[cut:]))
    items, findings = read(first, second)
    assert whole(items, Direction.SENT) == REQUEST * 2
    assert whole(items, Direction.RECEIVED) == BODY
    assert (findings.files, findings.connections, findings.losses) == (2, 1, {})


@pytest.mark.parametrize("later_ns", [NEXT_FILE_NS_MAX + 60_000_000_000, -3_600_000_000_000])
def test_a_file_of_another_time_is_another_capture(later_ns: int, tmp_path: Path) -> None:
    given = recording()
    moved = [Packet(p.at_ns + later_ns, p.frame, p.sent, p.payload) for p in given.packets]
    first = write(tmp_path / "one.pcapng", pcapng(given.packets[:90], given.secrets))
    second = write(tmp_path / "two.pcapng", pcapng(moved, given.secrets))
    items, findings = read(first, second)
    assert findings.connections == 2
    closed = [item for item in items if isinstance(item, TlsClosed)]
    assert [item.at_ns for item in closed] == [given.packets[89].at_ns, moved[-1].at_ns]


# Recorded with openssl s_client and s_server: Python's ssl can do none of these.
ASKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: api.openai.com\r\n"
    b'Content-Type: application/json\r\nContent-Length: 18\r\n\r\n{"model":"gpt-4o"}'
)


@pytest.mark.parametrize("name", ["aes_ccm", "keys_updated", "renegotiated"])
def test_what_seldom_happens_in_tls_costs_nothing(name: str) -> None:
    items, findings = read(Path(__file__).parent / "captures" / f"{name}.pcapng")
    assert whole(items, Direction.SENT) == ASKED * 3
    assert whole(items, Direction.RECEIVED).count(b'"usage"') == 3
    assert findings.losses == {}


def test_early_data_of_a_resumed_session_is_read() -> None:
    items, findings = read(Path(__file__).parent / "captures" / "early_data.pcapng")
    connections = [list(each) for _, each in groupby(items, lambda item: item.connection.id)]
    assert [whole(each, Direction.SENT) for each in connections] == [ASKED, ASKED * 2]
    assert findings.losses == {}


def test_segments_as_large_as_loopbacks(tmp_path: Path) -> None:
    """More whole records at once than one packet for tshark could hold."""
    large = b"".join(b"%09d\n" % number for number in range(40_000))
    given = record(HOST, [Step(True, REQUEST), Step(False, large)], mss=65_483)
    flow = TcpFlow(mss=65_483)
    flow.open(BEGINNING_NS)
    spoken = [packet for packet in given.packets if packet.payload]
    for sent, packets in groupby(spoken, lambda packet: packet.sent):
        run = b"".join(packet.frame[-packet.payload :] for packet in packets)
        flow.data(BEGINNING_NS, sent, run)
    capture = write(tmp_path / "capture.pcapng", pcapng(flow.packets, given.secrets))
    items, _ = read(capture)
    assert whole(items, Direction.RECEIVED) == large


@pytest.mark.parametrize("seed", first(range(12), 4))
def test_a_spoilt_capture_never_raises(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    given = recording()
    data = bytearray(pcapng(given.packets, given.secrets))
    for _ in range(chance.randint(1, 60)):
        at = chance.randrange(len(data))
        data[at : at + chance.randint(0, 8)] = chance.randbytes(chance.randint(0, 8))
    items, _ = read_bytes(bytes(data), tmp_path)
    # A lost record may have been a session ticket, so offsets may be off by one; bytes are not.
    at = 0
    for _, piece in said(items, Direction.RECEIVED):
        found = BODY.find(piece, at)
        assert found >= at
        at = found + len(piece)


# --- what cannot be read ---------------------------------------------------------------------


def test_without_keys_the_host_is_named(tmp_path: Path) -> None:
    items, findings = read_bytes(pcapng(recording().packets), tmp_path)
    assert items == []
    assert findings.without_keys == {HOST: 1}


def test_unwanted_hosts_are_not_decrypted(tmp_path: Path) -> None:
    given = recording()
    path = write(tmp_path / "capture.pcapng", pcapng(given.packets, given.secrets))
    source = PcapSource([path], wanted=lambda name: name == "else.example.com")
    assert list(source.items()) == []
    assert source.findings.not_wanted == 1


def test_quic_is_counted(tmp_path: Path) -> None:
    initial = b"\xc3\x00\x00\x00\x01" + bytes(1_200)
    datagram = struct.pack("!HHHH", 50_000, 443, 8 + len(initial), 0) + initial
    frame = ethernet("10.0.0.2", "192.0.2.7", datagram, protocol=17, checksum_at=6)
    packets = [Packet(BEGINNING_NS + n, frame, True, 0) for n in range(3)]
    _, findings = read_bytes(pcapng(packets), tmp_path)
    assert findings.quic == 1


def test_http_that_was_never_encrypted(tmp_path: Path) -> None:
    flow = TcpFlow(server=("192.0.2.9", 11_434))
    flow.open(BEGINNING_NS)
    flow.data(BEGINNING_NS + 1, True, REQUEST)
    flow.data(BEGINNING_NS + 2, False, BODY[:5_000])
    flow.close(BEGINNING_NS + 3)
    packets = damage.drop([1])(flow.packets)
    items, findings = read_bytes(pcapng(packets), tmp_path)
    assert whole(items, Direction.SENT) == REQUEST
    assert said(items, Direction.RECEIVED) == [
        (0, BODY[:1_448]),
        (2_896, BODY[2_896:4_344]),
        (4_344, BODY[4_344:5_000]),
    ]
    assert findings.plain == 1


def test_a_key_log_without_secrets_is_an_error(tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.log", b"nothing of use\n")
    assert PcapSource([], [keys]).findings.errors == [
        f"{keys}: holds no TLS secrets (NSS key log format)"
    ]


# --- tshark ----------------------------------------------------------------------------------


def test_a_missing_tshark_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recording()
    path = write(tmp_path / "capture.pcapng", pcapng(given.packets, given.secrets))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tshark.TsharkMissing, match="sudo apt install tshark"):
        list(PcapSource([path]).items())


def test_when_tshark_dies_its_work_is_done_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(keylog_path: Path) -> subprocess.Popen[bytes]:
        process = _start(keylog_path)
        process.kill()
        started.append(process)
        return process

    _start = tshark.start_tshark
    monkeypatch.setattr(tshark, "start_tshark", start)
    given = recording()
    items, _ = read_bytes(pcapng(given.packets, given.secrets), tmp_path)
    assert whole(items, Direction.RECEIVED) == BODY
    assert started[0].returncode is not None


def test_secrets_lie_in_a_private_file_that_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    given = recording()
    path = write(tmp_path / "capture.pcapng", pcapng(given.packets, given.secrets))
    source = PcapSource([path])
    items = source.items()
    next(items)
    (keylog,) = tmp_path.glob("halton-meter-*/keys.log")
    assert keylog.stat().st_mode & 0o777 == 0o600
    assert keylog.parent.stat().st_mode & 0o777 == 0o700
    list(items)
    assert list(tmp_path.glob("halton-meter-*")) == []


def test_stopping_early_leaves_no_tshark_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    _start = tshark.start_tshark

    def start(keylog_path: Path) -> subprocess.Popen[bytes]:
        started.append(_start(keylog_path))
        return started[-1]

    monkeypatch.setattr(tshark, "start_tshark", start)
    given = recording()
    path = write(tmp_path / "capture.pcapng", pcapng(given.packets, given.secrets))
    items = PcapSource([path]).items()
    next(items)
    items.close()  # type: ignore[attr-defined]  # it is a generator
    assert [process.returncode is not None for process in started] == [True]
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)


def test_secrets_are_on_disk_only_while_captures_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recording()
    capture = write(tmp_path / "a.pcap", pcap(given.packets))
    keys = write(tmp_path / "keys.log", given.secrets.encode())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    source = PcapSource([capture], [keys])
    assert list(scratch.iterdir()) == []
    items = source.items()
    next(items)
    (folder,) = scratch.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    items.close()
    assert list(scratch.iterdir()) == []


def test_without_tshark_no_secrets_are_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recording()
    capture = write(tmp_path / "a.pcap", pcap(given.packets))
    keys = write(tmp_path / "keys.log", given.secrets.encode())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tshark.TsharkMissing):
        list(PcapSource([capture], [keys]).items())
    assert list(scratch.iterdir()) == []
