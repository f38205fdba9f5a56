"""Whom the edge serves: real sockets, and a process that really is another user's."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxy_fallback.edge import access, owner
from proxy_fallback.edge import edge as edges
from proxy_fallback.edge.access import Peer, allowed_uids, peer_of
from proxy_fallback.edge.listening import HEALTH_PATH
from tests.proxy_fallback.edge.test_edge import PROVIDER, StandIn, place, run, say, serving
from tests.support.cost import within
from tests.support.other_user import UID, OtherUser, needs_root, other_user  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody is told apart")

NETLINK = pytest.mark.parametrize("netlink", [True, False], ids=["netlink", "/proc/net/tcp"])
FORMS = {
    "CONNECT": "CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n",
    "absolute form": "GET http://{host}:{port}/ HTTP/1.1\r\nHost: {host}\r\n\r\n",
}
ADDRESSES = ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")


def listener_for(address: str) -> socket.socket:
    """What a client reaches at that address: a dual-stack socket where it says IPv4 by IPv6."""
    try:
        if address.startswith("::ffff:"):
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {address}")


def connected(address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    """A client of ours, and the end that accepted it."""
    with listener_for(address) as listener:
        client = socket.socket(listener.family)
        client.connect((address, listener.getsockname()[1]))
        return client, listener.accept()[0]


@NETLINK
@pytest.mark.parametrize("address", ADDRESSES)
def test_the_user_of_a_socket_is_told(address: str, netlink: bool) -> None:
    client, accepted = connected(address)
    with client, accepted:
        near, far = accepted.getsockname()[:2], accepted.getpeername()[:2]
        found = owner.owner_of(far, near, netlink=netlink)
        assert found == (os.geteuid(), os.fstat(client.fileno()).st_ino)
        assert owner.owner_of(far, (near[0], near[1] ^ 1), netlink=netlink) is None


@NETLINK
@pytest.mark.parametrize("how", ["whole", "with much unsent"])
def test_a_socket_that_was_closed_is_nobodys(how: str, netlink: bool) -> None:
    """The kernel gives it to root then, whoever it was: that must not be believed."""
    client, accepted = connected()
    with accepted:
        ends = accepted.getpeername(), accepted.getsockname()
        client.setblocking(False)
        sent = client.send(b"x" if how == "whole" else bytes(64 << 20))
        client.close()
        assert sent
        found = owner.owner_of(*ends, netlink=netlink)
        assert found is None or not found.inode
        assert peer_of(accepted, frozenset({0, os.geteuid()})) is Peer.GONE


@pytest.mark.parametrize("end", ["reset", "half closed"])
def test_a_reset_is_gone_and_a_half_closed_socket_is_still_its_users(end: str) -> None:
    client, accepted = connected()
    with client, accepted:
        if end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        else:
            client.shutdown(socket.SHUT_WR)
        expected = Peer.GONE if end == "reset" else Peer.ALLOWED
        assert peer_of(accepted, frozenset({os.geteuid()})) is expected


def test_one_that_listens_at_the_clients_port_is_not_taken_for_the_client() -> None:
    for _ in range(50):
        client, accepted = connected()
        with accepted:
            far, near = accepted.getpeername(), accepted.getsockname()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            try:
                listener = socket.create_server(far)
            except OSError:  # another program of this machine was given the port meanwhile
                continue
            with listener:
                assert owner.owner_of(far, near) is None
            return
    raise AssertionError("no port stayed free")


def test_a_kernel_that_does_not_tell_refuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*ends: object) -> None:
        raise owner.OwnerUnknown

    client, accepted = connected()
    with client, accepted:
        monkeypatch.setattr(access, "owner_of", silent)
        assert peer_of(accepted, frozenset()) is Peer.UNKNOWN


def test_an_answer_from_another_network_namespace_refuses_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It knows neither end, and the connection stands."""
    client, accepted = connected()
    with accepted:
        monkeypatch.setattr(access, "owner_of", lambda *ends: None)
        assert peer_of(accepted, frozenset()) is Peer.UNKNOWN
        client.close()
        assert peer_of(accepted, frozenset()) is Peer.GONE


