"""QUIC's packets of data, opened with a traffic secret, and the pieces of streams in them.

RFC 9001, 5 (protection) and 6 (key update), RFC 9000, 12.4 and 19 (frames). Nothing here keeps
plaintext or prints a secret. What pieces become is `http3.py`'s; which secret, whose connection and
when is `quic_connections.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from capture.packets.quic import Version, number
from capture.packets.tls import expand_label

# (AEAD, its key's bytes) by a secret's length: which of two it is, the first packet shows.
_SUITES = {48: (("aes", 32),), 32: (("aes", 16), ("chacha", 32))}
_SAMPLE_BYTES, _TAG_BYTES = 16, 16
_LONG, _PHASE = 0x80, 0x04


class Piece(NamedTuple):
    """Bytes of a stream; `ends`: these are its last ones."""

    stream: int
    offset: int
    data: bytes
    ends: bool


class Reset(NamedTuple):
    """Its sender gave up this direction of a stream."""

    stream: int


class Close(NamedTuple):
    """The connection ends."""


class Unread(NamedTuple):
    """A frame that is not known, or no frame: the rest of the packet is not read."""


Frame = Piece | Reset | Close | Unread


class _Generation:
    """The AEAD of one secret; a key update makes the next one."""

    def __init__(self, version: Version, secret: bytes, suite: tuple[str, int]) -> None:
        self._version, self._secret, self._suite = version, secret, suite
        kind, size = suite
        key = expand_label(secret, version.label + b" key", size)
        self._aead = AESGCM(key) if kind == "aes" else ChaCha20Poly1305(key)
        self._iv = int.from_bytes(expand_label(secret, version.label + b" iv", 12))

    def open(self, packet_number: int, head: bytes, body: bytes) -> bytes | None:
        try:
            return self._aead.decrypt((self._iv ^ packet_number).to_bytes(12), body, head)
        except (InvalidTag, ValueError):
            return None

    def following(self) -> _Generation:
        secret = expand_label(self._secret, self._version.label + b" ku", len(self._secret))
        return _Generation(self._version, secret, self._suite)


def _mask(version: Version, secret: bytes, suite: tuple[str, int]) -> Callable[[bytes], bytes]:
    """What a packet's header is hidden with, by its sample; the same for all generations."""
    kind, size = suite
    key = expand_label(secret, version.label + b" hp", size)
    if kind == "chacha":
        return lambda sample: (
            Cipher(algorithms.ChaCha20(key, sample), None).encryptor().update(bytes(5))
        )
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update  # noqa: S305 (RFC 9001)


class PacketOpener:
    """One direction's packets under one traffic secret and those that follow from it."""

    def __init__(self, version: Version, secret: bytes) -> None:
        self._candidates = [
            (_mask(version, secret, suite), _Generation(version, secret, suite))
            for suite in _SUITES.get(len(secret), ())
        ]
        self._before: _Generation | None = None
        self._phase = 0
        self._largest = -1

    def open(self, data: bytes, start: int, number_at: int, end: int) -> bytes | None:
        """The payload of the packet at `start`, whose number is at `number_at`; None: not ours."""
        sample = data[number_at + 4 : number_at + 4 + _SAMPLE_BYTES]
        if len(sample) < _SAMPLE_BYTES:
            return None
        for place, (mask_of, generation) in enumerate(self._candidates):
            mask = mask_of(sample)
            is_long = data[start] & _LONG
            first = data[start] ^ (mask[0] & (0x0F if is_long else 0x1F))
            size = (first & 3) + 1
            hidden = data[number_at : number_at + size]
            shown = bytes(a ^ b for a, b in zip(hidden, mask[1:], strict=False))
            whole = _whole(int.from_bytes(shown), 8 * size, self._largest + 1)
            head = bytes((first,)) + data[start + 1 : number_at] + shown
            body = data[number_at + size : end]
            phase = self._phase if is_long else first & _PHASE
            payload = self._opened(place, generation, phase, whole, head, body)
            if payload is not None:
                self._candidates = [self._candidates[place]] if place else self._candidates[:1]
                self._largest = max(self._largest, whole)
                return payload
        return None

    def _opened(
        self, place: int, now: _Generation, phase: int, whole: int, head: bytes, body: bytes
    ) -> bytes | None:
        if phase == self._phase:
            return now.open(whole, head, body)
        following = now.following()
        payload = following.open(whole, head, body)
        if payload is not None:
            mask_of, self._before = self._candidates[place]
            self._candidates[place] = mask_of, following
            self._phase = phase
            return payload
        return None if self._before is None else self._before.open(whole, head, body)


def _whole(truncated: int, bits: int, expected: int) -> int:
    """A packet's number, of which the last bits were sent (RFC 9000, A.3)."""
    window = 1 << bits
    found = (expected & ~(window - 1)) | truncated
    if found + window // 2 <= expected and found + window < 1 << 62:
        return found + window
    return found - window if found > expected + window // 2 and found >= window else found


# Frames that are passed over: how many variable-length integers they hold.
_INTEGERS = {
    0x00: 0, 0x01: 0, 0x05: 2, 0x10: 1, 0x11: 2, 0x12: 1, 0x13: 1, 0x14: 1, 0x15: 2,
    0x16: 1, 0x17: 1, 0x19: 1, 0x1E: 0, 0x1F: 0, 0xAF: 4,
}  # fmt: skip


def frames(payload: bytes) -> Iterator[Frame]:
    """What a packet says of streams."""
    at, size = 0, len(payload)
    while at < size:
        kind, at = number(payload, at)
        if 0x08 <= kind <= 0x0F:
            stream, at = number(payload, at)
            offset, at = number(payload, at) if kind & 4 else (0, at)
            length, at = number(payload, at) if kind & 2 else (size - at, at)
            if at + length > size:
                yield Unread()
                return
            yield Piece(stream, offset, payload[at : at + length], bool(kind & 1))
            at += length
        elif kind in _INTEGERS:
            at = _passed(payload, at, _INTEGERS[kind])
        elif kind in (0x02, 0x03):  # ACK
            at = _passed(payload, at, 2)
            ranges, at = number(payload, at)
            if ranges > size:
                yield Unread()
                return
            at = _passed(payload, at, 1 + 2 * ranges + (3 if kind == 0x03 else 0))
        elif kind == 0x04:
            stream, at = number(payload, at)
            at = _passed(payload, at, 2)
            yield Reset(stream)
        elif kind in (0x06, 0x07, 0x31):  # CRYPTO, NEW_TOKEN, a DATAGRAM with its length
            at = _passed(payload, at, 1 if kind == 0x06 else 0)
            length, at = number(payload, at)
            at += length
        elif kind == 0x18:  # NEW_CONNECTION_ID
            at = _passed(payload, at, 2)
            at += 17 + (payload[at] if at < size else 0)
        elif kind in (0x1A, 0x1B):  # PATH_CHALLENGE, PATH_RESPONSE
            at += 8
        elif kind in (0x1C, 0x1D):
            yield Close()
            return
        elif kind == 0x30:  # a DATAGRAM to the packet's end
            return
        else:
            yield Unread()
            return


def _passed(payload: bytes, at: int, count: int) -> int:
    for _ in range(count):
        if at >= len(payload):
            break
        at += 1 << (payload[at] >> 6)
    return at
