"""The edge alone: real sockets on loopback, a stand-in for mitmproxy, no TLS."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from proxy_fallback.edge import client_socket, listening
from proxy_fallback.edge import edge as edges
from proxy_fallback.edge.edge import Edge
from proxy_fallback.edge.listening import EdgeError
from tests.proxy_fallback.edge.test_hello import client_hello
from tests.support.quick import first
from tests.support.waiting import WAIT_SECONDS_MAX

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
PROVIDER = "localhost"  # stands for a provider's host: it leads to the test's own origin
HELLO = b"\x16\x03\x01 a client hello"


async def serving(handler: Handler) -> tuple[asyncio.Server, int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say back what comes, and at its end "bye"."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write(b"bye")
    writer.close()


class Place:
    """An edge with an origin behind it."""

    def __init__(self, edge: Edge, port: int, origin: int) -> None:
        self.edge, self.port, self.origin = edge, port, origin

    async def ask(self, request: bytes) -> Streams:
        streams = await asyncio.open_connection("127.0.0.1", self.port)
        streams[1].write(request)
        return streams

    async def tunnel(self, host: str = "127.0.0.1", port: int | None = None) -> Streams:
        """A tunnel to the origin, its 200 read."""
        target = f"{host}:{port or self.origin}"
        streams = await self.ask(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = await streams[0].readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        return streams

    async def empty(self) -> None:
        """Wait until no connection is left."""
        async with asyncio.timeout(60):
            while self.edge.clients:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def place(handler: Handler = echo, **options: object) -> AsyncIterator[Place]:
    server, origin = await serving(handler)
    listener = listening.listen(0)
    edge = Edge([PROVIDER], **options)  # type: ignore[arg-type]
    await edge.serve([listener])
    try:
        yield Place(edge, listener.getsockname()[1], origin)
    finally:
        await edge.stop()
        server.close()


async def say(streams: Streams, data: bytes, size: int | None = None) -> bytes:
    streams[1].write(data)
    return await streams[0].readexactly(len(data) if size is None else size)


def run(coroutine: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await coroutine

    asyncio.run(bounded())


# --- stand-ins for mitmproxy -------------------------------------------------------------------


class StandIn:
    """Accepts CONNECT and answers what is said with its name before it; notes the heads."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> None:
        self.heads: list[bytes] = []
        self.answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        while data := await reader.read(65536):
            writer.write(b"metered:" + data)
        writer.close()


def test_a_provider_goes_to_mitmproxy_and_the_client_is_named_to_it() -> None:
    async def scene() -> None:
        stand_in = StandIn()
        worker, worker_port = await serving(stand_in)
        async with place() as here:
            here.edge.send_to(worker_port)
            client = await here.tunnel(PROVIDER)
            assert await say(client, b"hi", 10) == b"metered:hi"
            [head] = stand_in.heads
            end = client_socket.ClientSocket(*client[1].get_extra_info("sockname"), here.port)
            assert head.startswith(f"CONNECT {PROVIDER}:{here.origin} HTTP/1.1\r\n".encode())
            assert (
                f"\r\n{client_socket.HEADER}: {client_socket.to_header(end)}\r\n".encode() in head
            )
            assert here.edge.counts["metered"] == 1
            assert here.edge.bypassed == {}
        worker.close()

    run(scene())


def test_another_host_is_tunnelled_raw_even_while_mitmproxy_is_there() -> None:
    async def scene() -> None:
        stand_in = StandIn()
        worker, worker_port = await serving(stand_in)
        async with place() as here:
            here.edge.send_to(worker_port)
            assert await say(await here.tunnel("127.0.0.1"), b"hi") == b"hi"
            assert stand_in.heads == []
            assert here.edge.counts["tunnelled"] == 1
        worker.close()

    run(scene())


async def no_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize(
    ("handler", "cause"),
    [
        (None, "worker_down"),
        (no_answer, "worker_slow"),
        (hang_up, "worker_down"),
        (StandIn(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), "worker_declined"),
        (StandIn(b"?" * 70_000), "worker_declined"),
    ],
    ids=["nobody listens", "it never answers", "it hangs up", "it declines", "it talks nonsense"],
)
def test_a_provider_is_reached_raw_whatever_is_wrong_with_mitmproxy(
    handler: Handler | None, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edges, "WORKER_FIRST_ANSWER_S_MAX", 0.2)

    async def scene() -> None:
        worker, worker_port = await serving(handler or hang_up)
        if handler is None:
            worker.close()
        async with place() as here:
            here.edge.send_to(worker_port)
            assert await say(await here.tunnel(PROVIDER), HELLO) == HELLO
            assert here.edge.bypassed == {PROVIDER: {cause: 1}}
            assert here.edge.counts["metered"] == 0
        worker.close()

    run(scene())


