"""The name in a ClientHello, however it comes, and nothing of what is none."""

from __future__ import annotations

import contextlib
import random
import ssl

import pytest

from proxy_fallback.edge.hello import HELLO_BYTES_MAX, BegunTls

HOST = "api.provider.test"


def client_hello(host: str | None) -> bytes:
    """What this Python's OpenSSL sends first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    sent = ssl.MemoryBIO()
    begun = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=host)
    with contextlib.suppress(ssl.SSLWantReadError):
        begun.do_handshake()
    return sent.read()


def in_records(hello: bytes, size: int) -> bytes:
    """The same message in records of so many bytes."""
    message = hello[5:]
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(hello[:3] + len(piece).to_bytes(2) + piece for piece in pieces)


def told(*pieces: bytes) -> tuple[list[str], bool]:
    begun = BegunTls()
    names = [name for piece in pieces if (name := begun.feed(piece))]
    return names, begun.done


def each_byte(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


def test_a_name_is_found_whole_byte_by_byte_and_randomly_split() -> None:
    for hello in (client_hello(HOST), in_records(client_hello(HOST), 50)):
        assert told(hello) == told(hello + b"more") == ([HOST], True)
        assert told(*each_byte(hello)) == ([HOST], True)
        assert told(*each_byte(hello[:-1])) == ([], False)
        cut = random.Random(1).randrange(1, len(hello))
        assert told(hello[:cut], hello[cut:]) == ([HOST], True)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x05\x01\x00",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",  # a ServerHello
        b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",  # an empty one
        client_hello(None),
        client_hello(HOST).replace(HOST.encode(), b"\xff" * len(HOST)),
        b"\x16\x03\x01\x00\x00" * HELLO_BYTES_MAX,  # records of nothing
    ],
)
def test_what_has_no_name_is_let_go(sent: bytes) -> None:
    assert told(sent) == told(*each_byte(sent[:HELLO_BYTES_MAX])) == ([], True)


def test_damage_gives_a_result_and_no_error() -> None:
    hello, chance = bytearray(client_hello(HOST)), random.Random(2)
    for _ in range(2000):
        damaged = bytearray(hello)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        told(bytes(damaged))
