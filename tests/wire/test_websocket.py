"""WebSocket scenarios, made by a real client and server (`wsproto`), read from between them."""

from __future__ import annotations

import json
import random

import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate

from halton_meter.model import Outcome, Protocol
from halton_meter.wire import http1
from halton_meter.wire.conversation import Interest
from halton_meter.wire.websocket import CLIENT_MESSAGES_MAX, MESSAGE_BYTES_MAX
from tests.wire.conftest import (
    RECEIVED,
    SENT,
    Script,
    chunks_of,
    pierce,
    same_response,
    split_by,
    talk,
    whole,
)

TURNS = Interest(keep=True, turn_ends=lambda message: b'"response.completed"' in message)


def ask(request):
    return TURNS


class Socket:
    """A client and a server that talk over WebSocket, and the script of what they said."""

    def __init__(self, *extensions: PerMessageDeflate) -> None:
        self.script: Script = []
        self.client = WSConnection(ConnectionType.CLIENT)
        self.server = WSConnection(ConnectionType.SERVER)
        request = Request(
            host="api.example.com", target="/v1/responses?key=sk-1", extensions=list(extensions)
        )
        self._send(self.client, self.server, SENT, request)
        theirs = [PerMessageDeflate()] if extensions else []
        self._send(self.server, self.client, RECEIVED, AcceptConnection(extensions=theirs))

    def _send(self, speaker, listener, way, *events) -> None:
        data = b"".join(speaker.send(event) for event in events)
        self.script.append((way, data))
        listener.receive_data(data)
        for event in listener.events():
            if isinstance(event, Ping):
                reply = listener.send(event.response())
                speaker.receive_data(reply)
                list(speaker.events())
                self.script.append((RECEIVED if way is SENT else SENT, reply))

    def say(self, *events) -> None:
        self._send(self.client, self.server, SENT, *events)

    def answer(self, *events) -> None:
        self._send(self.server, self.client, RECEIVED, *events)

    def turn(self, number: int, deltas: int = 20) -> None:
        self.say(TextMessage(json.dumps({"type": "response.create", "n": number, "model": "m"})))
        for delta in range(deltas):
            text = json.dumps({"type": "response.output_text.delta", "delta": f"{number}.{delta}"})
            self.answer(TextMessage(text))
        self.answer(TextMessage(completed(number)))


def completed(number: int) -> str:
    usage = {"input_tokens": number, "output_tokens": 7}
    return json.dumps(
        {"type": "response.completed", "response": {"id": f"r{number}", "usage": usage}}
    )


def last_of(exchange) -> dict:
    return json.loads(exchange.response.body.joined().split(b"\n")[-1])


DEFLATES = {
    "plain": lambda: (),
    "deflate": lambda: (PerMessageDeflate(),),
    "no-takeover": lambda: (
        PerMessageDeflate(client_no_context_takeover=True, server_no_context_takeover=True),
    ),
}


@pytest.fixture(params=DEFLATES)
def socket(request) -> Socket:
    return Socket(*DEFLATES[request.param]())


def test_each_turn_is_an_exchange(deliver, socket):
    for number in range(3):
        socket.turn(number)
    found = deliver(socket.script, ask).exchanges
    assert [last_of(e)["response"]["id"] for e in found] == ["r0", "r1", "r2"]
    assert [e.outcome for e in found] == [Outcome.COMPLETE] * 3
    assert all(e.protocol is Protocol.WEBSOCKET for e in found)
    assert [len(e.response.body.joined().split(b"\n")) for e in found] == [21] * 3
    assert len({e.id for e in found}) == 3
    for number, exchange in enumerate(found):
        assert exchange.request.path == "/v1/responses"
        asked = json.loads(exchange.request.body.joined().split(b"\n")[-1])
        assert asked == {"type": "response.create", "n": number, "model": "m"}
        assert exchange.response.status == 101
    assert "sk-1" not in repr(found)


