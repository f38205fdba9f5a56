"""A tunnel between two connections: what one end says the other hears, until both have ended.

Bytes pass as they come, in their order, and nothing is looked into. An end whose peer does not
read holds the other back; either direction may end before the other; a reset on one side is one on
the other. Which ends are joined is edge.py's to decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

# A proxy's answer to our CONNECT, or a client's request: some KB, large cookies some tens.
HEAD_BYTES_MAX = 64 * 1024
# What a client says before mitmproxy answers, kept to be said again: a ClientHello is 0.3-2 KB.
REPLAY_BYTES_MAX = 64 * 1024
# A tunnel of which one end has said its last, and in which the other has said nothing for so long.
HALF_CLOSED_IDLE_S_MAX = 3600.0
_TLS_HANDSHAKE = 0x16


class End(asyncio.Protocol):
    """One end of a tunnel: what it receives, the other end sends; when it waits, so does the other.

    `other` is None until the tunnel is made; what comes before that is kept in `early`.
    """

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: End | None = None
        self.early = bytearray()
        self.received_bytes = 0
        self.ended = False
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection stands."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # A peer that vanished without a word is noticed by the kernel; a silent one is left alone.
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # asyncio sees to this itself, but not for sockets accepted on one that was handed over.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Bytes came: for the other end, or while there is none for `hear`."""
        self.received_bytes += len(data)
        other = self.other
        if other is None:
            self.hear(data)
        elif other.transport is not None and not other.lost:
            other.transport.write(data)

    def hear(self, data: bytes) -> None:
        """Take bytes that came before there is a tunnel."""
        self.early += data

    def eof_received(self) -> bool:
        """The peer has said its last; the other direction goes on."""
        self.ended = True
        if self.other is not None:
            self.other.end()
        return True

    def end(self) -> None:
        """Nothing more will be sent to this end."""
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
        """Close a tunnel that nobody has used for long since its other end said its last."""
        if self.lost or self.ended or self.other is None:
            return
        if self.received_bytes == before:
            self.abort()
            return
        loop = asyncio.get_running_loop()
        loop.call_later(HALF_CLOSED_IDLE_S_MAX, self._watch_half_closed, self.received_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, and so is its other end."""
        self.lost = True
        other, self.other = self.other, None
        if other is not None and other.transport is not None and not other.lost:
            if exc is None:
                other.transport.close()  # after what is still to be sent
            else:
                other.transport.abort()

    def pause_writing(self) -> None:
        """The peer does not read: the other end waits."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def join(self, other: End) -> None:
        """Make a tunnel of two ends, and pass on what came early."""
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
    """A far end that is itself a proxy: its answer to our CONNECT is awaited, then a plain end."""

    def __init__(self) -> None:
        super().__init__()
        self._heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def connect(self, host: str, port: int, header: str = "") -> bool:
        """Ask for a tunnel to (host, port); whether it was given."""
        assert self.transport is not None
        name = f"[{host}]" if ":" in host else host
        request = f"CONNECT {name}:{port} HTTP/1.1\r\nHost: {name}:{port}\r\n{header}\r\n"
        self.transport.write(request.encode())
        await self._heard
        head, found, rest = bytes(self.early).partition(b"\r\n\r\n")
        self.early[:] = rest
        status = head.split(b" ", 2)
        return bool(found) and len(status) > 1 and status[1] == b"200"

    def hear(self, data: bytes) -> None:
        """Take the answer to our CONNECT."""
        self.early += data
        if b"\r\n\r\n" in self.early or len(self.early) > HEAD_BYTES_MAX:
            self._wake()

    def eof_received(self) -> bool:
        """As for End; no answer will come."""
        self._wake()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As for End; no answer will come."""
        self._wake()
        super().connection_lost(exc)

    def _wake(self) -> None:
        if not self._heard.done():
            self._heard.set_result(None)


class WorkerEnd(ProxyEnd):
    """The end towards mitmproxy. Until it says its first byte, what the client said is kept; when
    it is gone before that, `on_gone` has it said again, to the provider itself.
    """

    def __init__(self, on_gone: Callable[[bytes], None]) -> None:
        super().__init__()
        self._on_gone = on_gone
        self._said: bytearray | None = bytearray()

    def keep(self, data: bytes) -> None:
        """The client says this, and may have no answer yet."""
        if self._said is not None:
            self._said += data
            if len(self._said) > REPLAY_BYTES_MAX:
                self._said = None

    def data_received(self, data: bytes) -> None:
        """As for End; once it has spoken nothing is said again."""
        if self.other is not None:
            self._said = None
        super().data_received(data)

    def eof_received(self) -> bool:
        """As for End, unless the client is given back."""
        return not self._given_back() and super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """As for End; the client may be given back."""
        self._given_back()
        super().connection_lost(exc)

    def _given_back(self) -> bool:
        said, client = self._said, self.other
        self._said = None
        # Only a TLS handshake may be said twice: a plain request may have been carried out.
        if client is None or client.lost or client.ended or not said or said[0] != _TLS_HANDSHAKE:
            return False
        client.other, self.other = None, None
        self._on_gone(bytes(said))
        return True
