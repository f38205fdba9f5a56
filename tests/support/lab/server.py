"""The lab's TLS server: every provider's name on one port, HTTP/1.1, HTTP/2 and WebSocket.

`answers.py` says what is answered; this file frames it, paces it, and writes the ledger: one JSON
line for each exchange whose last byte was handed to TLS (`done`), or that the client left
(`aborted`). It is a test's server: it trusts its clients and has no limits but `BODY_BYTES_MAX`.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import re
import secrets
import ssl
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import wsproto
import wsproto.events
import zstandard
from wsproto.extensions import PerMessageDeflate

from tests.support.lab.answers import (
    Answer,
    answer,
    limit_event,
    responses_entry,
    responses_turn,
)
from tests.support.lab.scenario import scenario_of

BODY_BYTES_MAX = 64 << 20
_GZIP_FROM_BYTES = 200


class Ledger:
    """The truth, appended to a file: what was answered, in the order it was finished."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._run = secrets.token_hex(4)
        self._serials = itertools.count()

    def serial(self) -> str:
        """A number that no other exchange of any lab has."""
        return f"lab{self._run}{next(self._serials):08d}"

    def write(
        self, served: dict[str, Any] | None, state: str, http: str, said: dict[str, Any]
    ) -> None:
        """Note that an exchange ended, and what its request `said` of who asks."""
        if served is not None:
            entry = {"streaming": False} | served | {"state": state, "http": http, "said": said}
            os.write(self._fd, json.dumps(entry).encode() + b"\n")


_SAYS_WHO = re.compile(r"user-agent|originator|session|thread|turn|prompt|agent|class|retry")
_SAYS_WHO_IN_BODY = ("metadata", "client_metadata", "prompt_cache_key", "user_prompt_id", "request")


def said_by(headers: dict[str, str], body: bytes | str) -> dict[str, Any]:
    """What a request says of who asks, as it stands there: headers, and fields of its body."""
    try:
        asked = json.loads(body)
    except ValueError:
        asked = None
    asked = asked if isinstance(asked, dict) else {}
    found = {name: asked[name] for name in _SAYS_WHO_IN_BODY if name in asked}
    if "request" in found:  # Code Assist's: the rest of it is content
        found["request"] = {"session_id": (found["request"] or {}).get("session_id")}
    return {**{n: v for n, v in headers.items() if _SAYS_WHO.search(n)}, "body": found}


class Server:
    """Answers on the given port of loopback until the loop ends."""

    def __init__(self, ledger: Ledger, context: ssl.SSLContext) -> None:
        self._ledger = ledger
        self._context = context

    async def listen(self, port: int) -> None:
        """Start to listen."""
        await asyncio.start_server(
            self._connected, "127.0.0.1", port, ssl=self._context, backlog=512, limit=BODY_BYTES_MAX
        )

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            tls = writer.get_extra_info("ssl_object")
            if tls is not None and tls.selected_alpn_protocol() == "h2":
                await _Http2(self._ledger, reader, writer).serve()
            else:
                await _serve_http1(self._ledger, reader, writer)
        except (OSError, asyncio.IncompleteReadError, h2.exceptions.ProtocolError):
            pass  # the client left: what was cut off is in the ledger as aborted
        finally:
            writer.close()


# --- HTTP/1.1 -----------------------------------------------------------------------------------


