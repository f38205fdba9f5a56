"""Waiting until nobody needs a service any more, and who still points to the local proxy.

A request in flight is one that was sent and is not answered whole. Open connections may go on for
long without one: a client keeps them for later. So these are waited for only for a while.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halton_meter.cli.output import count, say
from halton_meter.live.control import PROXY_SOCKET_NAME, SOCKET_NAME, ask_service

WAIT_S_MAX = 600.0
IDLE_CONNECTIONS_S_MAX = 30.0
POLL_S = 0.5
ENVIRONMENT_BYTES_MAX = 1 << 20


def wait_for_proxy(home: Path, *, silent: bool = False) -> None:
    """Return when no request is in flight through the local proxy, and no connection is open."""
    _wait(lambda: _busy(home, PROXY_SOCKET_NAME, None), silent)


def wait_for_uprobes(home: Path, owner: int, *, silent: bool = False) -> None:
    """Return when no request is in flight that the uprobes service meters."""
    _wait(lambda: _busy(home, SOCKET_NAME, owner), silent)


def _busy(home: Path, name: str, owner: int | None) -> tuple[int, int] | None:
    """Requests in flight and open connections; None where no service answers.

    Uprobes hold nobody's connection: none of these is waited for.
    """
    status = ask_service(home, "status", name=name, owner=owner)
    flight = ask_service(home, "in_flight", name=name, owner=owner)
    if status is None:
        return None
    connections = status.get("connections") if name == PROXY_SOCKET_NAME else 0
    return _requests(flight), connections if isinstance(connections, int) else 0


def _requests(flight: dict[str, Any] | None) -> int:
    rows = (flight or {}).get("rows")
    more = (flight or {}).get("more")
    listed = len(rows) if isinstance(rows, list) else 0
    return listed + (more if isinstance(more, int) else 0)


def _wait(busy: Callable[[], tuple[int, int] | None], silent: bool) -> None:
    began = time.monotonic()
    idle_since: float | None = None
    told: tuple[int, int] | None = None
    while (found := busy()) is not None and time.monotonic() - began < WAIT_S_MAX:
        requests, connections = found
        now = time.monotonic()
        idle_since = None if requests else idle_since or now
        if not connections and not requests:
            return
        if idle_since is not None and now - idle_since >= IDLE_CONNECTIONS_S_MAX:
            if not silent:
                say(f"  {count(connections, 'idle connection')} will be closed")
            return
        if found != told and not silent:
            told = found
            flight = count(requests, "request")
            say(f"  waiting: {flight} in flight, {count(connections, 'connection')} open")
            sys.stdout.flush()
        time.sleep(POLL_S)


def still_pointed(home: Path) -> list[str] | None:
    """The running programs of this user that the proxy's address was given to, each with its id.

    None where the system does not show other programs' environments.
    """
    from halton_meter.settings import config

    if sys.platform != "linux":
        return None
    address = f"=http://127.0.0.1:{config.read(home).config.proxy.port}".encode()
    found: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) in (os.getpid(), os.getppid()):
            continue
        with contextlib.suppress(OSError):
            with (folder / "environ").open("rb") as file:
                values = file.read(ENVIRONMENT_BYTES_MAX).split(b"\0")
            names = (b"HTTPS_PROXY", b"https_proxy")
            if any(name + address == value.rstrip(b"/") for value in values for name in names):
                found[(folder / "comm").read_text(errors="replace").strip()] = int(folder.name)
    return [f"{name} ({pid})" for name, pid in sorted(found.items())]