def test_a_host_that_is_slow_itself_is_metered_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mitmproxy answers late because the host does: raw it would be later still."""
    monkeypatch.setattr(edges, "WORKER_FIRST_ANSWER_S_MAX", 0.05)

    async def scene() -> None:
        raw_asked, raw_gone = asyncio.Event(), asyncio.Event()

        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            raw_asked.set()
            with contextlib.suppress(OSError):
                while await reader.read(100):
                    pass
            raw_gone.set()
            writer.close()

        async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await raw_asked.wait()
            await StandIn()(reader, writer)

        network, out = await serving(never)
        worker, worker_port = await serving(late)
        async with place(upstream=("127.0.0.1", out)) as here:
            here.edge.send_to(worker_port)
            assert await say(await here.tunnel(PROVIDER), b"hi", 10) == b"metered:hi"
            await raw_gone.wait()  # what was tried raw is let go of
            assert here.edge.bypassed == {}
            assert here.edge.counts["metered"] == 1
        worker.close()
        network.close()

    run(scene())


def test_only_the_first_answer_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """mitmproxy loads much for its first connection; one that was quick is slow for a reason."""
    monkeypatch.setattr(edges, "WORKER_ANSWER_S_MAX", 0.05)
    monkeypatch.setattr(edges, "WORKER_FIRST_ANSWER_S_MAX", 60.0)

    async def scene() -> None:
        asked = 0

        async def at_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            asked += 1
            await (StandIn() if asked == 1 else no_answer)(reader, writer)

        worker, worker_port = await serving(at_first)
        async with place() as here:
            here.edge.send_to(worker_port)
            assert await say(await here.tunnel(PROVIDER), b"hi", 10) == b"metered:hi"
            assert await say(await here.tunnel(PROVIDER), HELLO) == HELLO
            assert here.edge.bypassed == {PROVIDER: {"worker_slow": 1}}
        worker.close()

    run(scene())


def test_a_client_that_leaves_while_all_are_slow_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(edges, "WORKER_FIRST_ANSWER_S_MAX", 0.05)

    async def scene() -> None:
        asked, gone = asyncio.Semaphore(0), asyncio.Semaphore(0)

        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked.release()
            with contextlib.suppress(OSError):
                await reader.read()
            gone.release()
            writer.close()

        server, port = await serving(never)
        async with place(upstream=("127.0.0.1", port)) as here:
            here.edge.send_to(port)
            client = await here.ask(b"CONNECT localhost:443 HTTP/1.1\r\n\r\n")
            for each in (asked, asked):  # mitmproxy and the upstream proxy
                await each.acquire()
            client[1].transport.abort()
            for each in (gone, gone):
                await each.acquire()
            await here.empty()
        server.close()

    run(scene())


def test_after_failures_in_a_row_mitmproxy_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene() -> None:
        seen = 0

        async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal seen
            seen += 1
            writer.close()

        worker, worker_port = await serving(counted)
        async with place() as here:
            here.edge.send_to(worker_port)
            for _ in range(edges.WORKER_FAILURES_MAX + 4):
                assert await say(await here.tunnel(PROVIDER), b"hi") == b"hi"
            assert seen == edges.WORKER_FAILURES_MAX
            assert here.edge.bypassed[PROVIDER]["worker_failing"] == 4
            monkeypatch.setattr(edges, "BREAKER_OPEN_S", 60.0)
            here.edge._open_until = 0.0  # the while is over
            await here.tunnel(PROVIDER)
            await here.tunnel(PROVIDER)
            assert seen == edges.WORKER_FAILURES_MAX + 1  # one failure opened it again
            here.edge.send_to(worker_port)  # a new one is asked at once
            await here.tunnel(PROVIDER)
            assert seen == edges.WORKER_FAILURES_MAX + 2
        worker.close()

    run(scene())


def test_a_handshake_that_mitmproxy_never_answered_is_said_again_to_the_provider() -> None:
    async def scene() -> None:
        async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.readexactly(len(HELLO))
            writer.transport.abort()

        worker, worker_port = await serving(dies)
        async with place() as here:
            here.edge.send_to(worker_port)
            client = await here.tunnel(PROVIDER)
            assert await say(client, HELLO) == HELLO  # the origin echoes it
            assert await say(client, b"more") == b"more"
            assert here.edge.bypassed == {PROVIDER: {"worker_died": 1}}
            assert here.edge.counts["metered"] == 0
        worker.close()

    run(scene())


def test_a_plain_request_is_never_said_twice() -> None:
    async def scene() -> None:
        async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            writer.close()

        reached = []

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.append(await reader.read(100))
            writer.close()

        worker, worker_port = await serving(dies)
        async with place(origin) as here:
            here.edge.send_to(worker_port)
            url = f"http://{PROVIDER}:{here.origin}/pay"
            client = await here.ask(f"POST {url} HTTP/1.1\r\n\r\n".encode())
            assert await client[0].read() == b""
            assert reached == []
        worker.close()

    run(scene())


def test_a_program_that_refused_our_certificate_passes_by_us_and_others_do_not() -> None:
    async def scene() -> None:
        stand_in = StandIn()
        worker, worker_port = await serving(stand_in)
        programs = iter(["/usr/bin/java", "/usr/bin/java", "/usr/bin/node", "/usr/bin/java"])
        async with place(program_of=lambda address: next(programs)) as here:
            here.edge.send_to(worker_port)
            here.edge.refuse(PROVIDER, "/usr/bin/java", False)
            assert here.edge.refusals() == []  # it only hung up: perhaps it was in a hurry
            assert await say(await here.tunnel(PROVIDER), b"1", 9) == b"metered:1"
            here.edge.refuse(PROVIDER, "/usr/bin/java", False)
            assert here.edge.refusals() == [(PROVIDER, "/usr/bin/java")]
            assert await say(await here.tunnel(PROVIDER), b"2") == b"2"
            assert await say(await here.tunnel(PROVIDER), b"3", 9) == b"metered:3"
            assert here.edge.bypassed == {PROVIDER: {"certificate_refused": 1}}
            here.edge.forget_refusals()
            assert await say(await here.tunnel(PROVIDER), b"4", 9) == b"metered:4"
        worker.close()

    run(scene())


def test_a_host_for_which_our_certificate_will_not_do_is_tunnelled_raw() -> None:
    async def scene() -> None:
        stand_in = StandIn()
        worker, worker_port = await serving(stand_in)
        async with place() as here:
            here.edge.send_to(worker_port, accepted=[])
            assert await say(await here.tunnel(PROVIDER), b"hi") == b"hi"
            assert here.edge.bypassed == {PROVIDER: {"certificate_unusable": 1}}
        worker.close()

    run(scene())


@pytest.mark.parametrize("early", [False, True])
def test_a_provider_that_is_asked_for_by_address_is_counted_with_its_program(early: bool) -> None:
    hello = client_hello(f"{PROVIDER.upper()}.")

    async def scene() -> None:
        async with place(program_of=lambda client: "/usr/bin/curl") as here:
            if early:
                head = f"CONNECT 127.0.0.1:{here.origin} HTTP/1.1\r\n\r\n".encode()
                client = await here.ask(head + hello)
                await client[0].readuntil(b"\r\n\r\n")
                assert await client[0].readexactly(len(hello)) == hello
            else:
                client = await here.tunnel()
                assert await say(client, hello[:9]) + await say(client, hello[9:]) == hello
            assert await say(client, hello) == hello  # once a connection
            for data in (client_hello("other.example"), client_hello(None), b"SSH-2.0"):
                assert await say(await here.tunnel(), data) == data
        row = ("/usr/bin/curl", PROVIDER, "not_asked_by_name")
        assert here.edge.unmetered == {row: 1}
        assert here.edge.bypassed == {PROVIDER: {"not_asked_by_name": 1}}
        assert here.edge.counts["tunnelled"] == 3

    run(scene())


# --- what a tunnel must be ---------------------------------------------------------------------


def test_bytes_sent_right_behind_the_request_are_not_lost() -> None:
    async def scene() -> None:
        async with place() as here:
            request = f"CONNECT 127.0.0.1:{here.origin} HTTP/1.1\r\n\r\nearly".encode()
            client = await here.ask(request)
            await client[0].readuntil(b"\r\n\r\n")
            assert await client[0].readexactly(5) == b"early"

    run(scene())


def test_a_request_that_comes_byte_by_byte() -> None:
    async def scene() -> None:
        async with place() as here:
            client = await here.ask(b"")
            for byte in f"CONNECT 127.0.0.1:{here.origin} HTTP/1.1\r\nA: b\r\n\r\n".encode():
                client[1].write(bytes([byte]))
                await client[1].drain()
                await asyncio.sleep(0)
            assert b" 200 " in await client[0].readuntil(b"\r\n\r\n")
            assert await say(client, b"hi") == b"hi"

    run(scene())


def test_a_client_of_http_1_0() -> None:
    async def scene() -> None:
        async with place() as here:
            client = await here.ask(f"CONNECT 127.0.0.1:{here.origin} HTTP/1.0\r\n\r\n".encode())
            assert b" 200 " in await client[0].readuntil(b"\r\n\r\n")
            assert await say(client, b"hi") == b"hi"

    run(scene())


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_an_origin_that_has_an_ipv6_address_only() -> None:
    async def scene() -> None:
        try:
            server = await asyncio.start_server(echo, "::1", 0)
        except OSError:
            pytest.skip("::1 is not there")
        async with place() as here:
            port = server.sockets[0].getsockname()[1]
            assert await say(await here.tunnel("[::1]", port), b"hi") == b"hi"
        server.close()

    run(scene())


def test_one_direction_may_end_before_the_other() -> None:
    async def scene() -> None:
        async with place() as here:
            reader, writer = await here.tunnel()
            writer.write(b"all that I say")
            writer.write_eof()
            assert await reader.read() == b"all that I saybye"
            await here.empty()

    run(scene())


def test_a_reset_on_one_side_is_a_reset_on_the_other() -> None:
    async def scene() -> None:
        gone = asyncio.Event()

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read(1)
                writer.write(b"x" * 10)
                with contextlib.suppress(OSError):
                    await reader.read()
            finally:
                gone.set()

        async with place(origin) as here:
            reader, writer = await here.tunnel()
            await say((reader, writer), b"a", 10)
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
            writer.transport.abort()
            await gone.wait()
            await here.empty()

    run(scene())


def test_a_client_that_does_not_read_holds_the_origin_back_and_not_our_memory() -> None:
    async def scene() -> None:
        sent = 0
        total = 200 * 1024 * 1024

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            await reader.read(1)
            piece = b"x" * (1 << 20)
            with contextlib.suppress(OSError):
                while sent < total:
                    writer.write(piece)
                    sent += len(piece)
                    await writer.drain()
                writer.close()

        async with place(origin) as here:
            reader, writer = await here.tunnel()
            writer.write(b"go")
            before = -1
            while before != sent:  # until the origin is stuck
                before = sent
                await asyncio.sleep(0.1)
            assert sent < total // 4  # kernel buffers, and little of ours
            received = 0
            while data := await reader.read(1 << 20):
                received += len(data)
            assert received == total
            writer.close()
            await here.empty()

    run(scene())


def test_plain_http_is_sent_on_in_origin_form_one_request_a_connection() -> None:
    async def scene() -> None:
        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(4)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + head + body)
            writer.close()

        async with place(origin) as here:
            client = await here.ask(
                f"POST http://127.0.0.1:{here.origin}/a?b=c HTTP/1.1\r\nHost: h\r\n"
                "Proxy-Connection: keep-alive\r\nConnection: keep-alive\r\n"
                "Proxy-Authorization: Basic eA==\r\nContent-Length: 4\r\n\r\nbody".encode()
            )
            assert await client[0].read() == (
                b"HTTP/1.1 200 OK\r\n\r\nPOST /a?b=c HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n"
                b"Connection: close\r\n\r\nbody"
            )

    run(scene())


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_head", "status", "cause"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"GET https://a.test/ HTTP/1.1\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"CONNECT nowhere HTTP/1.1\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"CONNECT a:99999 HTTP/1.1\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"CONNECT a b:1 HTTP/1.1\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"\x16\x03\x01\r\n\r\n", b"400", "refused_no_proxy_request"),
        (b"A: " + b"x" * 70_000, b"431", "refused_head_too_long"),
        (b"CONNECT localhost:PORT HTTP/1.1\r\n\r\n", b"403", "refused_loop"),
        (b"CONNECT 127.0.0.1:PORT HTTP/1.1\r\n\r\n", b"403", "refused_loop"),
        (b"CONNECT 127.9.9.9:PORT HTTP/1.1\r\n\r\n", b"403", "refused_loop"),
        (b"CONNECT 0.0.0.0:PORT HTTP/1.1\r\n\r\n", b"403", "refused_loop"),
        (b"GET http://localhost:PORT/ HTTP/1.1\r\n\r\n", b"403", "refused_loop"),
        (b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\n", b"502", "origin_unreachable"),
    ],
)
def test_a_request_that_it_refuses_is_answered_and_counted(
    request_head: bytes, status: bytes, cause: str
) -> None:
    async def scene() -> None:
        async with place() as here:
            here.edge.bypass("test")
            client = await here.ask(request_head.replace(b"PORT", b"%d" % here.port))
            with contextlib.suppress(ConnectionResetError):  # it does not read to the end of junk
                answer = await client[0].read()
                assert answer.split(b" ")[1] == status
            await here.empty()
            assert here.edge.counts[cause] == 1

    run(scene())


def test_a_providers_name_with_the_edges_own_port_makes_no_loop_through_mitmproxy() -> None:
    async def scene() -> None:
        stand_in = StandIn()
        server, worker_port = await serving(stand_in)
        async with place() as here:
            here.edge.send_to(worker_port)
            client = await here.ask(f"CONNECT {PROVIDER}:{here.port} HTTP/1.1\r\n\r\n".encode())
            assert (await client[0].read()).startswith(b"HTTP/1.1 403 ")
            await here.empty()
            assert here.edge.counts["refused_loop"] == 1
            assert "metered" not in here.edge.counts
        server.close()

    run(scene())


def test_a_name_that_leads_back_to_the_edge_is_found_out_when_it_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a name does that is first somebody's and then ours (rebinding)."""

    async def scene() -> None:
        async with place() as here:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo("127.0.0.1", here.port, type=socket.SOCK_STREAM)

            async def rebound(*_: object, **__: object) -> object:
                return found

            monkeypatch.setattr(loop, "getaddrinfo", rebound)
            target = f"rebound.example.com:{here.port}"
            client = await here.ask(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode())
            assert (await client[0].read()).startswith(b"HTTP/1.1 403 ")
            assert here.edge.counts["refused_loop"] == 1

    run(scene())


