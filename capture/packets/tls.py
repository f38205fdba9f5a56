"""TLS from outside: record boundaries, the two hellos, and decryption where tshark must give up.

tshark decrypts what is whole (see `pcap.py`). After a hole its record counters are off and it
never recovers; `Opener` does: it tries the next record numbers until the tag verifies, which
proves both the key and how many records are missing. It opens TLS 1.3 and the AEAD suites of
TLS 1.2; CBC suites stay with tshark. Nothing here keeps plaintext or prints a secret.
RFC 8446 (section 5.2 records, 7.1 keys), RFC 5246 and 5288, RFC 7905.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from capture.packets.keylog import KeyLog

RECORD_BYTES_MAX = 16_384 + 2_048  # RFC 5246 6.2.3; TLS 1.3 allows 256 instead of 2,048
CHANGE_CIPHER_SPEC, HANDSHAKE, APPLICATION = 20, 22, 23

# Record numbers tried ahead of the last one known, after a hole.
LOST_RECORDS_MAX = 4_096
# Record numbers in front that may have been handshake under other keys.
HANDSHAKE_RECORDS_MAX = 24
# For a connection joined in its middle: secrets and record numbers tried per direction.
TRIAL_SECRETS_MAX = 64
TRIAL_RECORDS_MAX = 2_048
# The smallest encrypted records make the cheapest trials.
TRIAL_BYTES_MAX = 4_096
# Failed searches after which a direction is left alone.
FAILED_SEARCHES_MAX = 8

# What a server name is made of (RFC 6066, section 3); anything else is for no eye and no terminal.
_SERVER_NAME = re.compile(rb"[A-Za-z0-9._-]{1,255}")
_ENCRYPTED_HELLO = 0xFE0D  # its first byte: 0 in the hello on the wire (RFC 9849, 5)
_RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")


# --- hellos -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What is taken from a ClientHello: its random, the server name (SNI) where given, the session
    id; whether another hello may be inside (ECH)."""

    random: bytes
    server_name: str | None
    session: bytes = b""
    may_be_outer: bool = False


@dataclass(frozen=True, slots=True)
class ServerHello:
    """What is taken from a ServerHello; `version` is 0x0303 or 0x0304."""

    random: bytes
    suite: int
    version: int
    session: bytes = b""

    def resumes(self, session: bytes) -> bool:
        """Whether TLS 1.2 goes on with a master secret of before: the client's session id comes
        back (RFC 5246, 7.3; RFC 5077, 3.4)."""
        return self.version == 0x0303 and self.session == session != b""


def client_hello(message: bytes) -> ClientHello | None:
    """Parse a ClientHello handshake message, its 4-byte header included."""
    try:
        if message[0] != 1:
            return None
        random = message[6:38]
        at = 39 + message[38]
        session = message[39:at]
        at += 2 + int.from_bytes(message[at : at + 2])
        at += 1 + message[at]
        name, outer = None, False
        for kind, body in _extensions(message, at):
            outer = outer or (kind == _ENCRYPTED_HELLO and body[:1] == b"\0")
            if kind == 0 and len(body) > 5 and body[2] == 0:
                name_bytes = body[5 : 5 + int.from_bytes(body[3:5])]
                name = name_bytes.decode().lower() if _SERVER_NAME.fullmatch(name_bytes) else None
        return ClientHello(random, name, session, outer) if len(random) == 32 else None
    except IndexError:
        return None


def server_hello(message: bytes) -> ServerHello | None:
    """Parse a ServerHello; None also for a HelloRetryRequest, which another one follows."""
    try:
        if message[0] != 2 or message[6:38] == _RETRY:
            return None
        at = 39 + message[38]
        session = message[39:at]
        suite = int.from_bytes(message[at : at + 2])
        version = int.from_bytes(message[4:6])
        for kind, body in _extensions(message, at + 3):
            if kind == 43 and len(body) == 2:
                version = int.from_bytes(body)
        return ServerHello(message[6:38], suite, version, session)
    except IndexError:
        return None