def test_fragments_with_pings_between_them(deliver, socket):
    text = completed(5)
    socket.say(TextMessage("ask"))
    socket.answer(TextMessage(text[:10], message_finished=False))
    socket.answer(Ping(b"are you there"))
    socket.answer(TextMessage(text[10:30], message_finished=False), Ping(b""))
    socket.answer(TextMessage(text[30:], message_finished=True))
    found = deliver(socket.script, ask).only
    assert last_of(found)["response"]["id"] == "r5"
    assert found.outcome is Outcome.COMPLETE


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
def test_messages_of_every_length_form(size):
    socket = Socket()
    padding = "x" * size
    socket.say(TextMessage(padding))
    socket.answer(TextMessage(padding), TextMessage(completed(1)))
    found = talk(chunks_of(socket.script, split_by(random.Random(size), 2000)), ask).only
    assert found.request.body.joined() == padding.encode()
    assert found.response.body.joined() == f"{padding}\n{completed(1)}".encode()


def test_binary_messages_and_newlines_in_json(deliver):
    socket = Socket()
    socket.answer(BytesMessage(b'{"a":\n1}'), BytesMessage(completed(2).encode()))
    found = deliver(socket.script, ask).only
    assert found.response.body.joined().split(b"\n")[0] == b'{"a": 1}'


def test_a_turn_cut_off_is_aborted(deliver, socket):
    socket.turn(1)
    socket.say(TextMessage("again"))
    socket.answer(TextMessage('{"type":"response.created"}'))
    found = deliver(socket.script, ask).exchanges
    assert [e.outcome for e in found] == [Outcome.COMPLETE, Outcome.ABORTED]
    assert not found[1].response.body.complete


def test_no_turn_is_made_up_when_the_server_said_nothing(deliver, socket):
    socket.turn(1)
    socket.say(TextMessage("again"))
    socket.say(CloseConnection(code=1000))
    assert len(deliver(socket.script, ask).exchanges) == 1


def test_a_socket_without_turns_is_one_exchange(deliver, socket):
    socket.turn(1)
    socket.turn(2)
    found = deliver(socket.script, lambda request: Interest(keep=True)).only
    assert found.response.body.joined().count(b"response.completed") == 2


def test_a_socket_that_nobody_wants(deliver, socket):
    socket.turn(1)
    assert deliver(socket.script, lambda request: Interest(keep=False)).exchanges == []


def test_frames_sent_before_the_upgrade_is_answered(deliver):
    socket = Socket()
    socket.turn(1)
    first, second = socket.script[0], socket.script[1]
    early = [first, socket.script[2], second, *socket.script[3:]]
    found = deliver(early, ask).only
    assert b"response.create" in found.request.body.joined()


def test_frames_that_wait_for_the_upgrades_answer_are_bounded(deliver, monkeypatch):
    monkeypatch.setattr(http1, "EARLY_BYTES_MAX", 300)
    socket = Socket()
    first, second = socket.script
    for number in range(40):
        socket.say(TextMessage(f'{{"type":"response.create","n":{number}}}'))
    early = socket.script[2:]
    del socket.script[2:]
    socket.turn(1)
    talked = deliver([first, *early, second, *socket.script[2:]], ask)
    assert talked.losses["early_over_limit"] == 1
    last = talked.exchanges[-1]
    assert last_of(last)["response"]["id"] == "r1"
    assert last.outcome is Outcome.GAPPED
    unanswered = deliver([first, *early], ask)
    said = sum(len(data) for _, data in early)
    assert unanswered.losses["over_limit_bytes"] >= said - 300 - max(len(d) for _, d in early)


def test_a_refused_upgrade_is_plain_http(deliver):
    client = WSConnection(ConnectionType.CLIENT)
    request = client.send(Request(host="api.example.com", target="/v1/realtime"))
    refused = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}"
    plain = b"GET /v1/models HTTP/1.1\r\nHost: api.example.com\r\n\r\n"
    found = deliver(
        [(SENT, request), (RECEIVED, refused), (SENT, plain), (RECEIVED, refused)]
    ).exchanges
    assert [e.response.status for e in found] == [401, 401]
    assert [e.protocol for e in found] == [Protocol.HTTP1] * 2