def test_who_asks_for_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "HEAD_S_MAX", 0.05)

    async def scene() -> None:
        async with place() as here:
            client = await here.ask(b"CONNECT a:1 HT")
            with contextlib.suppress(ConnectionResetError):
                assert await client[0].read() == b""
            assert here.edge.counts["refused_no_request"] == 1

    run(scene())


def test_more_connections_than_allowed_are_refused_and_counted() -> None:
    async def scene() -> None:
        async with place(connections_max=2) as here:
            first = await here.tunnel()
            await here.tunnel()
            third = await here.ask(b"CONNECT a.test:1 HTTP/1.1\r\n\r\n")
            assert (await third[0].read()).startswith(b"HTTP/1.1 503 ")
            assert here.edge.counts["refused_over_limit"] == 1
            first[1].close()
            while len(here.edge.clients) > 1:
                await asyncio.sleep(0.005)
            assert await say(await here.tunnel(), b"hi") == b"hi"

    run(scene())


def test_it_serves_no_socket_that_others_can_reach() -> None:
    async def scene() -> None:
        with socket.socket() as listener:
            listener.bind(("0.0.0.0", 0))
            listener.listen()
            with pytest.raises(EdgeError, match="loopback only"):
                await Edge([]).serve([listener])

    run(scene())


