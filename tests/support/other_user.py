"""A process of another user of this machine, that says things to ports; tests as root have one."""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401 (before it is another user, who cannot read Python's files)
import multiprocessing
import os
import socket
from collections.abc import Iterator

import pytest

UID = 54_321
WAIT_S = 120.0

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becoming another user needs root"
)


def _become() -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def _tell(port: int, text: bytes, address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(WAIT_S)
        client.connect((address, port))
        answer = b""
        try:
            client.sendall(text)
            while data := client.recv(65536):
                answer += data
        except ConnectionError:
            pass
        return answer


def _leave(port: int, text: bytes) -> None:
    client = socket.create_connection(("127.0.0.1", port), WAIT_S)
    client.setblocking(False)
    client.send(text)
    client.close()


class OtherUser:
    """What the other user may do."""

    def __init__(self) -> None:
        # Forked: Python's own files may be closed to other users.
        self._pool = multiprocessing.get_context("fork").Pool(1, _become)

    async def tell(self, port: int, text: bytes, address: str = "127.0.0.1") -> bytes:
        """Say this; all that is answered."""
        return await asyncio.to_thread(self.tell_now, port, text, address)

    def tell_now(self, port: int, text: bytes, address: str = "127.0.0.1") -> bytes:
        """As `tell`, where no event loop runs."""
        return bytes(self._pool.apply(_tell, (port, text, address)))

    def leave(self, port: int, text: bytes) -> None:
        """Say as much of this as the kernel takes, and close at once."""
        self._pool.apply(_leave, (port, text))

    def close(self) -> None:
        """End it."""
        self._pool.terminate()
        self._pool.join()


@pytest.fixture
def other_user() -> Iterator[OtherUser]:
    """Another user."""
    other = OtherUser()
    yield other
    other.close()
