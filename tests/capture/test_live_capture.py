"""A live capture gives what the recording's reader gives, whenever packets and keys come."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import sniffer
from capture.live_capture import LiveCapture
from capture.packets import awaiting
from capture.packets.keeping import CaptureWriter, Keeping
from capture.pcap import PcapSource
from halton_meter.model import Connection, Direction, Process, TlsChunk, TlsClosed
from tests.capture.packets.test_pcap import (
    BODY,
    HOST,
    REQUEST,
    STEPS,
    SUITES,
    recording,
    said,
    whole,
)
from tests.capture.packets.test_quic import CRYPTO
from tests.capture.packets.test_quic import packet as initial
from tests.capture.packets.test_quic_connections import TALKS, frame_of
from tests.support.recorder import damage
from tests.support.recorder.packets import Packet, TcpFlow
from tests.support.recorder.quic import record as record_quic
from tests.support.recorder.relay import BEGINNING_NS, GoingOn, Recording, record

ETHERNET_BYTES = 14
CLIENT = Process(4711, 1, "/usr/bin/client")


def message(packet: Packet) -> bytes:
    data = packet.frame[ETHERNET_BYTES:]
    return sniffer.HEAD.pack(sniffer.PACKET, len(data), packet.at_ns) + data


class Bench:
    """A live capture at a link of the test's own, with a key file and a clock of its own."""

    def __init__(self, keys: Path, keeping: Keeping | None = None) -> None:
        self.keys = keys
        self.link, its = socket.socketpair()
        self.now_ns = 0
        self.missed: list[tuple[Connection, str]] = []
        self.items: list[TlsChunk | TlsClosed] = []
        self.source = LiveCapture(
            its,
            [keys],
            lambda host: host == HOST,
            lambda client, server, wanted: CLIENT,
            lambda connection, host: self.missed.append((connection, host)),
            lambda: self.now_ns,
            keeping,
        )

    def send(self, data: bytes) -> None:
        """Bytes over the link, and what the capture makes of them."""
        for at in range(0, len(data), 32_768):
            self.link.sendall(data[at : at + 32_768])
            self.items += self.source.read()

    def play(self, packets: Sequence[Packet]) -> None:
        for packet in packets:
            self.now_ns = max(self.now_ns, packet.at_ns)
            self.send(message(packet))

    def finish(self) -> None:
        """The end; nobody at the other end has anything left."""
        self.link.shutdown(socket.SHUT_WR)
        self.items += self.source.finish()
        self.link.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "keys.log")
    yield made
    made.link.close()


def exact(bench: Bench) -> None:
    assert whole(bench.items, Direction.SENT) == REQUEST * 2
    assert whole(bench.items, Direction.RECEIVED) == BODY
    assert isinstance(bench.items[-1], TlsClosed)
    assert bench.items[0].connection.process == CLIENT
    assert bench.items[0].connection.peer == HOST
    assert bench.missed == []


@pytest.mark.parametrize("suite", ["tls13", "tls12_aes128", "tls12_aes256", "tls12_chacha"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0], ids="keys at {:.0%}".format)
def test_it_reads_all_that_was_said_whenever_the_keys_come(
    bench: Bench, suite: str, share: float
) -> None:
    given = recording(suite)
    before = int(len(given.packets) * share)
    bench.play(given.packets[:before])
    assert not [item for item in bench.items if isinstance(item, TlsChunk)]
    bench.keys.write_text(given.secrets)
    bench.play(given.packets[before:])
    bench.finish()
    exact(bench)
    assert +bench.source.losses == {}


