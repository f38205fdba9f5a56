"""The server name that a client shows as it begins TLS: what everybody on its way can read.

It knows no sockets and keeps no more than the ClientHello. edge.py holds the name against the
providers' and forgets all others. RFC 8446 (4.1.2 ClientHello, 5.1 records), RFC 6066 (3).
"""

from __future__ import annotations

from collections.abc import Iterator

HELLO_BYTES_MAX = 16 * 1024
_RECORD_HEAD_BYTES = 5
_HANDSHAKE = b"\x16\x03"  # its kind, and the major version of all TLS
_CLIENT_HELLO = 1
_SERVER_NAME = 0
_NAME_BYTES_MAX = 255


class BegunTls:
    """What a client has sent so far of its ClientHello. `done`: there is no more to learn."""

    __slots__ = ("_head", "_left", "_message", "_seen_bytes", "done")

    def __init__(self) -> None:
        self._head = bytearray()  # of the record that begins
        self._left = 0  # bytes of the record that has begun
        self._message = bytearray()
        self._seen_bytes = 0
        self.done = False

    def feed(self, data: bytes) -> str | None:
        """The server name, once it is known; None before that, and where there is none."""
        data = data[: HELLO_BYTES_MAX - self._seen_bytes]
        self._seen_bytes += len(data)
        at = 0
        while at < len(data) and not self.done and not _is_whole(self._message):
            at += self._take(data[at:])
        if self.done or not _is_whole(self._message):
            self.done = self.done or self._seen_bytes >= HELLO_BYTES_MAX
            return None
        self.done = True
        return _server_name(bytes(self._message))

    def _take(self, data: bytes) -> int:
        """Take what belongs to one record's head, or to its content; how much that was."""
        if self._left:
            taken = data[: self._left]
            self._left -= len(taken)
            self._message += taken
            self.done = self._message[0] != _CLIENT_HELLO
        else:
            taken = data[: _RECORD_HEAD_BYTES - len(self._head)]
            self._head += taken
            self.done = not _HANDSHAKE.startswith(self._head[:2])
            if len(self._head) == _RECORD_HEAD_BYTES:
                self._left = int.from_bytes(self._head[3:])
                self._head.clear()
        return len(taken)


def _is_whole(message: bytearray) -> bool:
    return len(message) >= 4 and len(message) >= 4 + int.from_bytes(message[1:4])


def _server_name(message: bytes) -> str | None:
    """The first host name of a whole ClientHello."""
    try:
        at = 39 + message[38]  # type and length, version, random; the session id
        at += 2 + int.from_bytes(message[at : at + 2])
        at += 1 + message[at]
        for kind, body in _extensions(message, at + 2):
            if kind == _SERVER_NAME and body[2:3] == b"\0":
                name = body[5 : 5 + int.from_bytes(body[3:5])]
                return name.decode("ascii") if 0 < len(name) <= _NAME_BYTES_MAX else None
    except (IndexError, UnicodeDecodeError):
        pass
    return None


def _extensions(message: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= len(message):
        end = at + 4 + int.from_bytes(message[at + 2 : at + 4])
        yield int.from_bytes(message[at : at + 2]), message[at + 4 : end]
        at = end