def test_a_kernel_that_lacks_the_module_is_asked_by_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says of every socket that there is none."""
    monkeypatch.setattr(owner, "_answers", lambda *about: iter(()))
    client, accepted = connected()
    with client, accepted:
        assert peer_of(accepted, frozenset({os.geteuid()})) is Peer.ALLOWED
        assert peer_of(accepted, frozenset()) is Peer.OTHER_USER


def test_neither_netlink_nor_proc_means_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(owner, "_NETLINK_SOCK_DIAG", 31)  # no such protocol
    client, accepted = connected()
    with client, accepted:
        ends = accepted.getpeername(), accepted.getsockname()
        assert owner.owner_of(*ends) is not None  # by /proc/net/tcp
        with pytest.raises(owner.OwnerUnknown):
            owner.owner_of(*ends, proc=tmp_path)


def test_the_owner_root_and_roots_downloaders_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def getpwnam(name: str) -> SimpleNamespace:
        if name != "_apt":
            raise KeyError(name)
        return SimpleNamespace(pw_uid=42)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(pwd, "getpwnam", getpwnam)
    assert allowed_uids() == {1000, 0, 42}
    assert allowed_uids({1001}) == {1000, 1001, 0, 42}


# --- through the edge ---------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("host", [PROVIDER, "127.0.0.1"], ids=["a provider", "any host"])
@pytest.mark.parametrize("form", FORMS)
def test_another_user_is_refused_and_reaches_nothing(
    other_user: OtherUser,  # noqa: F811
    form: str,
    host: str,
) -> None:
    async def scene() -> None:
        reached = []

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.append(await reader.read(100))
            writer.close()

        stand_in = StandIn()
        worker, worker_port = await serving(stand_in)
        async with place(origin) as here:
            here.edge.send_to(worker_port)
            request = FORMS[form].format(host=host, port=here.origin).encode()
            answer = await other_user.tell(here.port, request)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 403 "), answer
            assert b"serves no other user" in body
            await here.empty()
            assert (reached, stand_in.heads) == ([], [])
            assert here.edge.counts == {"accepted": 1, "refused_other_user": 1}
        worker.close()

    run(scene())


@needs_root
def test_the_owner_and_root_are_served_beside_them(other_user: OtherUser) -> None:  # noqa: F811
    async def scene() -> None:
        async with place(allowed=frozenset({0, UID})) as here:
            request = f"CONNECT 127.0.0.1:{here.origin} HTTP/1.1\r\n\r\n".encode()
            assert await say(await here.tunnel(), b"hi") == b"hi"  # we are root
            telling = asyncio.create_task(other_user.tell(here.port, request))
            async with asyncio.timeout(120):
                while here.edge.counts["tunnelled"] < 2:
                    await asyncio.sleep(0.005)
            await here.edge.stop()
            assert (await telling).startswith(b"HTTP/1.1 200 ")
            assert here.edge.counts["refused_other_user"] == 0

    run(scene())


@needs_root
@pytest.mark.parametrize("size", [0, 32 << 20], ids=["little", "much unsent"])
def test_another_user_who_leaves_at_once_reaches_nothing_either(
    other_user: OtherUser,  # noqa: F811
    size: int,
) -> None:
    """The edge is busy meanwhile, as the loop does not run: it looks when the socket is closed."""

    async def scene() -> None:
        reached = []

        async def origin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reached.append(1)
            writer.close()

        async with place(origin) as here:
            head = f"POST http://127.0.0.1:{here.origin}/ HTTP/1.1\r\nContent-Length: {size}\r\n"
            other_user.leave(here.port, f"{head}\r\n".encode() + bytes(size))
            async with asyncio.timeout(120):
                while not here.edge.counts["accepted"]:
                    await asyncio.sleep(0.005)
            await here.empty()
            assert reached == []
            assert here.edge.counts == {"accepted": 1, "refused_gone": 1}

    run(scene())


@needs_root
def test_anybody_may_ask_whether_an_edge_is_there(other_user: OtherUser) -> None:  # noqa: F811
    async def scene() -> None:
        async with place() as here:
            answer = await other_user.tell(
                here.port, f"GET {HEALTH_PATH} HTTP/1.1\r\n\r\n".encode()
            )
            assert answer.endswith(b"halton-meter edge: here\n")

    run(scene())


@needs_root
def test_others_who_say_nothing_take_nobodys_place(
    other_user: OtherUser,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of theirs only so many are kept waiting, and not for long."""
    monkeypatch.setattr(edges, "OTHERS_MAX", 0)

    async def scene() -> None:
        async with place() as here:
            assert await other_user.tell(here.port, b"CONNECT a:1 HTTP/1.1\r\n") == b""
            assert here.edge.counts["refused_other_user"] == 1
            monkeypatch.setattr(edges, "OTHERS_MAX", 1)
            monkeypatch.setattr(edges, "OTHERS_HEAD_S_MAX", 0.05)
            assert await other_user.tell(here.port, b"CONNECT a:1 HTTP/1.1\r\n") == b""
            assert here.edge.counts["refused_no_request"] == 1
            await here.empty()
            assert here.edge.others == 0

    run(scene())


def test_whose_a_connection_is_takes_no_time_worth_naming() -> None:
    """Against what it costs to connect: with 200 sockets there, one lookup is no search of them."""
    pairs = [connected() for _ in range(200)]
    ends = [(accepted.getpeername(), accepted.getsockname()) for _, accepted in pairs]
    try:
        with within(0.001 * len(ends)):
            for each in ends:
                assert owner.owner_of(*each) is not None
    finally:
        for client, accepted in pairs:
            client.close()
            accepted.close()