def test_client_messages_are_kept_over_turns_and_bounded():
    socket = Socket()
    for number in range(CLIENT_MESSAGES_MAX + 9):
        socket.say(TextMessage(f"m{number}"))
    socket.answer(TextMessage(completed(1)))
    asked = talk(chunks_of(socket.script, whole), ask).only.request.body.joined().split(b"\n")
    assert len(asked) == CLIENT_MESSAGES_MAX + 1
    assert asked[0] == b"m0"  # what opened the session is kept
    assert asked[1] == b"m9"
    assert asked[-1] == b"m%d" % (CLIENT_MESSAGES_MAX + 8)


# --- holes ---


def start_of(script: Script, turn: int) -> int:
    """The offset, among received bytes, of what the server said from step `turn` of the script."""
    return sum(len(data) for way, data in script[:turn] if way is RECEIVED)


@pytest.mark.parametrize("count", [1, 40, 300])
def test_behind_a_hole_in_a_shared_window_nothing_claims_to_be_whole(count):
    socket = Socket(PerMessageDeflate())
    socket.turn(1)
    begun = len(socket.script)
    socket.turn(2)
    socket.turn(3)
    first = start_of(socket.script, begun + 4) + 3
    found = talk(pierce(chunks_of(socket.script, whole), RECEIVED, first, count), ask)
    assert found.exchanges[0].outcome is Outcome.COMPLETE
    assert {e.outcome for e in found.exchanges[1:]} == {Outcome.GAPPED}
    assert found.losses["inflate_lost"] + found.losses.get("decode_failed", 0) > 0


@pytest.mark.parametrize("kind", ["plain", "no-takeover"])
@pytest.mark.parametrize("count", [1, 5, 40, 300])
def test_turns_behind_a_hole_are_read_again(kind, count):
    socket = Socket(*DEFLATES[kind]())
    socket.turn(1)
    begun = len(socket.script)
    for number in range(2, 8):
        socket.turn(number)
    first = start_of(socket.script, begun + 4) + 3
    found = talk(pierce(chunks_of(socket.script, whole), RECEIVED, first, count), ask).exchanges
    assert found[0].outcome is Outcome.COMPLETE
    assert Outcome.GAPPED in {e.outcome for e in found}
    assert found[-1].outcome is Outcome.COMPLETE
    assert last_of(found[-1])["response"] == {
        "id": "r7",
        "usage": {"input_tokens": 7, "output_tokens": 7},
    }


def test_a_hole_within_a_long_message_costs_that_message():
    socket = Socket()
    socket.say(TextMessage("ask"))
    begun = start_of(socket.script, len(socket.script))
    socket.answer(TextMessage("y" * 5000), TextMessage(completed(3)))
    found = talk(pierce(chunks_of(socket.script, whole), RECEIVED, begun + 100, 2000), ask).only
    assert found.outcome is Outcome.GAPPED
    assert found.response.body.joined() == completed(3).encode()


def test_holes_anywhere(holed, socket):
    for number in range(4):
        socket.turn(number, deltas=5)
    holed(socket.script, ask, holes=60, alike=same_response)


# --- hostile input ---


def server_frame(opcode: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8) + payload


def test_a_frame_that_claims_to_be_enormous():
    socket = Socket()
    socket.script.append((RECEIVED, server_frame(1, b"x" * 100, 1 << 62)))
    socket.script.append((RECEIVED, b"x" * 5000))
    found = talk(chunks_of(socket.script, whole), ask)
    assert found.losses["message_over_limit"] == 1
    assert found.exchanges == []


def test_a_message_that_inflates_without_end():
    import zlib

    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = compressor.compress(bytes(4 * MESSAGE_BYTES_MAX)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    socket = Socket(PerMessageDeflate())
    socket.answer(TextMessage("first"))
    frame = bytes((0xC1, 127)) + len(bomb).to_bytes(8) + bomb
    socket.script.append((RECEIVED, frame))
    found = talk(chunks_of(socket.script, whole), ask)
    assert found.losses["message_over_limit"] == 1


def test_nonsense_after_the_upgrade_is_counted():
    socket = Socket()
    socket.script.append((RECEIVED, b"\x0f\xff" * 50))
    found = talk(chunks_of(socket.script, whole), ask)
    assert found.losses["garbage"] >= 1
    assert found.exchanges == []
