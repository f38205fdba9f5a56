"""TLS secrets: the NSS key log format, from a file or from a pcapng's decryption secrets block.

Holds secrets in memory only for as long as a capture is being read, and writes them nowhere
except, merged, to a private file for tshark (see `pcap.py`). Their values never appear in a
message or in `repr`. Format: https://www.ietf.org/archive/id/draft-ietf-tls-keylogfile-02.html
"""

from __future__ import annotations

import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from capture.packets.input_files import open_file

# One handshake gives at most six lines; 200,000 handshakes are a busy proxy's week.
SECRETS_MAX = 1_200_000
# What is read of one key log: several times what all those lines take.
KEY_LOG_BYTES_MAX = 2 << 30
# A line that is longer is none of ours; the format's longest has 300 bytes.
LINE_BYTES_MAX = 64 << 10
# How long a pipe's writer may say nothing.
PIPE_SECONDS_MAX = 10.0
_READ_BYTES = 1 << 20

_LABELS = (
    "CLIENT_RANDOM",
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET",
    "SERVER_HANDSHAKE_TRAFFIC_SECRET",
    "CLIENT_TRAFFIC_SECRET_0",
    "SERVER_TRAFFIC_SECRET_0",
    "EXPORTER_SECRET",
    "CLIENT_EARLY_TRAFFIC_SECRET",
    "EARLY_EXPORTER_SECRET",
)
_NUMBER_OF = {label.encode(): number for number, label in enumerate(_LABELS)}
_LINE = re.compile(
    rb"^(" + "|".join(_LABELS).encode() + rb")"
    rb"[ \t]+([0-9a-fA-F]{64})[ \t]+([0-9a-fA-F]{2,192})[ \t]*\r?$",
    re.MULTILINE,
)


class KeyLog:
    """Secrets by the client's random; the labels are those of the key log format.

    With `forgets`, the oldest handshakes make room for new ones; else new ones are refused.
    """

    def __init__(self, *, forgets: bool = False) -> None:
        self._forgets = forgets
        # A handshake's secrets in one string, each behind its label's number and its length: a
        # dictionary for every handshake would take four times the memory.
        self._secrets: dict[bytes, bytes] = {}
        self._inner: dict[bytes, bytes] = {}  # by the random of the hello around it
        self._count = 0
        self.refused = 0
        self.seen = 0  # handshakes so far, those that were forgotten included

    def __repr__(self) -> str:
        return f"KeyLog({len(self._secrets)} handshakes)"

    def __len__(self) -> int:
        return len(self._secrets)

    def __contains__(self, client_random: bytes) -> bool:
        return client_random in self._secrets

    def add(self, text: bytes | memoryview, tell: Callable[[bytes], object] | None = None) -> int:
        """Take every secret in key log `text`; lines that are none are passed over.

        `tell` is called with each line that was not known. Returns the number of secrets found,
        so that 0 means that the file is no key log; those past `SECRETS_MAX` are `refused`.
        """
        found = 0
        for match in _LINE.finditer(text):
            label, random, secret = match.groups()
            if len(secret) % 2:
                continue
            found += 1
            random, secret = bytes.fromhex(random.decode()), bytes.fromhex(secret.decode())
            known, number = self._secrets.get(random, b""), _NUMBER_OF[label]
            before = dict(_secrets_of(known))
            if before.get(number) == secret:
                continue
            if self._count >= SECRETS_MAX and not self._forgot(random):
                self.refused += 1
                continue
            self._count += 1
            self.seen += random not in self._secrets
            if number in before:  # the last one counts
                known = b"".join(_packed(n, s) for n, s in before.items() if n != number)
            self._secrets[random] = known + _packed(number, secret)
            if tell is not None:
                tell(_line(number, random, secret))
        return found

    def _forgot(self, kept: bytes) -> bool:
        """Whether an older handshake than that of `kept` made room."""
        oldest = next(iter(self._secrets), kept)
        if not self._forgets or oldest == kept:
            return False
        self._count -= sum(1 for _ in _secrets_of(self._secrets.pop(oldest)))
        self._inner.pop(oldest, None)
        return True

    def secret(self, client_random: bytes, label: str) -> bytes | None:
        """One secret, or None."""
        number = _NUMBER_OF[label.encode()]
        return dict(_secrets_of(self._secrets.get(client_random, b""))).get(number)

    def newest_first(self) -> Iterator[bytes]:
        """The client randoms known, oldest last; secrets may not come meanwhile."""
        return reversed(self._secrets)

    def handshakes(self, first: int = 0) -> list[bytes]:
        """The client randoms known, newest last, but those from number `first` on before others.

        A copy, as another thread may add secrets while it is gone through.
        """
        known = list(self._secrets)
        return known[first:] + known[:first]

    def lines_of(self, client_random: bytes) -> bytes:
        """One handshake's secrets in key log format."""
        secrets = _secrets_of(self._secrets.get(client_random, b""))
        return b"".join(_line(number, client_random, secret) for number, secret in secrets)

    def inner(self, client_random: bytes) -> bytes:
        """The random of the hello that is hidden in this one; its own where none is."""
        return self._inner.get(client_random, client_random)

    def also(self, client_random: bytes, other: bytes) -> None:
        """One handshake's secrets are those of another hello, too, in which its own is hidden."""
        lines = self.lines_of(client_random)
        self._inner[other] = client_random
        self.add(lines.replace(client_random.hex().encode(), other.hex().encode()))

    def lines(self) -> Iterator[bytes]:
        """Everything in key log format, for a private file."""
        for random, secrets in self._secrets.items():
            for number, secret in _secrets_of(secrets):
                yield _line(number, random, secret)