def test_what_was_said_is_given_at_once(bench: Bench) -> None:
    given = recording()
    bench.keys.write_text(given.secrets)
    last = max(n for n, packet in enumerate(given.packets) if packet.payload)
    bench.play(given.packets[: last + 1])
    assert whole(bench.items, Direction.RECEIVED) == BODY


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_the_link_s_bytes_and_the_key_file_s_may_come_in_any_pieces(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    given = recording(rng.choice(["tls13", "tls12_aes128"]))
    bench = Bench(tmp_path_factory.mktemp("keys") / "keys.log")
    data = b"".join(map(message, given.packets))
    secrets = given.secrets.encode()
    while data or secrets:
        if data and (not secrets or rng.random() < 0.5):
            size = rng.choice([1, 7, 100, 5_000])
            bench.send(data[:size])
            data = data[size:]
        else:
            size = rng.choice([1, 30, 200])
            with bench.keys.open("ab") as file:
                file.write(secrets[:size])
            secrets = secrets[size:]
            bench.items += bench.source.read()
    bench.finish()
    exact(bench)


def test_byte_by_byte(bench: Bench) -> None:
    given = recording()
    bench.keys.write_text(given.secrets)
    for byte in b"".join(map(message, given.packets[:40])):
        bench.link.sendall(bytes((byte,)))
        bench.items += bench.source.read()
    bench.play(given.packets[40:])
    bench.finish()
    exact(bench)


@pytest.mark.parametrize("seed", range(6))
def test_a_hole_is_measured_and_what_follows_is_read(bench: Bench, seed: int) -> None:
    given = recording()
    rng = random.Random(seed)
    ordinal = rng.randrange(12, 40)
    bench.keys.write_text(given.secrets)
    bench.play(damage.drop({ordinal})(given.packets))
    bench.finish()
    at, end = 0, 0
    for item in bench.items:
        if isinstance(item, TlsChunk) and item.direction is Direction.RECEIVED:
            assert item.offset >= end
            assert BODY[item.offset : item.offset + len(item.data)] == item.data
            at += len(item.data)
            end = item.offset + item.length
    assert at < len(BODY) <= end + 32_768


def test_a_first_request_that_was_lost_is_a_hole_of_its_length(bench: Bench) -> None:
    given = recording()
    sizes = [each.payload if each.sent else 0 for each in given.packets]
    lost = sizes.index(len(REQUEST) + 22)
    bench.keys.write_text(given.secrets)
    bench.play([*given.packets[:lost], *given.packets[lost + 1 :]])
    bench.finish()
    assert said(bench.items, Direction.SENT) == [(len(REQUEST), REQUEST)]
    assert whole(bench.items, Direction.RECEIVED) == BODY


def test_dropped_packets_are_counted(bench: Bench) -> None:
    bench.send(sniffer.HEAD.pack(sniffer.DROPPED, 0, 12))
    bench.send(sniffer.HEAD.pack(sniffer.DROPPED, 0, 5))
    bench.finish()
    assert bench.source.losses["packets_dropped"] == 17


def test_a_connection_whose_keys_do_not_come_is_told_once(bench: Bench) -> None:
    given = recording()
    bench.play(given.packets[:-4])
    bench.now_ns += awaiting.KEYS_NS_MAX
    bench.items += bench.source.read()
    bench.play(given.packets[-4:])
    bench.finish()
    assert [host for _, host in bench.missed] == [HOST]
    assert not [item for item in bench.items if isinstance(item, TlsChunk)]


def test_plain_http_is_not_read_as_nothing_says_whose_it_is(bench: Bench) -> None:
    flow = TcpFlow(("10.0.0.2", 40_000))
    flow.open(BEGINNING_NS)
    flow.data(BEGINNING_NS + 1, True, REQUEST)
    flow.data(BEGINNING_NS + 2, False, b"HTTP/1.1 200 OK\r\n\r\n")
    bench.play(flow.packets)
    bench.finish()
    assert bench.items == []
    assert bench.missed == []


def test_a_connection_to_no_provider_is_not_read(tmp_path: Path) -> None:
    given = recording()
    bench = Bench(tmp_path / "keys.log")
    bench.keys.write_text(given.secrets)
    bench.source._connections._wanted = lambda host: False
    bench.play(given.packets)
    bench.finish()
    assert bench.items == []
    assert bench.missed == []


def test_what_waits_for_keys_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awaiting, "WAITING_BYTES_MAX", 20_000)
    bench.play(recording().packets)
    bench.finish()
    assert [host for _, host in bench.missed] == [HOST]
    assert not [item for item in bench.items if isinstance(item, TlsChunk)]