async def _serve_http1(
    ledger: Ledger, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    while head := await _read_head(reader):
        method, target, headers = head
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, headers)
        path, _, query = target.partition("?")
        host = headers.get("host", "").partition(":")[0]
        if headers.get("upgrade", "").lower() == "websocket":
            await _serve_websocket(ledger, reader, writer, host, target, headers)
            return
        made = answer(host, path, query, body or target.encode(), ledger.serial())
        gzips = "gzip" in headers.get("accept-encoding", "")
        await _write_http1(ledger, writer, made, method, gzips, said_by(headers, body))
        if headers.get("connection", "").lower() == "close":
            return


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]] | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    lines = raw.decode("latin-1").split("\r\n")
    method, target, version = lines[0].split(" ", 2)
    pairs = (line.partition(":") for line in lines[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    return method, target, headers


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", ""):
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return body
    return await reader.readexactly(int(headers.get("content-length", 0)))


async def _write_http1(
    ledger: Ledger,
    writer: asyncio.StreamWriter,
    made: Answer,
    method: str,
    gzips: bool,
    said: dict[str, Any],
) -> None:
    head = [f"HTTP/1.1 {made.status} Lab", f"content-type: {made.content_type}"]
    head += [f"{name}: {value}" for name, value in made.headers]
    try:
        if made.streaming:
            pieces, coding = _coded(made)
            head += ["transfer-encoding: chunked", *(f"{n}: {v}" for n, v in coding)]
            writer.write("\r\n".join((*head, "", "")).encode())
            for number, piece in enumerate(pieces, 1):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                await _pace(writer, made)
                if number == made.cut:
                    raise ConnectionResetError
            writer.write(b"0\r\n\r\n")
        else:
            (body,), coding = _coded(replace(made, pieces=(b"".join(made.pieces),)))
            head += [f"{name}: {value}" for name, value in coding]
            if gzips and not coding and len(body) > _GZIP_FROM_BYTES:
                body = gzip.compress(body, 1)
                head.append("content-encoding: gzip")
            head.append(f"content-length: {len(body)}")
            payload = b"" if method == "HEAD" else body
            writer.write("\r\n".join((*head, "", "")).encode() + payload)
        await writer.drain()
    except OSError:
        ledger.write(made.served, "aborted", "http/1.1", said)
        raise
    ledger.write(made.served, "done", "http/1.1", said)


def _coded(made: Answer) -> tuple[tuple[bytes, ...], list[tuple[str, str]]]:
    """The pieces in the content coding that was asked for, and the header that says so."""
    if not made.coding:
        return made.pieces, []
    engine: Any
    if made.coding == "br":
        engine = brotli.Compressor()
        pieces = [engine.process(piece) + engine.flush() for piece in made.pieces]
        end = engine.finish()
    elif made.coding == "zstd":
        engine = zstandard.ZstdCompressor().compressobj()
        block = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        pieces = [engine.compress(piece) + engine.flush(block) for piece in made.pieces]
        end = engine.flush()
    else:
        engine = zlib.compressobj(wbits=31)
        pieces = [engine.compress(p) + engine.flush(zlib.Z_SYNC_FLUSH) for p in made.pieces]
        end = engine.flush()
    pieces[-1] += end
    return tuple(pieces), [("content-encoding", made.coding)]


async def _pace(writer: asyncio.StreamWriter, made: Answer) -> None:
    await writer.drain()
    if writer.is_closing():
        raise ConnectionResetError
    if made.delay_ms:
        await asyncio.sleep(made.delay_ms / 1000)


# --- HTTP/2 -------------------------------------------------------------------------------------


class _Http2:
    """One HTTP/2 connection; each request is answered by a task, so streams interleave."""

    def __init__(
        self, ledger: Ledger, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        self._ledger = ledger
        self._reader = reader
        self._writer = writer
        self._requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        self._window_opened = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        self._h2.initiate_connection()
        self._flush()
        try:
            while data := await self._reader.read(65536):
                for event in self._h2.receive_data(data):
                    self._handle(event)
                self._flush()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self._requests[event.stream_id] = (dict(event.headers), bytearray())  # type: ignore[arg-type]
        elif isinstance(event, h2.events.DataReceived):
            self._requests[event.stream_id][1].extend(event.data)
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.WindowUpdated | h2.events.RemoteSettingsChanged):
            self._window_opened.set()
        elif isinstance(event, h2.events.StreamEnded):
            headers, body = self._requests.pop(event.stream_id)
            task = asyncio.create_task(self._answer(event.stream_id, headers, bytes(body)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, stream: int, headers: dict[str, str], body: bytes) -> None:
        path, _, query = headers[":path"].partition("?")
        host = headers[":authority"].partition(":")[0]
        made = answer(host, path, query, body or headers[":path"].encode(), self._ledger.serial())
        pieces, coding = _coded(made)
        extra = [*made.headers, *coding]
        if (
            not made.streaming
            and not coding
            and "gzip" in headers.get("accept-encoding", "")
            and len(pieces[0]) > _GZIP_FROM_BYTES
        ):
            pieces = (gzip.compress(pieces[0], 1),)
            extra.append(("content-encoding", "gzip"))
        try:
            head = [(":status", str(made.status)), ("content-type", made.content_type), *extra]
            self._h2.send_headers(stream, head)
            for number, piece in enumerate(pieces, 1):
                await self._send(stream, piece)
                if made.streaming:
                    await _pace(self._writer, made)
                if number == made.cut:
                    self._h2.reset_stream(stream)
                    self._flush()
                    raise ConnectionResetError
            if made.trailers:
                self._h2.send_headers(stream, made.trailers, end_stream=True)
            else:
                self._h2.end_stream(stream)
            self._flush()
            await self._writer.drain()
        except (OSError, h2.exceptions.ProtocolError, asyncio.CancelledError):
            self._ledger.write(made.served, "aborted", "http/2", said_by(headers, body))
            return
        self._ledger.write(made.served, "done", "http/2", said_by(headers, body))

    async def _send(self, stream: int, piece: bytes) -> None:
        while piece:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                self._window_opened.clear()
                self._flush()
                await self._window_opened.wait()
                continue
            self._h2.send_data(stream, piece[:room])
            piece = piece[room:]
            self._flush()
            await self._writer.drain()


# --- WebSocket ----------------------------------------------------------------------------------


async def _serve_websocket(
    ledger: Ledger,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    host: str,
    target: str,
    headers: dict[str, str],
) -> None:
    """The Responses API over a WebSocket: each `response.create` is one turn."""
    socket = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    socket.receive_data(f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode())
    heard = ""
    while True:
        for event in socket.events():
            if isinstance(event, wsproto.events.Request):
                accept = wsproto.events.AcceptConnection(extensions=[PerMessageDeflate()])
                writer.write(socket.send(accept))
            elif isinstance(event, wsproto.events.TextMessage):
                heard += event.data
                if event.message_finished:
                    await _turn(ledger, writer, socket, host, heard, said_by(headers, heard))
                    heard = ""
            elif isinstance(event, wsproto.events.Ping):
                writer.write(socket.send(event.response()))
            elif isinstance(event, wsproto.events.CloseConnection):
                writer.write(socket.send(event.response()))
                await writer.drain()
                return
        await writer.drain()
        data = await reader.read(65536)
        if not data:
            return
        socket.receive_data(data)


async def _turn(
    ledger: Ledger,
    writer: asyncio.StreamWriter,
    socket: wsproto.WSConnection,
    host: str,
    heard: str,
    said: dict[str, Any],
) -> None:
    asked = json.loads(heard)
    if asked.get("type") != "response.create":
        return
    scenario = scenario_of(heard.encode())
    model = str(asked.get("model") or asked.get("response", {}).get("model"))
    serial = f"lab{scenario.serial}" if scenario.serial else ledger.serial()
    limits = limit_event(scenario)
    for event in [*([limits] if limits else []), *responses_turn(model, scenario, serial)]:
        writer.write(socket.send(wsproto.events.TextMessage(json.dumps(event))))
        await writer.drain()
        if scenario.delay_ms:
            await asyncio.sleep(scenario.delay_ms / 1000)
    served = responses_entry(host, model, scenario, serial) | {"streaming": True}
    ledger.write(served, "done", "websocket", said)