def _packed(number: int, secret: bytes) -> bytes:
    return bytes((number, len(secret))) + secret


def _secrets_of(packed: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(packed):
        end = at + 2 + packed[at + 1]
        yield packed[at], packed[at + 2 : end]
        at = end


def _line(number: int, random: bytes, secret: bytes) -> bytes:
    return f"{_LABELS[number]} {random.hex()} {secret.hex()}\n".encode()


def read_key_log(path: Path, keys: KeyLog) -> str | None:
    """Add a key log file's secrets to `keys`; None, or a clause about what was not read.

    A pipe is read, too (`--keys <(ssh host cat sslkeys.log)`), for as long as something comes.
    """
    found, refused = 0, keys.refused
    try:
        with open_file(path, pipe=True) as file:
            pieces = _Pieces(file)
            for piece in pieces:
                found += keys.add(piece)
    except OSError as error:
        return error.strerror or str(error)
    if pieces.stopped is not None:
        return pieces.stopped
    if not found:
        return "holds no TLS secrets (NSS key log format)"
    if keys.refused > refused:
        return f"{keys.refused - refused:,} secrets were not read: only {SECRETS_MAX:,} are kept"
    return None


class _Pieces:
    """A key log in pieces that end with a line; lines without end are left out."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.stopped: str | None = None

    def __iter__(self) -> Iterator[bytes]:
        left, rest, inside_long = KEY_LOG_BYTES_MAX, b"", False
        while data := self._read():
            left -= len(data)
            if left < 0:
                self.stopped = f"was read for its first {KEY_LOG_BYTES_MAX >> 20:,} MB only"
                break
            lines, newline, end = data.rpartition(b"\n")
            if newline:
                yield lines.partition(b"\n")[2] if inside_long else rest + lines
                rest, inside_long = end, False
            elif not inside_long:
                rest += end
            if len(rest) > LINE_BYTES_MAX:
                rest, inside_long = b"", True
        yield rest

    def _read(self) -> bytes:
        waiting = select.poll()
        waiting.register(self._file, select.POLLIN)
        if not waiting.poll(PIPE_SECONDS_MAX * 1000):
            self.stopped = f"is a pipe through which nothing came for {PIPE_SECONDS_MAX:.0f} s"
            return b""
        return self._file.read(_READ_BYTES) or b""