def test_the_bulk_of_a_server_that_is_no_provider_is_muted(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capture.live_capture.MUTED_AFTER_BYTES", 10_000)
    bench.source._connections._wanted = lambda host: False
    bench.play(recording().packets)
    server = socket.inet_aton(bench_server(recording().packets))
    told = bench.link.recv(100)
    assert told[:4] == server
    assert len(told) == sniffer.MUTED_BYTES


@pytest.mark.parametrize("wanted", [True, False])
def test_what_a_muted_connection_lacks_is_no_loss(bench: Bench, wanted: bool) -> None:
    given = recording()
    bench.keys.write_text(given.secrets)
    bench.source._connections._wanted = lambda host: wanted
    middle = range(len(given.packets) * 2 // 5, len(given.packets) * 3 // 5)
    bench.play([p for n, p in enumerate(given.packets) if p.sent or n not in middle])
    bench.finish()
    assert (bench.source.losses.get("tcp_bytes_missing", 0) > 0) == wanted


def bench_server(packets: Sequence[Packet]) -> str:
    sent = next(packet for packet in packets if packet.sent)
    return socket.inet_ntoa(sent.frame[ETHERNET_BYTES + 16 : ETHERNET_BYTES + 20])


def test_the_sniffer_s_end_is_noticed(bench: Bench) -> None:
    bench.link.shutdown(socket.SHUT_WR)
    bench.items += bench.source.read()
    assert bench.source.ended


class Falling:
    """A sniffer that is behind: it sends the rest when the reader says no more."""

    def __init__(self, link: socket.socket, rest: bytes) -> None:
        self._link, self._rest = link, rest
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        assert self._link.recv(1) == b""
        self._link.sendall(self._rest)
        self._link.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_a_sniffer_has_not_sent_yet_is_asked_for_at_the_end(
    bench: Bench, share: float
) -> None:
    given = recording()
    bench.keys.write_text(given.secrets)
    before = int(len(given.packets) * share)
    bench.play(given.packets[:before])
    behind = Falling(bench.link, b"".join(map(message, given.packets[before:])))
    bench.items += bench.source.finish()
    behind.join()
    exact(bench)
    assert +bench.source.losses == {}


def test_a_sniffer_that_does_not_answer_at_the_end_is_a_loss(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capture.live_capture.REST_S_MAX", 0.01)
    bench.items += bench.source.finish()
    assert bench.source.losses["packets_dropped"] == 1


# --- sessions that go on, TLS 1.2 --------------------------------------------------------------


@cache
def resumed(suite: str) -> tuple[Recording, ...]:
    """Three connections, the second and the third with the secret of the first."""
    going_on = GoingOn()
    return tuple(
        record(HOST, STEPS, **SUITES[suite], number=number, going_on=going_on)
        for number in range(3)
    )


@pytest.mark.parametrize("suite", ["tls12_aes128", "tls12_aes256", "tls12_chacha"])
@pytest.mark.parametrize("late", [0, 1, 2, 3], ids="keys after {}".format)
def test_connections_that_write_no_keys_are_read_by_an_earlier_one_s_whenever_these_come(
    bench: Bench, suite: str, late: int
) -> None:
    given = resumed(suite)
    for number, each in enumerate(given):
        if number == late:
            bench.keys.write_text(given[0].secrets)
        bench.play(each.packets)
    bench.keys.write_text(given[0].secrets)
    bench.finish()
    connections = {item.connection.id for item in bench.items}
    assert len(connections) == 3
    for each in connections:
        items = [item for item in bench.items if item.connection.id == each]
        assert whole(items, Direction.SENT) == REQUEST * 2
        assert whole(items, Direction.RECEIVED) == BODY
    assert bench.missed == []
    assert +bench.source.losses == {}


def test_a_session_whose_secret_comes_among_many_others_is_read(bench: Bench) -> None:
    given = resumed("tls12_aes128")
    lines = [f"CLIENT_RANDOM {n:064x} {n:096x}\n" for n in range(2 * awaiting.SESSIONS_MAX)]
    bench.keys.write_text("".join(lines[: awaiting.SESSIONS_MAX + 10]))
    bench.play(given[1].packets[:-4])
    with bench.keys.open("a") as file:
        file.write("".join(lines[awaiting.SESSIONS_MAX + 10 : -20]) + given[0].secrets)
    bench.play(given[1].packets[-4:])
    bench.finish()
    assert whole(bench.items, Direction.RECEIVED) == BODY
    assert bench.missed == []


def test_trials_of_a_connection_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []
    real = awaiting.tls.keys12

    def counted(master: bytes, *rest: Any) -> Any:
        tried.append(master)
        return real(master, *rest)

    monkeypatch.setattr("capture.packets.tls.keys12", counted)
    packets = resumed("tls12_aes128")[1].packets
    bench.play(packets[:-4])
    for start in range(0, 4 * awaiting.SESSIONS_MAX, 64):
        with bench.keys.open("a") as file:
            file.writelines(f"CLIENT_RANDOM {start + n:064x} {n:096x}\n" for n in range(64))
        bench.items += bench.source.read()
    bench.finish()
    assert 0 < len(tried) <= 2 * awaiting.SESSIONS_MAX
    assert [host for _, host in bench.missed] == [HOST]


# --- keeping ---


@pytest.mark.parametrize("when", ["keys first", "keys last"])
def test_what_is_kept_replays_without_a_key_log(tmp_path: Path, when: str) -> None:
    given = recording()
    path = tmp_path / "kept.pcapng"
    keeping = Keeping(CaptureWriter(path))
    bench = Bench(tmp_path / "keys.log", keeping)
    if when == "keys first":
        bench.keys.write_text(given.secrets)
    bench.play(given.packets)
    bench.keys.write_text(given.secrets)
    bench.finish()
    keeping.close()
    exact(bench)
    assert (keeping.connections, keeping.packets) == (1, len(given.packets))
    source = PcapSource([path])
    again = list(source.items())
    assert whole(again, Direction.SENT) == REQUEST * 2
    assert whole(again, Direction.RECEIVED) == BODY
    assert source.findings.losses == {}
    assert path.stat().st_mode & 0o777 == 0o600


def test_connections_without_keys_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "kept.pcapng"
    keeping = Keeping(CaptureWriter(path))
    empty = len(path.read_bytes())
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.play(recording().packets)
    bench.finish()
    keeping.close()
    assert (keeping.connections, keeping.packets) == (0, 0)
    assert path.stat().st_size - empty < 64  # the head alone


def test_what_waits_to_be_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capture.packets.keeping.CONNECTION_BYTES_MAX", 20_000)
    keeping = Keeping(CaptureWriter(tmp_path / "kept.pcapng"))
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.play(recording().packets)
    bench.finish()
    assert keeping.forgotten > 0
    assert keeping._waiting_bytes <= 20_000


def test_what_waited_too_long_to_be_kept_whole_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capture.packets.keeping.CONNECTION_BYTES_MAX", 20_000)
    keeping = Keeping(CaptureWriter(tmp_path / "kept.pcapng"))
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.play(recording().packets)
    bench.keys.write_text(recording().secrets)
    bench.finish()
    exact(bench)
    assert keeping.connections == keeping.without_beginning == 1
    # The next one between these ports is another one, and whole.
    hello = recording().packets[0].frame[ETHERNET_BYTES:]
    keeping.packet(0, hello)
    keeping.keep(hello[12:24], b"")
    assert (keeping.connections, keeping.without_beginning) == (2, 1)


def test_connections_that_share_a_udp_socket_are_all_kept_with_their_secrets(
    tmp_path: Path,
) -> None:
    first, second = (record_quic(HOST, TALKS, suite) for suite in ("aes128", "aes256"))
    later = [replace(each, at_ns=each.at_ns + 10**12) for each in second.datagrams]
    path = tmp_path / "kept.pcapng"
    keeping = Keeping(CaptureWriter(path))
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.keys.write_text(first.secrets + second.secrets)
    bench.play([frame_of(each) for each in [*first.datagrams, *later]])
    bench.finish()
    keeping.close()
    source = PcapSource([path])
    again = list(source.items())
    for direction in Direction:
        assert said(again, direction) == said(bench.items, direction) != []
    assert keeping.connections == source.findings.decrypted == 2
    assert source.findings.losses == {}


def test_what_was_kept_is_in_the_file_whatever_becomes_of_us(tmp_path: Path) -> None:
    given = recording()
    path, copy = tmp_path / "kept.pcapng", tmp_path / "copy.pcapng"
    keeping = Keeping(CaptureWriter(path))
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.keys.write_text(given.secrets)
    bench.play(given.packets)
    copy.write_bytes(path.read_bytes())  # as kill -9 would leave it
    bench.finish()
    again = list(PcapSource([copy]).items())
    assert whole(again, Direction.RECEIVED) == BODY


def test_a_full_disk_is_told_and_metering_goes_on(tmp_path: Path) -> None:
    writer = CaptureWriter(tmp_path / "kept.pcapng")
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the writer closes it)
    keeping = Keeping(writer)
    bench = Bench(tmp_path / "keys.log", keeping)
    bench.keys.write_text(recording().secrets)
    bench.play(recording().packets)
    bench.finish()
    keeping.close()
    exact(bench)
    assert keeping.error == "No space left on device"


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept.pcapng").write_text("mine")
    with pytest.raises(FileExistsError):
        CaptureWriter(tmp_path / "kept.pcapng")
    assert (tmp_path / "kept.pcapng").read_text() == "mine"


# --- the filter -----------------------------------------------------------------------------------


def passes(program: bytes, packet: bytes, kind: int = 0, interface: int = 2) -> bool:
    """What the kernel does with a packet: classic BPF, of which the filter uses these codes.

    `kind` is its direction (4: outgoing), `interface` its number (1: loopback).
    """
    beside = {0xFFFFF004: kind, 0xFFFFF008: interface}  # linux/filter.h: SKF_AD_OFF + …
    lines = [sniffer.struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = index = 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        try:
            if code == 0x30:
                accumulator = packet[value]
            elif code == 0x50:
                accumulator = packet[index + value]
            elif code in (0x28, 0x48):
                start = value + (index if code == 0x48 else 0)
                accumulator = int.from_bytes(packet[start : start + 2])
            elif code == 0x20 and value in beside:
                accumulator = beside[value]
            elif code == 0x20:
                accumulator = int.from_bytes(packet[value : value + 4])
            elif code == 0xB1:
                index = (packet[value] & 15) * 4
            elif code == 0x54:
                accumulator &= value
            elif code in (0x15, 0x45):
                hit = accumulator == value if code == 0x15 else accumulator & value
                at += yes if hit else no
            elif code == 0x06:
                return value > 0
            else:
                raise AssertionError(code)
        except IndexError:
            return False  # as the kernel: a load past the end


def segment(source: int, destination: int, flags: int = 0x18) -> bytes:
    head = source.to_bytes(2) + destination.to_bytes(2) + bytes(8)
    return head + bytes((0x50, flags)) + bytes(6) + b"data"


def four(body: bytes, server: str = "192.0.2.9", options: int = 0, protocol: int = 6) -> bytes:
    head = bytes((0x45 + options, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0))
    return head + socket.inet_aton(server) + bytes(4) + bytes(4 * options) + body


def six(body: bytes, protocol: int = 6) -> bytes:
    return bytes((0x60, 0, 0, 0, 0, 0, protocol, 64)) + bytes(32) + body


@pytest.mark.parametrize("make", [four, six, lambda body: four(body, options=3)])
def test_the_filter_takes_tcp_of_its_ports_both_ways(make: object) -> None:
    assert callable(make)
    program = sniffer.port_filter([443, 8443])
    for port in (443, 8443):
        assert passes(program, make(segment(port, 50_000)))
        assert passes(program, make(segment(50_000, port)))
    assert not passes(program, make(segment(80, 50_000)))
    assert not passes(program, make(segment(50_000, 80)))


def test_the_filter_refuses_all_else() -> None:
    program = sniffer.port_filter([443])
    assert not passes(program, four(segment(443, 1), protocol=1))
    assert not passes(program, six(segment(443, 1), protocol=58))
    assert not passes(program, b"\x10" + bytes(80))
    assert not passes(program, b"")


@pytest.mark.parametrize("make", [four, six])
def test_of_udp_the_filter_takes_its_ports_both_ways(make: object) -> None:
    assert callable(make)
    program = sniffer.port_filter([443, 8443])

    def datagram(source: int, destination: int, first: int) -> bytes:
        head = source.to_bytes(2) + destination.to_bytes(2) + bytes(4)
        return make(head + bytes((first,)) + bytes(40), protocol=17)  # type: ignore[no-any-return]

    for port in (443, 8443):
        for first in (0xC3, 0x43):
            assert passes(program, datagram(50_000, port, first))
            assert passes(program, datagram(port, 50_000, first))
    assert not passes(program, datagram(50_000, 53, 0xC3))
    assert not passes(program, datagram(53, 50_000, 0x43))


def test_of_a_muted_server_s_udp_what_begins_connections_passes() -> None:
    server = "192.0.2.9"
    program = sniffer.port_filter([443], [socket.inet_aton(server) + (50_000).to_bytes(2)])

    def datagram(source: int, destination: int, first: int, sender: str) -> bytes:
        head = source.to_bytes(2) + destination.to_bytes(2) + bytes(4)
        return four(head + bytes((first,)) + bytes(40), sender, protocol=17)

    assert passes(program, datagram(443, 50_000, 0xC3, server))
    assert not passes(program, datagram(443, 50_000, 0x43, server))
    assert passes(program, datagram(443, 50_000, 0x43, "192.0.2.8"))
    assert passes(program, datagram(443, 50_001, 0x43, server))
    assert passes(program, datagram(50_000, 443, 0x43, "10.0.0.2"))


def test_a_quic_connection_to_a_provider_is_told_once_with_its_host(tmp_path: Path) -> None:
    told: list[object] = []
    ours, its = socket.socketpair()
    source = LiveCapture(
        its,
        [tmp_path / "keys.log"],
        lambda host: host == "example.com",
        lambda *_: None,
        lambda *_: None,
        clock=lambda: 0,
        udp_owner=lambda client: CLIENT if client == ("192.0.2.9", 50_000) else None,
        quic=lambda *what: told.append(what),
    )
    for number in range(3):
        payload = initial(CRYPTO, number)
        udp = (50_000).to_bytes(2) + (443).to_bytes(2) + (len(payload) + 8).to_bytes(2) + bytes(2)
        whole = four(udp + payload, protocol=17)
        whole = whole[:2] + len(whole).to_bytes(2) + whole[4:]
        ours.sendall(sniffer.HEAD.pack(sniffer.PACKET, len(whole), number) + whole)
    assert source.read() == []
    assert told == []
    ours.shutdown(socket.SHUT_WR)
    assert source.finish() == []
    assert told == [(CLIENT, "example.com")]
    ours.close()


def test_a_port_that_is_another_connection_s_now_is_heard_again(bench: Bench) -> None:
    """A UDP socket has many connections, and one of them may be a provider's."""
    client, server = socket.inet_aton("10.0.0.2"), socket.inet_aton("192.0.2.8")
    port = (50_000).to_bytes(2)
    bench.source._pass_by("192.0.2.8", 50_000, 2 << 20)
    assert bench.link.recv(100) == server + port
    bench.source._quic_opened(client + server + port + (443).to_bytes(2), bytes(32))
    assert bench.link.recv(100) == bytes(sniffer.MUTED_BYTES)


def test_loopback_shows_each_packet_once() -> None:
    program = sniffer.port_filter([443])
    packet = four(segment(443, 50_000))
    assert passes(program, packet, kind=0, interface=1)
    assert not passes(program, packet, kind=4, interface=1)
    assert passes(program, packet, kind=4, interface=2)


def test_of_a_muted_server_only_beginnings_and_ends_pass() -> None:
    muted = [f"192.0.2.{n}" for n in range(10, 10 + sniffer.MUTED_MAX)]
    names = [socket.inet_aton(each) + (50_000).to_bytes(2) for each in muted]
    program = sniffer.port_filter([443, 8443], names)
    for each in muted:
        assert passes(program, four(segment(443, 50_001), each))
        assert not passes(program, four(segment(443, 50_000), each))
        assert passes(program, four(segment(443, 50_000, 0x12), each))
        assert passes(program, four(segment(443, 50_000, 0x11), each))
        assert passes(program, four(segment(443, 50_000, 0x04), each))
    assert passes(program, four(segment(443, 50_000), "192.0.2.9"))


# --- the sniffer ----------------------------------------------------------------------------------


class FakePackets:
    """A packet socket's way of giving packets, statistics and nothing."""

    def __init__(self, packets: Sequence[tuple[bytes, tuple[str, int, int]]], drops: int) -> None:
        self._packets = list(packets)
        self._drops = drops
        self._pair = socket.socketpair()
        self._pair[1].send(b"x")

    def fileno(self) -> int:
        return self._pair[0].fileno()

    def recvmsg(self, *_: int) -> tuple[bytes, list[object], int, tuple[str, int, int]]:
        if not self._packets:
            self._pair[0].setblocking(False)
            self._pair[0].recv(1)
            raise BlockingIOError
        data, address = self._packets.pop(0)
        return data, [], 0, address

    def getsockopt(self, *_: int) -> bytes:
        drops, self._drops = self._drops, 0
        return sniffer.struct.pack("=II", 0, drops)


def test_drops_are_told_and_other_protocols_are_left_out() -> None:
    ip, arp = 0x0800, 0x0806
    packets = FakePackets(
        [
            (b"in on lo", ("lo", ip, 0)),
            (b"out on eth0", ("eth0", ip, 4)),
            (b"arp", ("eth0", arp, 0)),
        ],
        drops=3,
    )
    ours, its = socket.socketpair()
    thread = threading.Thread(target=sniffer.Sniffer(packets, its, [443]).run)  # type: ignore[arg-type]
    thread.start()
    found: list[tuple[int, bytes | int]] = []
    while len(found) < 3:
        kind, length, number = sniffer.HEAD.unpack(ours.recv(sniffer.HEAD.size, socket.MSG_WAITALL))
        body = ours.recv(length, socket.MSG_WAITALL) if length else b""
        found.append((kind, body or number))
    ours.close()
    thread.join()
    assert sorted(found, key=str) == sorted(
        [
            (sniffer.PACKET, b"in on lo"),
            (sniffer.PACKET, b"out on eth0"),
            (sniffer.DROPPED, 3),
        ],
        key=str,
    )
