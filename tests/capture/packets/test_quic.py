"""QUIC's first packets: the host in them, whatever the client does to its hello."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from capture.packets import quic
from capture.packets.quic import VERSIONS, QuicHellos, initial_keys

# RFC 9001, Appendix A: the client's connection id, its keys, and the payload of its first packet.
ID = bytes.fromhex("8394c8f03e515708")
CRYPTO = bytes.fromhex(
    "060040f1010000ed0303ebf8fa56f12939b9584a3896472ec40bb863cfd3e868"
    "04fe3a47f06a2b69484c00000413011302010000c000000010000e00000b6578"
    "616d706c652e636f6dff01000100000a00080006001d00170018001000070005"
    "04616c706e000500050100000000003300260024001d00209370b2c9caa47fba"
    "baf4559fedba753de171fa71f50f1ce15d43e994ec74d748002b000302030400"
    "0d0010000e0403050306030203080408050806002d00020101001c0002400100"
    "3900320408ffffffffffffffff05048000ffff07048000ffff08011001048000"
    "75300901100f088394c8f03e51570806048000ffff"
)
HELLO = CRYPTO[4:]
ADDRESSES = b"one connection"


def host(hellos: QuicHellos, addresses: bytes, data: bytes) -> str | None:
    """The host that a hello names, once it is there."""
    told = hellos.hello(addresses, data)
    return None if told is None else told.hello.server_name


def test_keys_are_those_of_the_standard_s_example() -> None:
    keys = initial_keys(VERSIONS[1], ID)
    assert keys.key.hex() == "1f369613dd76d5467730efcbe3b1a22d"
    assert keys.iv.hex() == "fa044b2f42a3fd3b46fb255c"
    assert keys.header.hex() == "9f50449e04a0e810283a1e9933adedd2"


def variable(number: int) -> bytes:
    return (number | 0x4000).to_bytes(2)


def frame(offset: int, piece: bytes) -> bytes:
    return b"\x06" + variable(offset) + variable(len(piece)) + piece


def packet(
    payload: bytes,
    number: int = 0,
    version: int = 1,
    key_id: bytes = ID,
    destination: bytes = ID,
    token: bytes = b"",
    size: int = 4,
) -> bytes:
    """An Initial packet, protected as RFC 9001, 5 says."""
    keys = initial_keys(VERSIONS[version], key_id)
    payload = payload.ljust(64, b"\0")
    first = 0xC0 | VERSIONS[version].initial | (size - 1)
    head = bytes((first,)) + version.to_bytes(4) + bytes((len(destination),)) + destination
    head += b"\x00" + bytes((len(token),)) + token + variable(size + len(payload) + 16)
    plain = head + number.to_bytes(size)
    nonce = (int.from_bytes(keys.iv) ^ number).to_bytes(12)
    sealed = AESGCM(keys.key).encrypt(nonce, payload, plain)
    whole = bytearray(plain + sealed)
    at = len(head)
    sample = bytes(whole[at + 4 : at + 20])
    mask = Cipher(algorithms.AES(keys.header), modes.ECB()).encryptor().update(sample)
    whole[0] ^= mask[0] & 0x0F
    for index in range(size):
        whole[at + index] ^= mask[1 + index]
    return bytes(whole)


def test_the_standard_s_first_packet_is_protected_as_it_says() -> None:
    made = packet(CRYPTO.ljust(1162, b"\0"), number=2)
    assert made[:22].hex() == "c000000001088394c8f03e5157080000449e7b9aec34"
    assert host(QuicHellos(), ADDRESSES, made) == "example.com"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_hello_in_one_packet(version: int, size: int) -> None:
    made = packet(CRYPTO, 7, version, size=size, token=b"a token of a retry")
    hellos = QuicHellos()
    assert host(hellos, ADDRESSES, made) == "example.com"
    assert host(hellos, ADDRESSES, made) is None  # told once
    assert hellos.unnamed == 0


@pytest.mark.parametrize("seed", range(12))
def test_pieces_in_any_order_over_several_packets(seed: int) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(HELLO)), rng.randrange(1, 9)))
    bounds = list(zip([0, *cuts], [*cuts, len(HELLO)], strict=True))
    rng.shuffle(bounds)
    pieces = [frame(a, HELLO[a:b]) for a, b in bounds]
    hellos, told = QuicHellos(), []
    for number, piece in enumerate(pieces):
        padded = b"\x00" * rng.randrange(9) + b"\x01" + piece
        # The server's id comes with its answer; the keys stay those of the first packet.
        destination = ID if number == 0 else b"server's"
        told.append(
            host(hellos, ADDRESSES, packet(padded, number, key_id=ID, destination=destination))
        )
    assert told == [*[None] * (len(pieces) - 1), "example.com"]


def test_two_packets_in_one_datagram() -> None:
    data = packet(frame(0, HELLO[:80]), 0) + packet(frame(80, HELLO[80:]), 1)
    assert host(QuicHellos(), ADDRESSES, data) == "example.com"


def test_connections_are_told_apart() -> None:
    hellos = QuicHellos()
    other = HELLO.replace(b"example.com", b"another.com")
    assert host(hellos, b"1", packet(CRYPTO)) == "example.com"
    assert host(hellos, b"2", packet(frame(0, other))) == "another.com"


def without_name() -> bytes:
    return HELLO.replace(
        b"\x00\x00\x00\x10\x00\x0e\x00\x00\x0b", b"\x7f\x7f\x00\x10\x00\x0e\x00\x00\x0b"
    )


@pytest.mark.parametrize(
    "datagrams",
    [
        [packet(frame(0, without_name()))],
        [packet(frame(5, HELLO[5:]))] * quic.DATAGRAMS_MAX,
        [packet(CRYPTO, key_id=b"not that")] * quic.DATAGRAMS_MAX,
    ],
    ids=["no name", "its beginning is missing", "under other keys"],
)
def test_who_tells_no_name_is_counted_once(datagrams: Sequence[bytes]) -> None:
    hellos = QuicHellos()
    assert [host(hellos, ADDRESSES, data) for data in datagrams] == [None] * len(datagrams)
    assert hellos.unnamed == 1


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quic, "CONNECTIONS_MAX", 10)
    hellos = QuicHellos()
    for number in range(50):
        host(hellos, number.to_bytes(4), packet(frame(9, HELLO[9:])))
    assert len(hellos._connections) == 10
    assert hellos.unnamed == 40
    far = QuicHellos()
    for offset in range(0, 1 << 14, 1 << 10):
        host(far, b"x", packet(frame(offset | 0x2000, bytes(1000))))
    held = far._connections[b"x"]
    assert held is None or sum(map(len, held.crypto.values())) <= quic.HELLO_BYTES_MAX


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_give_a_name_or_none(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(packet(CRYPTO, token=b"token"))
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(40)] = rng.randrange(256)
    made = bytes(data[: rng.randrange(len(data) + 1)])
    assert host(QuicHellos(), ADDRESSES, made) in (None, "example.com")
    noise = bytes((0xC3, 0, 0, 0, 1)) + rng.randbytes(rng.randrange(1500))
    assert host(QuicHellos(), ADDRESSES, noise) is None
