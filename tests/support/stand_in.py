"""A service without a kernel: the real supervisor and metering process, a stand-in for the helper.

`with running(home, monkeypatch) as service: service.exchange(3)` has three exchanges metered.
Everything behind the socket to the helper is as in real life: processes, journal, database.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capture import protocol
from capture.helper.handover import Hold, Keeper
from capture.helper.relay.spool import Receipt
from capture.processes import proc
from halton_meter import untrusted
from halton_meter.accounts import account_named
from halton_meter.live.control import Control, ServiceAbsent
from halton_meter.live.probes.supervisor import Plan, Supervisor
from halton_meter.live.result import RunResult
from halton_meter.model import Process
from halton_meter.settings.config import Config
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until

HOST = "api.anthropic.com"


def record(kind: int, ssl: int, direction: int, offset: int, data: bytes, length: int) -> bytes:
    """A frame as the kernel writes it."""
    size, now = protocol.RECORD.size + len(data), time.monotonic_ns()
    fields = (size, kind, direction, 0, os.getpid(), os.getuid(), ssl, 1, now)
    return protocol.RECORD.pack(*fields, offset, length, length) + data


def exchange_frames(number: int) -> bytes:
    """A connection with one whole exchange, whose response id is msg_NUMBER."""
    asked = json.dumps({"model": "claude-haiku-4-5", "max_tokens": 9, "messages": []})
    usage = {"input_tokens": 10, "output_tokens": 5}
    told = {"id": f"msg_{number}", "type": "message", "role": "assistant", "content": []}
    answer = json.dumps({**told, "model": "claude-haiku-4-5", "usage": usage})
    kind = "Content-Type: application/json\r\nContent-Length:"
    head = f"POST /v1/messages HTTP/1.1\r\nHost: {HOST}\r\n"
    said = (
        f"{head}{kind} {len(asked)}\r\n\r\n{asked}".encode(),
        f"HTTP/1.1 200 OK\r\n{kind} {len(answer)}\r\n\r\n{answer}".encode(),
    )
    names = b"client".ljust(protocol.COMM_BYTES, b"\0") + HOST.encode().ljust(128, b"\0")
    process = proc.to_json(Process(os.getpid(), 1, "/usr/bin/client", ("client",), "/"))
    about = {"process": process, "connection": (os.getpid(), number, 1)}
    frames = protocol.encode_message(protocol.PROCESS, about)
    frames += record(protocol.OPEN, number, 0, 0, names, 0)
    for direction, data in enumerate(said):
        frames += record(protocol.CHUNK, number, direction, 0, data, len(data))
    return frames


class StandIn:
    """What metering processes take for their helper; what it sends them is its whole spool."""

    def __init__(self, channel: socket.socket) -> None:
        self._hold = Hold(channel)
        self._hold.keep("map:stand-in", True, [channel.fileno()])
        self._receipt = Receipt.new()
        self._spooled = bytearray()
        self._near: socket.socket | None = None
        self._lock = threading.Lock()

    def link(self) -> socket.socket:
        """For another metering process."""
        near, far = socket.socketpair()
        hello = protocol.encode_message(protocol.HELLO, {})
        socket.send_fds(near, [hello], [self._receipt.fd])
        threading.Thread(target=self._answer, args=(near,), daemon=True).start()
        return far

    @staticmethod
    def _report() -> bytes:
        report = {"loader": "stand-in", "probes": 0, "statistics": {}, "coverage": [], "late": 0}
        return protocol.encode_message(protocol.REPORT, report)

    def send(self, frames: bytes) -> None:
        with self._lock:
            self._spooled += frames
            if self._near is not None:
                with contextlib.suppress(OSError):
                    self._near.sendall(frames)

    def _answer(self, near: socket.socket) -> None:
        commands = untrusted.Lines()
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                commands.feed(data)
                for command in commands.messages():
                    self._carry_out(near, command)

    def _carry_out(self, near: socket.socket, command: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": command["id"]}
        if command["do"] != "read":
            frames = self._report() if command["do"] == "report" else b""
            self.send(frames + protocol.encode_message(protocol.REPLY, reply))
            return
        with self._lock:
            reply |= {"from": command["from"], "until": len(self._spooled)}
            near.sendall(protocol.encode_message(protocol.REPLY, reply))
            near.sendall(self._spooled[command["from"] :])
            self._near = near


class Service:
    """The supervisor in a thread, and what a client of its metering process sees."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.helpers: list[StandIn] = []
        self._numbers = iter(range(1, 10_000))
        me = account_named(str(os.getuid()))
        self.supervisor = Supervisor(Plan(me, home, Config(), (), service=True))
        self._stop_read, self._stop_write = os.pipe()
        self.result: RunResult | None = None
        self.thread = threading.Thread(target=self._run)

    def spawn(self, *_: Any, keeper: Keeper, **__: Any) -> socket.socket:
        """In place of `spawn_helper`."""
        self.helpers.append(StandIn(keeper.open_channel()))
        return self.helpers[-1].link()

    def link_to(self, keeper: Keeper) -> socket.socket:
        """In place of the function of that name."""
        return self.helpers[-1].link()

    def start(self) -> None:
        self.supervisor.start()
        self.thread.start()

    def _run(self) -> None:
        selector, ending = self.supervisor.selector, False

        def end() -> None:
            nonlocal ending
            ending = True

        selector.register(self._stop_read, selectors.EVENT_READ, end)
        while not ending:
            for key, _ in selector.select(self.supervisor.wait_s):
                key.data()
            self.supervisor.tick()
        selector.unregister(self._stop_read)
        self.result = self.supervisor.finish()

    def stop(self) -> RunResult:
        """As systemd would; what the supervisor knows then."""
        os.write(self._stop_write, b"x")
        self.thread.join(WAIT_SECONDS_MAX)
        assert self.result is not None
        return self.result

    def exchange(self, count: int) -> list[str]:
        """So many exchanges; their response ids."""
        numbers = [next(self._numbers) for _ in range(count)]
        self.helpers[-1].send(b"".join(map(exchange_frames, numbers)))
        return [f"msg_{number}" for number in numbers]

    def status(self) -> dict[str, Any]:
        """What it says of itself; {} while it does not answer."""
        with contextlib.suppress(ServiceAbsent):
            control = Control(self.home, timeout_s=30)
            try:
                return control.ask("status")
            finally:
                control.close()
        return {}

    def wait_for(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """Its status as soon as that is so."""

        def asked() -> dict[str, Any] | None:
            found = self.status()
            return found if found and condition(found) else None

        found: dict[str, Any] = wait_until(asked, what)
        return found

    def flush(self) -> dict[str, Any]:
        """Have everything moved into the database, as far as it can be."""
        control = Control(self.home, timeout_s=30)
        control.ask("watch", pid=1)
        reply = control.ask("finish")
        control.close()
        return reply


@contextlib.contextmanager
def running(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that meters into `home`."""
    service = Service(home)
    monkeypatch.setattr("capture.helper_process.spawn_helper", service.spawn)
    monkeypatch.setattr("capture.helper_process.link_to", service.link_to)
    service.start()
    try:
        yield service
    finally:
        if service.result is None:
            service.stop()