# --- through another proxy ---------------------------------------------------------------------


def test_raw_tunnels_leave_by_the_upstream_proxy() -> None:
    async def scene() -> None:
        company = StandIn()
        server, port = await serving(company)
        async with place(upstream=("127.0.0.1", port)) as here:
            client = await here.tunnel("far.test", 443)
            assert await say(client, b"hi", 10) == b"metered:hi"
            assert company.heads == [b"CONNECT far.test:443 HTTP/1.1\r\nHost: far.test:443\r\n\r\n"]
            await here.ask(b"GET http://far.test/x HTTP/1.1\r\nHost: far.test\r\n\r\n")
            while len(company.heads) < 2:
                await asyncio.sleep(0.005)
            assert company.heads[1].startswith(b"GET http://far.test/x HTTP/1.1\r\nHost: far.test")
        server.close()

    run(scene())


def test_what_the_upstream_proxy_refuses_is_refused() -> None:
    async def scene() -> None:
        server, port = await serving(StandIn(b"HTTP/1.1 403 Forbidden\r\n\r\n"))
        async with place(upstream=("127.0.0.1", port)) as here:
            client = await here.ask(b"CONNECT far.test:443 HTTP/1.1\r\n\r\n")
            assert (await client[0].read()).startswith(b"HTTP/1.1 502 ")
            await here.empty()
        server.close()

    run(scene())


