"""TCP put back together, frame by frame, without files and without TLS."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.packets import tcp
from capture.packets.tcp import Flow, Half, Reassembly
from tests.support.recorder.packets import Packet, TcpFlow, ethernet

SENT = b"".join(b"%06d " % number for number in range(400))
RECEIVED = b"".join(b"%07d\n" % number for number in range(2_000))


class Told:
    """What a listener was told, by direction: bytes, and lengths of holes."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []
        self.bytes: dict[bool, list[bytes | int]] = {True: [], False: []}
        self.closed_cleanly: list[bool] = []

    def opened(self, flow: Flow) -> None:
        self.flows.append(flow)

    def received(self, half: Half, data: bytes, at_ns: int) -> None:
        self.bytes[half.sent].append(data)

    def lost(self, half: Half, length: int, at_ns: int) -> bool:
        self.bytes[half.sent].append(length)
        return True

    def closed(self, flow: Flow, at_ns: int, clean: bool) -> None:
        self.closed_cleanly.append(clean)

    def whole(self, sent: bool) -> bytes:
        return b"".join(piece for piece in self.bytes[sent] if isinstance(piece, bytes))

    def holes(self, sent: bool) -> list[int]:
        return [piece for piece in self.bytes[sent] if isinstance(piece, int)]


def conversation(mss: int = 500, server_seq: int = 900_000, close: bool = True) -> list[Packet]:
    flow = TcpFlow(mss=mss, server_seq=server_seq)
    flow.open(1)
    for turn in range(4):
        flow.data(10 * turn + 2, True, SENT[turn * 700 : turn * 700 + 700])
        flow.data(10 * turn + 3, False, RECEIVED[turn * 4_000 : turn * 4_000 + 4_000])
    if close:
        flow.close(100)
    return flow.packets


def feed(packets: list[Packet]) -> Told:
    told = Told()
    reassembly = Reassembly(told)
    for packet in packets:
        reassembly.feed(packet.at_ns, 1, packet.frame, len(packet.frame))
    reassembly.finish()
    return told


def test_a_whole_conversation() -> None:
    told = feed(conversation())
    assert told.whole(True) == SENT
    assert told.whole(False) == RECEIVED
    assert told.closed_cleanly == [True]
    assert (told.flows[0].client, told.flows[0].server[1]) == (("10.0.0.2", 40_000), 443)


def test_sequence_numbers_that_wrap_around() -> None:
    told = feed(conversation(server_seq=2**32 - 6_000))
    assert told.whole(False) == RECEIVED


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), mss=st.integers(40, 1_500), distance=st.integers(0, 25))
def test_any_order_and_any_repeats_give_the_same_bytes(seed: int, mss: int, distance: int) -> None:
    chance = random.Random(seed)
    packets = conversation(mss)
    places = [(i + chance.random() * distance, i) for i in range(3, len(packets))]
    places += [(i + chance.random() * 200, i) for _, i in chance.choices(places, k=10)]
    order = [packets[i] for _, i in sorted(places)]
    told = feed([*packets[:3], *order])
    assert told.holes(False) == []
    assert told.whole(True) == SENT
    assert told.whole(False) == RECEIVED


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_lost_packets_are_holes_of_their_length(data: st.DataObject) -> None:
    packets = conversation()
    carrying = [i for i, p in enumerate(packets) if p.payload and not p.sent]
    lost = data.draw(st.sets(st.sampled_from(carrying), max_size=12))
    told = feed([p for i, p in enumerate(packets) if i not in lost])
    rebuilt = b"".join(
        piece if isinstance(piece, bytes) else b"?" * piece for piece in told.bytes[False]
    )
    assert len(rebuilt) == len(RECEIVED)
    assert all(a in (b, ord("?")) for a, b in zip(rebuilt, RECEIVED, strict=True))
    assert sum(told.holes(False)) == sum(packets[i].payload for i in lost)


def test_overlapping_retransmissions() -> None:
    flow = TcpFlow(mss=10_000, server_seq=1_000)
    flow.open(1)
    seqs = [(0, 300), (100, 500), (600, 700), (400, 650), (650, 900), (850, 1_000)]
    for start, end in seqs:
        flow._seq[False] = 1_001 + start
        flow._segment(2, False, RECEIVED[start:end], 16)
    told = feed(flow.packets)
    assert told.whole(False) == RECEIVED[:1_000]
    assert told.holes(False) == []


def test_a_gap_is_given_up_once_the_receiver_has_acknowledged_it() -> None:
    packets = conversation(close=False)
    carrying = [i for i, p in enumerate(packets) if p.payload and not p.sent]
    told = Told()
    reassembly = Reassembly(told)
    more = TcpFlow(mss=500)
    for i, packet in enumerate(packets):
        if i != carrying[0]:
            reassembly.feed(packet.at_ns, 1, packet.frame, len(packet.frame))
    assert told.holes(False) == []
    more._seq = {True: 1_001 + len(SENT), False: 900_001 + len(RECEIVED)}
    more.data(200, False, b"x" * 500 * tcp.REORDER_FRAMES_ACKED_MAX)
    for packet in more.packets:
        reassembly.feed(packet.at_ns, 1, packet.frame, len(packet.frame))
    assert told.holes(False) == [500]


