"""HTTP/3 from its datagrams: exact in any order, whenever keys come; nothing is invented."""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.packets import http3, quic_connections
from capture.packets.http3 import Held, Http3
from capture.packets.keylog import KeyLog
from capture.packets.quic_connections import QuicConnections
from capture.packets.quic_packets import frames
from capture.packets.tcp import Datagram
from capture.pcap import PcapSource
from halton_meter.model import Direction, Exchange, Outcome, Process, Source, TlsChunk, TlsClosed
from halton_meter.wire.conversation import Conversation, Interest
from tests.support.quick import first
from tests.support.recorder.packets import Packet, pcapng
from tests.support.recorder.quic import CLIENT, SERVER, SUITES, Recording, Sent, Talk, record

HOST = "api.anthropic.com"
PROCESS = Process(4711, 1, "/usr/bin/client")
TALKS = tuple(
    Talk(
        f"/v1/messages?n={number}",
        b'{"asked": "%s"}' % (b"%d" % number * 2_000),
        tuple(b"data: %d-%05d %s\n\n" % (number, line, b"x" * 300) for line in range(60)),
    )
    for number in range(3)
)


@cache
def recording(suite: str = "aes128", second: bool = False, key_updates: bool = False) -> Recording:
    return record(HOST, TALKS, suite, second=second, key_updates=key_updates)


class Bench:
    """The connections of a capture, at hand."""

    def __init__(self) -> None:
        self.keys = KeyLog()
        self.items: list[TlsChunk | TlsClosed] = []
        self.missed: list[tuple[Process | None, str]] = []
        self.passed = 0
        self.quic = QuicConnections(
            self.keys,
            lambda host: host == HOST,
            lambda client: PROCESS,
            self.items.append,
            lambda *what: self.missed.append(what),
            self.pass_by,
        )

    def pass_by(self, server: str, port: int, length: int) -> None:
        self.passed += length

    def play(self, datagrams: Sequence[Sent]) -> None:
        for each in datagrams:
            self.quic.datagram(Datagram(addresses(each), each.data, each.from_client, each.at_ns))

    def learn(self, secrets: str) -> None:
        self.keys.add(secrets.encode())
        self.quic.keys_came()

    def exchanges(self) -> list[Exchange]:
        """What a reader makes of it."""
        self.quic.finish()
        conversations: dict[str, Conversation] = {}
        made: list[Exchange] = []
        for item in self.items:
            conversation = conversations.setdefault(
                item.connection.id, Conversation(item.connection, lambda _: Interest(True))
            )
            made += (
                conversation.receive(item)
                if isinstance(item, TlsChunk)
                else conversation.close(item)
            )
        return made


def addresses(sent: Sent) -> bytes:
    near, far = (CLIENT, SERVER) if sent.from_client else (SERVER, CLIENT)
    packed = socket.inet_aton(near[0]) + socket.inet_aton(far[0])
    return packed + near[1].to_bytes(2) + far[1].to_bytes(2)


def exact(bench: Bench, times: int = 1) -> None:
    found = bench.exchanges()
    assert [
        (each.request.path, each.request.body.joined(), each.response.body.joined())
        for each in sorted(found, key=lambda each: (each.connection.id, each.request.query))
    ] == [("/v1/messages", talk.asked, b"".join(talk.answered)) for talk in TALKS] * times
    for each in found:
        assert (each.outcome, each.response.status) == (Outcome.COMPLETE, 200)
        assert (each.request.method, each.request.host) == ("POST", HOST)
        assert ("user-agent", "a-client-of-tests") in each.request.headers
        assert (each.connection.peer, each.connection.peer_port) == (HOST, 443)
        assert each.connection.process == PROCESS
    assert bench.missed == []
    assert +bench.quic.losses == {}
    assert bench.quic._held.bytes == 0
    assert not bench.quic.waits


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids="keys at {:.0%}".format)
def test_all_that_was_said_is_read_whenever_the_keys_come(suite: str, share: float) -> None:
    given, bench = recording(suite), Bench()
    before = int(len(given.datagrams) * share)
    bench.play(given.datagrams[:before])
    assert bench.items == []
    bench.learn(given.secrets)
    bench.play(given.datagrams[before:])
    exact(bench)