def _extensions(message: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    end = min(len(message), at + 2 + int.from_bytes(message[at : at + 2]))
    at += 2
    while at + 4 <= end:
        kind, length = struct.unpack_from("!HH", message, at)
        yield kind, message[at + 4 : at + 4 + length]
        at += 4 + length


# --- records ----------------------------------------------------------------------------------


def plausible_header(data: bytes | bytearray, at: int) -> bool:
    """Whether five bytes at `at` can be a TLS record's header."""
    return (
        20 <= data[at] <= 24
        and data[at + 1] == 3
        and data[at + 2] <= 4
        and (data[at + 3] << 8 | data[at + 4]) <= RECORD_BYTES_MAX
    )


@dataclass(frozen=True, slots=True)
class Key:
    """One direction's AEAD under one secret. `explicit` is the nonce's length on the wire."""

    suite: int
    aead: object
    iv: bytes
    tls13: bool
    explicit: int

    @property
    def overhead(self) -> int:
        """Bytes that a record is longer than its plaintext, header included."""
        return 5 + 16 + (1 if self.tls13 else self.explicit)

    def open(self, record: bytes, number: int) -> tuple[int, bytes] | None:
        """Decrypt a whole record as the `number`th under this key: (inner type, plaintext)."""
        from cryptography.exceptions import InvalidTag

        head, body = record[:5], record[5:]
        if len(body) < 17 + self.explicit:
            return None
        if self.explicit:
            nonce = self.iv + body[:8]
            body = body[8:]
        else:
            nonce = (int.from_bytes(self.iv) ^ number).to_bytes(12)
        extra = head
        if not self.tls13:
            extra = struct.pack("!Q", number) + head[:3] + struct.pack("!H", len(body) - 16)
        try:
            plain: bytes = self.aead.decrypt(nonce, body, extra)  # type: ignore[attr-defined]  # two AEAD classes, one shape
        except InvalidTag:
            return None
        if not self.tls13:
            return head[0], plain
        plain = plain.rstrip(b"\0")
        return (plain[-1], plain[:-1]) if plain else None


_GCM128 = {0x1301, 0x009C, 0x009E, 0xC02B, 0xC02F}
_GCM256 = {0x1302, 0x009D, 0x009F, 0xC02C, 0xC030}
_CHACHA = {0x1303, 0xCCA8, 0xCCA9, 0xCCAA}
_CCM = {0x1304}
# TLS 1.3's suites by the length of their secrets. Hardly anyone speaks CCM: it is not guessed.
_SUITES13 = {48: (0x1302,), 32: (0x1301, 0x1303)}


def _aead(suite: int, key: bytes) -> object:
    from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

    if suite in _CHACHA:
        return ChaCha20Poly1305(key)
    return AESCCM(key) if suite in _CCM else AESGCM(key)


def expand_label(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446, 7.1); a secret is as long as its hash."""
    from cryptography.hazmat.primitives.hashes import SHA256, SHA384
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

    full = b"tls13 " + label
    info = struct.pack("!HB", length, len(full)) + full + b"\0"
    return HKDFExpand(SHA384() if len(secret) == 48 else SHA256(), length, info).derive(secret)


def key13(secret: bytes, suite: int) -> Key:
    """The record key of a TLS 1.3 traffic secret."""
    raw = expand_label(secret, b"key", 16 if suite in (0x1301, 0x1304) else 32)
    return Key(suite, _aead(suite, raw), expand_label(secret, b"iv", 12), True, 0)


def updated(secret: bytes) -> bytes:
    """The traffic secret after a KeyUpdate."""
    return expand_label(secret, b"traffic upd", len(secret))


def suites(secret: bytes, suite: int | None) -> tuple[int, ...]:
    """TLS 1.3's suites that a secret can be of, by its length; `suite` is the one agreed on."""
    possible = _SUITES13.get(len(secret), ())
    if suite is None:
        return possible
    return (suite,) if suite in possible or suite in _CCM else ()


def keys12(master: bytes, client_random: bytes, hello: ServerHello) -> tuple[Key, Key] | None:
    """(client's, server's) record keys of a TLS 1.2 AEAD suite; None for other suites."""
    import hashlib
    import hmac

    suite = hello.suite
    if suite not in _GCM128 | _GCM256 | _CHACHA:
        return None
    size, fixed = (16 if suite in _GCM128 else 32), (12 if suite in _CHACHA else 4)
    digest = hashlib.sha384 if suite in _GCM256 else hashlib.sha256
    seed = b"key expansion" + hello.random + client_random
    block, link = b"", seed
    while len(block) < 2 * (size + fixed):
        link = hmac.new(master, link, digest).digest()
        block += hmac.new(master, link + seed, digest).digest()
    explicit = 0 if fixed == 12 else 8
    ivs = block[2 * size :]
    return (
        Key(suite, _aead(suite, block[:size]), ivs[:fixed], False, explicit),
        Key(suite, _aead(suite, block[size : 2 * size]), ivs[fixed : 2 * fixed], False, explicit),
    )


class Opener:
    """Decrypts one direction record by record, and finds its place again after a hole."""

    def __init__(self, candidates: Iterable[tuple[bytes | None, Key]]) -> None:
        """`candidates`: keys to try, each with its TLS 1.3 secret (None: TLS 1.2)."""
        self._candidates = list(candidates)
        self._current: tuple[bytes | None, Key] | None = None
        self._failures = 0
        self.random_of: dict[bytes, bytes] = {}  # by secret, where a handshake is being guessed

    def __len__(self) -> int:
        return len(self._candidates)

    @property
    def tls13(self) -> bool:
        """Whether the keys are TLS 1.3's, where encrypted records all look like data."""
        return bool(self._candidates) and self._candidates[0][1].tls13

    @property
    def hopeless(self) -> bool:
        """True when no key fits, or too many long searches have failed."""
        return not self._candidates or self._failures >= FAILED_SEARCHES_MAX

    @property
    def key(self) -> Key | None:
        """The key that was proven, if one was."""
        return self._current[1] if self._current else None

    @property
    def secret(self) -> bytes | None:
        """The TLS 1.3 secret that was proven, if one was."""
        return self._current[0] if self._current else None

    @property
    def overhead(self) -> int | None:
        """Bytes that a record is longer than its plaintext; None without any key."""
        return self._candidates[0][1].overhead if self._candidates else None

    def open(self, record: bytes, numbers: range) -> tuple[int, bytes, int] | None:
        """Open a record whose number is among `numbers`: (type, plaintext, number)."""
        for candidate in [self._current] if self._current else self._candidates:
            for number in numbers:
                opened = candidate[1].open(record, number)
                if opened is not None:
                    self._current, self._failures = candidate, 0
                    return *opened, number
        return self._open_updated(record) if len(numbers) > HANDSHAKE_RECORDS_MAX + 1 else None

    def advance(self) -> None:
        """A KeyUpdate was read: the next record is number 0 under the next secret."""
        if self._current is not None and self._current[0] is not None:
            self._current = self._following(self._current)

    def _open_updated(self, record: bytes) -> tuple[int, bytes, int] | None:
        """Perhaps a KeyUpdate was in the hole: the next secret, from number 0."""
        self._failures += 1
        if self._current is None or self._current[0] is None:
            return None
        following = self._following(self._current)
        for number in range(HANDSHAKE_RECORDS_MAX):
            opened = following[1].open(record, number)
            if opened is not None:
                self._current, self._failures = following, 0
                return *opened, number
        return None

    @staticmethod
    def _following(current: tuple[bytes | None, Key]) -> tuple[bytes, Key]:
        assert current[0] is not None
        secret = updated(current[0])
        return secret, key13(secret, current[1].suite)


def opener(
    keys: KeyLog, client_random: bytes, hello: ServerHello | None, *, sent: bool
) -> Opener | None:
    """An `Opener` for one direction of a connection whose ClientHello was seen; None: no key."""
    secret = keys.secret(client_random, _traffic(sent))
    if secret is not None and (hello is None or hello.version == 0x0304):
        possible = suites(secret, hello.suite if hello else None)
        return Opener((secret, key13(secret, suite)) for suite in possible)
    master = keys.secret(client_random, "CLIENT_RANDOM")
    if master is not None and hello is not None:
        pair = keys12(master, client_random, hello)
        return Opener([(None, pair[0 if sent else 1])]) if pair else None
    return None


def early_opener(keys: KeyLog, client_random: bytes) -> Opener | None:
    """An `Opener` for a client's early data; None: it has no key for any."""
    secret = keys.secret(client_random, "CLIENT_EARLY_TRAFFIC_SECRET")
    if secret is None:
        return None
    return Opener((secret, key13(secret, suite)) for suite in suites(secret, None))


def trial_opener(keys: KeyLog, used: set[bytes], first: int, *, sent: bool) -> Opener:
    """An `Opener` over TLS 1.3 secrets in the log that no connection has claimed.

    At most `TRIAL_SECRETS_MAX` of them, from handshake number `first` on; `used` are the client
    randoms that were claimed.
    """
    candidates: list[tuple[bytes, Key]] = []
    random_of: dict[bytes, bytes] = {}
    for random in keys.handshakes(first):
        secret = keys.secret(random, _traffic(sent)) if random not in used else None
        if secret is None:
            continue
        random_of[secret] = random
        candidates += [(secret, key13(secret, suite)) for suite in suites(secret, None)]
        if len(candidates) >= TRIAL_SECRETS_MAX:
            break
    trial = Opener(candidates)
    trial.random_of = random_of
    return trial


def _traffic(sent: bool) -> str:
    return "CLIENT_TRAFFIC_SECRET_0" if sent else "SERVER_TRAFFIC_SECRET_0"