def test_what_waits_behind_a_gap_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "REORDER_BYTES_MAX", 5_000)
    flow = TcpFlow(mss=1_000)
    flow.open(1)
    flow._seq[False] += 1_000
    for number in range(20):
        flow._segment(number, False, b"y" * 1_000, 16)
        flow._seq[False] += 1_000
    told = Told()
    reassembly = Reassembly(told)
    for packet in flow.packets:
        reassembly.feed(packet.at_ns, 1, packet.frame, len(packet.frame))
        pending = told.flows[0].halves[1].pending if told.flows else None
        assert pending is None or pending.bytes <= 6_000
    assert told.holes(False) == [1_000]
    assert told.whole(False) == b"y" * 20_000


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "FLOWS_MAX", 10)
    told = Told()
    reassembly = Reassembly(told)
    for number in range(25):
        flow = TcpFlow(client=("10.0.0.2", 1_000 + number))
        flow.open(number)
        for packet in flow.packets:
            reassembly.feed(packet.at_ns, 1, packet.frame, len(packet.frame))
    assert told.closed_cleanly == [False] * 15
    assert reassembly.losses["connections_evicted"] == 15


def test_a_port_used_again_is_another_connection() -> None:
    again = TcpFlow(client_seq=77_000, server_seq=88_000)
    again.open(500)
    again.data(501, True, b"second")
    told = feed([*conversation(close=False), *again.packets])
    assert len({flow.id for flow in told.flows}) == 2
    assert told.whole(True) == SENT + b"second"
    assert told.closed_cleanly == [False, False]


def test_connections_between_the_same_ports_at_one_time_are_told_apart() -> None:
    """In a capture whose packets state no times all have one (found by the fuzzer)."""
    packets = []
    for number in range(4):
        flow = TcpFlow(client_seq=1_000_000 * (number + 1), server_seq=2_000_000 * (number + 1))
        flow.open(50 if number != 2 else 20)
        flow.data(50, True, b"said")
        packets += flow.packets
    told = feed(packets)
    assert len({flow.id for flow in told.flows}) == 4


def test_a_repeated_syn_is_no_new_connection() -> None:
    packets = conversation()
    told = feed([packets[0], packets[0], packets[1], packets[1], *packets[2:]])
    assert len(told.flows) == 1
    assert told.whole(False) == RECEIVED


def test_without_its_syn_the_side_with_the_lower_port_is_the_server() -> None:
    told = feed(conversation()[8:])
    assert told.flows[0].joined
    assert told.flows[0].server == ("192.0.2.10", 443)


def test_vlan_tags_and_ipv6() -> None:
    packets = [
        Packet(p.at_ns, p.frame[:12] + b"\x81\x00\x00\x07" + p.frame[12:], p.sent, p.payload)
        for p in conversation()
    ]
    assert feed(packets).whole(False) == RECEIVED
    flow = TcpFlow(("2001:db8::2", 40_000), ("2001:db8::3", 443))
    flow.open(1)
    flow.data(2, False, RECEIVED)
    assert feed(flow.packets).whole(False) == RECEIVED


def test_fragments_are_counted_and_nothing_else_is_made_of_them() -> None:
    frame = bytearray(ethernet("10.0.0.2", "192.0.2.1", bytes(40)))
    frame[20:22] = b"\x20\x00"
    reassembly = Reassembly(Told())
    reassembly.feed(1, 1, bytes(frame), len(frame))
    assert reassembly.losses == {"ip_fragments": 1}


@settings(max_examples=300, deadline=None)
@given(linktype=st.sampled_from([0, 1, 12, 101, 108, 113, 276, 999]), frame=st.binary(max_size=120))
def test_any_frame_is_taken(linktype: int, frame: bytes) -> None:
    told = Told()
    reassembly = Reassembly(told)
    reassembly.feed(1, linktype, frame, len(frame))
    reassembly.feed(2, linktype, frame[::-1], len(frame))
    reassembly.finish()


@settings(max_examples=200, deadline=None)
@given(
    segments=st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 2**32 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 63),
            st.binary(max_size=30),
        ),
        max_size=30,
    )
)
def test_any_segments_are_taken(segments: list[tuple[bool, int, int, int, bytes]]) -> None:
    told = Told()
    reassembly = Reassembly(told)
    for sent, seq, ack, flags, payload in segments:
        a, b = ("10.0.0.1", "10.0.0.2") if sent else ("10.0.0.2", "10.0.0.1")
        ports = (1_000, 443) if sent else (443, 1_000)
        head = struct.pack("!HHIIBBHHH", *ports, seq, ack, 0x50, flags, 1, 0, 0)
        frame = ethernet(a, b, head + payload)
        reassembly.feed(1, 1, frame, len(frame))
    reassembly.finish()
    assert len(told.closed_cleanly) == len(told.flows)
