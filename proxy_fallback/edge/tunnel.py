"""A tunnel between two connections: bytes from either end are sent to the other, unread.

An end whose peer does not read pauses the other end. Either direction may end before the other. A
reset on one side becomes a reset on the other. edge.py decides which ends are joined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

# A proxy's answer to our CONNECT, or a client's request: some KB, large cookies some tens.
HEAD_BYTES_MAX = 64 * 1024
# What a client sends before mitmproxy answers, kept for a second try: a ClientHello is 0.3-2 KB.
REPLAY_BYTES_MAX = 64 * 1024
# What ends a TLS handshake is below this; few requests are.
REQUEST_BYTES_MIN = 512
# A half-closed tunnel is closed after the open direction was idle for so long.
HALF_CLOSED_IDLE_S_MAX = 3600.0
UNREAD_BYTES_MAX = 64 * 1024
_TLS_HANDSHAKE = 0x16


class End(asyncio.Protocol):
    """One end of a tunnel: it sends what the other end receives, and pauses it when it must wait.

    `other` is None until the ends are joined; bytes that arrive before that are kept in `early`.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: End | None = None
        self.early = bytearray()
        self.received_bytes = 0
        self.ended = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket's options; asyncio's callback, as those below."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # The kernel notices a peer that vanished; one that is only silent stays connected.
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # asyncio does not set this for sockets accepted on a listener that was handed over.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Pass bytes to the other end, or to `receive_early` while there is none."""
        self.received_bytes += len(data)
        other = self.other
        if other is None:
            self.receive_early(data)
        elif other.transport is not None and not other.lost:
            other.transport.write(data)

    def receive_early(self, data: bytes) -> None:
        """Keep bytes that arrive before there is a tunnel."""
        self.early += data

    def eof_received(self) -> bool:
        """The peer sends no more; the other direction stays open."""
        self.ended = True
        if self.other is not None:
            self.other.end()
        return True

    def end(self) -> None:
        """Close this end for writing, and both when its peer has ended, too."""
        if self.transport is None or self.lost:
            return
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()
        if self.ended:
            self.transport.close()
            if self.other is not None and self.other.transport is not None:
                self.other.transport.close()
        else:
            self._watch_half_closed()

    def _watch_half_closed(self, before: int = -1) -> None:
        """Close a half-closed tunnel if no byte arrived since the last look."""
        if self.lost or self.ended or self.other is None:
            return
        if self.received_bytes == before:
            self.abort()
            return
        loop = asyncio.get_running_loop()
        loop.call_later(HALF_CLOSED_IDLE_S_MAX, self._watch_half_closed, self.received_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other end, too: after what is left to send, or at once on an error."""
        self.lost = True
        unread = self._unread() if exc is not None and self.other is not None else b""
        if unread:
            self.data_received(unread)
        other, self.other = self.other, None
        if other is not None and other.transport is not None and not other.lost:
            if exc is None or unread:
                other.transport.close()  # sends what is left first
            else:
                other.transport.abort()

    def _unread(self) -> bytes:
        """What the peer sent before it broke off, if our write noticed that before our read.

        A client that refuses a certificate says so and resets; its last word must arrive.
        """
        if self.transport is None:
            return b""
        with contextlib.suppress(OSError):
            return os.read(self.transport.get_extra_info("socket").fileno(), UNREAD_BYTES_MAX)
        return b""

    def pause_writing(self) -> None:
        """The peer does not read: pause the other end."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer reads again: resume the other end."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def join(self, other: End) -> None:
        """Join two ends to a tunnel, and pass on what arrived early."""
        self.other, other.other = other, self
        for mine, theirs in ((self, other), (other, self)):
            if mine.transport is None or theirs.transport is None:
                continue
            if mine.early:
                theirs.transport.write(bytes(mine.early))
                mine.early.clear()
            if mine.lost:
                theirs.transport.close()
            elif mine.ended:
                theirs.end()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None and not self.lost:
            self.transport.abort()


class ProxyEnd(End):
    """A far end that is itself a proxy: after its answer to our CONNECT it is a plain end."""

    def __init__(self) -> None:
        super().__init__()
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self, host: str, port: int, header: str = "") -> bool:
        """Request a tunnel to (host, port); returns whether the proxy granted it."""
        assert self.transport is not None
        name = f"[{host}]" if ":" in host else host
        request = f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n{header}\r\n"
        self.transport.write(request.encode())
        await self._answered
        head, found, rest = bytes(self.early).partition(b"\r\n\r\n")
        self.early[:] = rest
        status = head.split(b" ", 2)
        return bool(found) and len(status) > 1 and status[1] == b"200"

    def receive_early(self, data: bytes) -> None:
        """Collect the answer to our CONNECT."""
        self.early += data
        if b"\r\n\r\n" in self.early or len(self.early) > HEAD_BYTES_MAX:
            self._wake()

    def eof_received(self) -> bool:
        """As for End; the wait for an answer ends."""
        self._wake()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As for End; the wait for an answer ends."""
        self._wake()
        super().connection_lost(exc)

    def _wake(self) -> None:
        if not self._answered.done():
            self._answered.set_result(None)


class WorkerEnd(ProxyEnd):
    """The end towards mitmproxy.

    What the client sends is kept until mitmproxy sends its first byte. If mitmproxy disappears
    before that, `on_gone` gets the kept bytes, to send them to the provider directly.
    """

    def __init__(self, on_gone: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_gone = on_gone
        self._unanswered: bytearray | None = bytearray()
        self._asked_bytes: int | None = None  # what the client had sent by mitmproxy's first byte

    def keep(self, data: bytes) -> None:
        """Keep what the client sends while mitmproxy has not answered."""
        if self._unanswered is not None:
            self._unanswered += data
            if len(self._unanswered) > REPLAY_BYTES_MAX:
                self._unanswered = None

    def has_answered_only(self, client: End) -> bool:
        """Whether a client sent no more after mitmproxy's first byte than ends a handshake."""
        asked_bytes = self._asked_bytes
        return asked_bytes is not None and client.received_bytes - asked_bytes < REQUEST_BYTES_MIN

    def data_received(self, data: bytes) -> None:
        """As for End; after mitmproxy's first byte nothing needs to be kept."""
        if self.other is not None:
            self._unanswered = None
            if self._asked_bytes is None:
                self._asked_bytes = self.other.received_bytes
        super().data_received(data)

    def eof_received(self) -> bool:
        """As for End, unless the client is handed back."""
        return not self._hand_back() and super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As for End; the client may be handed back."""
        self._hand_back()
        super().connection_lost(exc)

    def _hand_back(self) -> bool:
        kept, client = self._unanswered, self.other
        self._unanswered = None
        # Only a TLS handshake may be sent twice: a plain request may have been carried out.
        if client is None or client.lost or client.ended or not kept or kept[0] != _TLS_HANDSHAKE:
            return False
        client.other, self.other = None, None
        self._on_gone(bytes(kept))
        return True