# --- many, and again ---------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


ONCE_OPENED = 10
"""What is opened at the first use; a kind of connection that left one would leave hundreds."""


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@pytest.mark.parametrize("batches", first([40, 200]))
def test_thousands_of_connections_leave_no_descriptor_behind(batches: int) -> None:
    async def scene() -> None:
        async def one_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                writer.write(await reader.readexactly(2))
                await reader.read()
            writer.close()

        stand_in_server, worker_port = await serving(StandIn())
        async with place(one_answer) as here:
            here.edge.send_to(worker_port)

            loop = asyncio.get_running_loop()
            target = f"127.0.0.1:{here.origin}"
            raw = f"CONNECT {target} HTTP/1.1\r\n\r\n".encode()
            metered = raw.replace(b"127.0.0.1", PROVIDER.encode())

            async def some(count: int, seed: int) -> None:
                for n in range(seed, seed + count):
                    with socket.socket() as client:
                        client.setblocking(False)
                        await loop.sock_connect(client, ("127.0.0.1", here.port))
                        await loop.sock_sendall(client, metered if n % 5 == 0 else raw)
                        if n % 5 == 1:  # leaves at once
                            continue
                        assert b" 200 " in await loop.sock_recv(client, 100)
                        if n % 5 == 2:  # leaves when its tunnel stands
                            continue
                        await loop.sock_sendall(client, b"hi")
                        # A worker that is slow to accept, on a busy machine, is passed by.
                        assert (await loop.sock_recv(client, 100)).startswith(
                            (b"metered:", b"hi") if n % 5 == 0 else b"hi"
                        )

            await some(10, 0)
            await here.empty()
            before = open_descriptors() + ONCE_OPENED
            await asyncio.gather(*(some(50, seed) for seed in range(batches)))
            await here.empty()
            async with asyncio.timeout(300):
                while open_descriptors() > before:
                    await asyncio.sleep(0.01)
            assert here.edge.counts["accepted"] == 10 + 50 * batches
        stand_in_server.close()

    async def bounded() -> None:
        async with asyncio.timeout(900):
            await scene()

    edges.raise_descriptor_limit()
    asyncio.run(bounded())


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_what_loses_to_a_slow_worker_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, not when Python's collector finds its socket."""
    monkeypatch.setattr(Edge, "worker_answer_s", 0.0)

    async def scene() -> None:
        async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        stand_in_server, worker_port = await serving(StandIn())
        async with place(waits) as here:
            here.edge.send_to(worker_port)
            loop = asyncio.get_running_loop()
            asked = f"CONNECT {PROVIDER}:{here.origin} HTTP/1.1\r\n\r\n".encode()

            async def some(count: int) -> None:
                for _ in range(count):
                    with socket.socket() as client:
                        client.setblocking(False)
                        await loop.sock_connect(client, ("127.0.0.1", here.port))
                        await loop.sock_sendall(client, asked)
                        assert b" 200 " in await loop.sock_recv(client, 100)

            await some(2)
            await here.empty()
            before = open_descriptors() + ONCE_OPENED
            await asyncio.gather(*(some(10) for _ in range(20)))
            await here.empty()
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while open_descriptors() > before:
                    await asyncio.sleep(0.01)
        stand_in_server.close()

    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()


def test_the_edge_imports_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"proxy_fallback"}
    for file in Path(edges.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in found} <= allowed, file
