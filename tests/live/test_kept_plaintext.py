"""A run's plaintext on its way into a capture: all of it, or up to a place that is told."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.pcap import PcapSource
from halton_meter.live import kept_plaintext
from halton_meter.live.kept_plaintext import Item, PlaintextKeeper, keep_exchange, read, write
from halton_meter.model import (
    Body,
    Connection,
    Direction,
    Exchange,
    Outcome,
    Protocol,
    Request,
    Response,
    Source,
    TlsChunk,
    TlsClosed,
)
from halton_meter.wire.conversation import Conversation, Interest
from halton_meter.wire.recording import Recorder

CONNECTION = Connection("c1", Source.UPROBES, None, "api.anthropic.com", 443)
REQUEST = b"GET /v1/models HTTP/1.1\r\nhost: api.anthropic.com\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


def chunk(way: Direction, offset: int, data: bytes, at_ns: int, lost: int = 0) -> TlsChunk:
    return TlsChunk(CONNECTION, way, offset, data, len(data) + lost, at_ns)


TALK: list[Item] = [
    chunk(Direction.SENT, 0, REQUEST, 10**18),
    chunk(Direction.RECEIVED, 0, ANSWER, 10**18 + 5_000_000),
    TlsClosed(CONNECTION, 10**18 + 6_000_000),
]


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def keep(fd: int, items: list[Item]) -> None:
    keeper = PlaintextKeeper(fd)
    for item in items:
        keeper.keep(item)


ITEMS = st.lists(
    st.builds(
        lambda number, way, offset, data, lost, at_ns, joined: TlsChunk(
            Connection(f"c{number}", Source.UPROBES, None, "h.example", 443, joined),
            way,
            offset,
            data,
            len(data) + lost,
            at_ns,
        ),
        st.integers(0, 3),
        st.sampled_from(Direction),
        st.integers(0, 1 << 40),
        st.binary(max_size=300),
        st.integers(0, 1 << 30),
        st.integers(0, 1 << 62),
        st.booleans(),
    )
)


@given(ITEMS)
def test_what_was_kept_is_read_as_it_was(items: list[Item]) -> None:
    with tempfile.TemporaryFile() as file:
        keep(file.fileno(), items)
        found = read(file.fileno())
    assert found.items == items
    assert found.error is None


@given(st.integers(0, 600))
def test_a_torn_file_gives_what_is_whole(size: int) -> None:
    with tempfile.TemporaryFile() as file:
        keep(file.fileno(), TALK)
        whole = os.fstat(file.fileno()).st_size
        os.ftruncate(file.fileno(), min(size, whole))
        found = read(file.fileno())
    assert found.items == TALK[: len(found.items)]
    assert found.error in (None, "it ends in the middle")
    if size >= whole:
        assert (found.items, found.error) == (TALK, None)


@given(st.binary(max_size=400))
def test_nonsense_is_no_crash(raw: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        read(file.fileno())


def test_the_next_metering_process_goes_on_and_a_connection_ends_once(fd: int) -> None:
    keep(fd, TALK[:2])
    keep(fd, TALK[2:])
    keep(fd, TALK[1:])  # it hears again of what the last one had not acknowledged
    assert read(fd).items == TALK


def test_too_much_is_told_and_what_was_kept_stays(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_plaintext, "PLAINTEXT_BYTES_MAX", 500)
    keep(fd, [*TALK, chunk(Direction.SENT, 100, b"x" * 600, 1), TALK[0]])
    found = read(fd)
    assert found.items == TALK
    assert found.error == "more than 0 MB of plaintext"


def test_a_disk_that_is_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as file:
        real = os.pwrite

        def half(fd: int, data: bytes, at: int) -> int:
            return real(fd, data[: len(data) // 2], at)

        keep(file.fileno(), TALK[:1])
        monkeypatch.setattr(os, "pwrite", half)
        keep(file.fileno(), TALK[1:])
        found = read(file.fileno())
    assert found.items == TALK[: len(found.items)]
    assert found.error is not None


def test_the_capture_holds_the_same_plaintext(tmp_path: Path) -> None:
    path = tmp_path / "made.pcapng"
    lost = [TALK[0], chunk(Direction.RECEIVED, 0, ANSWER[:20], 10**18 + 1, lost=5)]
    lost.append(chunk(Direction.RECEIVED, 25, ANSWER[25:], 10**18 + 2))
    assert write(TALK, path)[0] == 1
    assert said(path) == {Direction.SENT: REQUEST, Direction.RECEIVED: ANSWER}
    assert path.stat().st_mode & 0o777 == 0o600
    gapped = tmp_path / "gapped.pcapng"
    assert write(lost, gapped)[0] == 1
    assert said(gapped)[Direction.RECEIVED] == ANSWER[:20] + ANSWER[25:]
    with pytest.raises(FileExistsError):
        write(TALK, path)


BODIES = st.builds(
    lambda data, complete: Body((data,) if data else (), complete),
    st.binary(max_size=200),
    st.booleans(),
)
HEADERS = (("content-type", "application/json"), ("content-encoding", "gzip"))


@given(BODIES, BODIES, st.booleans(), st.sampled_from([None, 200, 429]))
def test_an_exchange_is_read_again_as_the_proxy_had_it(
    asked: Body, answered: Body, trails: bool, status: int | None
) -> None:
    trailers = (("grpc-status", "0"),) if trails and answered.complete else ()
    exchange = Exchange(
        "e1",
        CONNECTION,
        Protocol.HTTP2,
        Request("POST", "api.openai.com", "/v1/responses", (("beta", "true"),), HEADERS, asked),
        Response(status, HEADERS, answered, trailers),
        10**18,
        10**18 + 1_000_000,
        10**18 + 2_000_000,
        Outcome.COMPLETE,
    )
    with tempfile.TemporaryFile() as file:
        keep_exchange(PlaintextKeeper(file.fileno()), exchange)
        found = read(file.fileno())
    assert found.error is None
    conversation = Conversation(found.items[0].connection, lambda _: Interest(True))
    made = []
    for item in found.items:
        if isinstance(item, TlsChunk):
            made += conversation.receive(item)
        else:
            made += conversation.close(item)
    (again,) = made
    assert again.request.body.joined() == asked.joined()
    assert (again.request.method, again.request.path) == ("POST", "/v1/responses")
    assert HEADERS[0] in again.request.headers
    assert HEADERS[1] not in again.request.headers
    if asked.complete:
        assert again.response.status == status
    if status is not None and asked.complete:
        assert again.response.body.joined() == answered.joined()
        assert again.response.body.complete == answered.complete


def turns(items: list[Item], ends: bytes) -> list[Exchange]:
    """What a reader of WebSockets makes of it; a message with `ends` in it ends a turn."""
    conversations: dict[str, Conversation] = {}
    made: list[Exchange] = []
    interest = Interest(True, lambda message: ends in message)
    for item in items:
        conversation = conversations.setdefault(
            item.connection.id, Conversation(item.connection, lambda _: interest)
        )
        made += (
            conversation.receive(item) if isinstance(item, TlsChunk) else conversation.close(item)
        )
    return made


MESSAGES = st.lists(st.binary(max_size=70_000).filter(lambda m: b"\n" not in m and m), max_size=4)


@given(MESSAGES, MESSAGES, st.booleans())
def test_turns_of_a_websocket_are_read_again_as_the_proxy_had_them(
    asked: list[bytes], answered: list[bytes], ends: bool
) -> None:
    """Two turns of one socket: each is a socket of its own, with the same request and response."""
    recorder = Recorder(lambda _: Interest(True, lambda message: b"END" in message))
    upgrade = [("upgrade", "websocket"), ("user-agent", "codex")]
    place = ("GET", "api.openai.com", "/v1/responses?model=gpt-5")
    recording = recorder.begin(CONNECTION, Protocol.HTTP1, *place, upgrade, 10**18)
    assert recording is not None
    recording.answered(101, [("x-request-id", "r1"), ("sec-websocket-extensions", "x")], 10**18)
    turned: list[Exchange] = []
    for number in range(2):
        at_ns = 10**18 + 10**9 * (number + 1)
        for message in asked:
            turned += recording.message(True, message, at_ns)
        for place_in_turn, message in enumerate(answered):
            turned += recording.message(False, message, at_ns + place_in_turn + 1)
        turned += recording.message(False, b"END" if ends else b"more", at_ns + 10)
    turned += recording.end(10**18 + 10**10)
    with tempfile.TemporaryFile() as file:
        keeper = PlaintextKeeper(file.fileno())
        for each in turned:
            keep_exchange(keeper, each)
        found = read(file.fileno())
    assert found.error is None
    again = turns(found.items, b"END")
    assert len(again) == len(turned)
    for before, after in zip(turned, again, strict=True):
        assert after.protocol is Protocol.WEBSOCKET
        assert after.request.body == before.request.body
        assert after.response.body == before.response.body
        assert (after.response.status, after.outcome) == (101, before.outcome)
        assert (after.request.host, after.request.path) == ("api.openai.com", "/v1/responses")
        assert after.request.query == before.request.query
        assert ("user-agent", "codex") in after.request.headers
        assert ("x-request-id", "r1") in after.response.headers
        times = before.started_ns, before.first_byte_ns, before.ended_ns
        assert (after.started_ns, after.first_byte_ns, after.ended_ns) == times


def said(path: Path) -> dict[Direction, bytes]:
    """What replay reads of a capture, by direction."""
    found = dict.fromkeys(Direction, b"")
    for item in PcapSource([path]).items():
        if isinstance(item, TlsChunk):
            assert item.connection.peer == "api.anthropic.com"
            found[item.direction] += item.data
    return found