def test_version_2_and_key_updates_are_followed() -> None:
    for recorded in (recording(second=True), recording(key_updates=True)):
        bench = Bench()
        bench.learn(recorded.secrets)
        bench.play(recorded.datagrams)
        exact(bench)


@pytest.mark.parametrize("when", ["keys first", "keys last"])
def test_nothing_is_given_behind_the_end(when: str) -> None:
    """Datagrams of the other side may be under way when a connection is closed."""
    given, bench = recording(), Bench()
    if when == "keys first":
        bench.learn(given.secrets)
    of_server = [each for each in given.datagrams if not each.from_client]
    bench.play([*given.datagrams, *of_server[-3:]])
    bench.learn(given.secrets)
    exact(bench)
    assert [type(item) for item in bench.items].index(TlsClosed) == len(bench.items) - 1


def test_what_is_said_is_given_at_once() -> None:
    given, bench = recording(), Bench()
    bench.learn(given.secrets)
    last = max(n for n, each in enumerate(given.datagrams) if not each.from_client)
    bench.play(given.datagrams[: last + 1])
    assert b"2-00059" in b"".join(item.data for item in bench.items if isinstance(item, TlsChunk))


@pytest.mark.parametrize("seed", first(range(20), 5))
def test_datagrams_that_come_in_another_order_or_twice_change_nothing(seed: int) -> None:
    given, bench, dice = recording(key_updates=True), Bench(), random.Random(seed)
    bench.learn(given.secrets)
    # The client cannot answer before it is asked, and it is the client's machine that captures.
    handshake, middle = given.datagrams[:8], given.datagrams[8:-4]
    twice = dice.sample(list(enumerate(middle)), 20)
    places = [(n + dice.uniform(0, 6), each) for n, each in (*enumerate(middle), *twice)]
    bench.play(handshake)
    bench.play([each for _, each in sorted(places, key=lambda each: each[0])])
    bench.play(given.datagrams[-4:])
    exact(bench)


@pytest.mark.parametrize("seed", first(range(30), 6))
def test_what_is_lost_is_lost_and_nothing_is_invented(seed: int) -> None:
    """Packets that the kernel dropped for us: both ends had them, so nobody sends them again."""
    given, bench, dice = recording(), Bench(), random.Random(seed)
    bench.learn(given.secrets)
    of_server = [n for n, each in enumerate(given.datagrams) if not each.from_client]
    lost = set(dice.sample(of_server[6:], 2))
    bench.play([each for n, each in enumerate(given.datagrams) if n not in lost])
    whole = {talk.asked: b"".join(talk.answered) for talk in TALKS}
    gapped = 0
    for each in bench.exchanges():
        answer = whole[each.request.body.joined()]
        at = 0
        for piece in each.response.body.pieces:
            at = answer.index(piece, at) + len(piece)
        gapped += each.outcome is Outcome.GAPPED
        assert (each.response.body.joined() == answer) or each.outcome is not Outcome.COMPLETE
    assert gapped >= bool(bench.quic.losses["quic_stream_bytes_missing"])
    assert bench.quic._held.bytes == 0


def test_a_connection_without_keys_is_told_once() -> None:
    given, bench = recording(), Bench()
    bench.play(given.datagrams)
    bench.quic.expire(given.datagrams[0].at_ns + quic_connections.KEYS_NS_MAX)
    bench.play(given.datagrams[-4:])
    assert bench.exchanges() == []
    assert bench.missed == [(PROCESS, HOST)]
    assert not bench.quic.waits


def test_what_waits_for_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic_connections, "WAITING_BYTES_MAX", 20_000)
    bench = Bench()
    bench.play(recording().datagrams)
    assert bench.missed == [(PROCESS, HOST)]
    assert not bench.quic.waits


def test_ports_that_are_used_again_are_another_connection() -> None:
    given = [recording(), recording("chacha"), recording("aes256")]
    bench = Bench()
    for number, each in enumerate(given):
        bench.learn(each.secrets)
        later_ns = number * 10**12
        bench.play([replace(sent, at_ns=sent.at_ns + later_ns) for sent in each.datagrams])
    exact(bench, times=3)


def test_a_host_that_is_not_wanted_is_passed_by() -> None:
    other, bench = record("example.com", TALKS[:1]), Bench()
    bench.learn(other.secrets)
    bench.play(other.datagrams)
    assert (bench.exchanges(), bench.missed) == ([], [])
    assert bench.passed > len(b"".join(TALKS[0].answered))


@pytest.mark.parametrize("seed", first(range(40), 8))
def test_spoilt_datagrams_never_raise_and_say_nothing_that_nobody_said(seed: int) -> None:
    given, bench, dice = recording(), Bench(), random.Random(seed)
    bench.learn(given.secrets)
    for each in given.datagrams:
        data = bytearray(each.data)
        if dice.random() < 0.2:
            for _ in range(dice.randint(1, 8)):
                data[dice.randrange(len(data))] = dice.randrange(256)
            del data[dice.randrange(len(data)) :]
        bench.play([Sent(each.from_client, bytes(data), each.at_ns)])
    said = b"".join(b"".join(talk.answered) for talk in TALKS)
    for exchange in bench.exchanges():
        assert all(piece in said for piece in exchange.response.body.pieces)


def frame_of(sent: Sent) -> Packet:
    """A datagram as Ethernet carries it."""
    near, far = (CLIENT, SERVER) if sent.from_client else (SERVER, CLIENT)
    ports = near[1].to_bytes(2) + far[1].to_bytes(2)
    udp = ports + (len(sent.data) + 8).to_bytes(2) + bytes(2) + sent.data
    ip = b"\x45\0" + (len(udp) + 20).to_bytes(2) + bytes(4) + b"\x40\x11\0\0"
    ip += socket.inet_aton(near[0]) + socket.inet_aton(far[0])
    return Packet(sent.at_ns, bytes(12) + b"\x08\0" + ip + udp, sent.from_client, len(sent.data))


def test_a_recorded_capture_is_read_the_same(tmp_path: Path) -> None:
    """Beside one whose keys are not there, which is counted."""
    given, other, bench = recording(), recording("aes256"), Bench()
    elsewhere = [replace(frame_of(each), at_ns=each.at_ns + 10**12) for each in other.datagrams]
    path = tmp_path / "capture.pcapng"
    path.write_bytes(pcapng([*map(frame_of, given.datagrams), *elsewhere], given.secrets))
    source = PcapSource([path])
    bench.items += source.items()
    assert {item.connection.source for item in bench.items} == {Source.PCAP}
    assert [
        (each.request.body.joined(), each.response.body.joined()) for each in bench.exchanges()
    ] == [(talk.asked, b"".join(talk.answered)) for talk in TALKS]
    assert source.findings.decrypted == 1
    assert source.findings.losses == {}


@given(st.binary(max_size=300))
def test_frames_of_any_bytes_end(payload: bytes) -> None:
    list(frames(payload))


PIECES = st.tuples(
    st.sampled_from(Direction),
    st.sampled_from([0, 2, 3, 4, 6, 7, 8]),
    st.one_of(st.integers(0, 40), st.integers(0, 2**62)),
    st.binary(max_size=40),
    st.booleans(),
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=40))
def test_streams_of_any_bytes_end_and_hold_nothing_then(
    pieces: list[tuple[Direction, int, int, bytes, bool]],
) -> None:
    held = Held()
    reader = Http3(lambda *what: None, Counter(), held)
    for direction, stream, offset, data, ends in pieces:
        reader.piece(direction, stream, offset, data, ends, 1)
    reader.finish(2)
    assert held.bytes == 0


def test_a_gap_of_any_size_costs_no_more_than_its_limit() -> None:
    lost: list[int] = []
    reader = Http3(lambda _, data, count, at: lost.append(count), Counter(), Held())
    head = b"\x01\x03\x00\x00\xd9"  # HEADERS: :status 200, by the static table
    data = b"\x00" + (2**61).to_bytes(8).replace(b"\x20", b"\xe0", 1)  # DATA, as long as can be
    reader.piece(Direction.RECEIVED, 0, 0, head + data, False, 1)
    reader.piece(Direction.RECEIVED, 0, 2**60, b"behind", False, 1)
    reader.finish(2)
    assert sum(lost) <= http3.LOST_BYTES_MAX
    assert len(lost) < 10_000
