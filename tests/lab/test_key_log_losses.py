"""Packets that are lost by force: counted, measured as gaps, bounded; nothing is invented."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capture import sniffer
from capture.live_capture import LiveCapture
from halton_meter.live.pipeline import Pipeline
from halton_meter.model import Outcome, PricedEvent, TlsChunk
from tests.lab.conftest import assert_metered, stored_events
from tests.lab.test_key_log import curl, run
from tests.lab.test_key_log import home as home
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

TINY_BYTES = 128 << 10
# Some 1.5 MB an answer: more than the tiny buffer and the link to its reader hold together.
LONG = Scenario(n=3, chunks=1_500, piece_bytes=1_000)
MEMORY_KB_MAX = 64 << 10


@dataclass
class Sniffing:
    """A sniffer in the lab, and our end of its link."""

    process: subprocess.Popen[bytes]
    link: socket.socket

    def memory_kb(self) -> int:
        """The most that it ever held."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1])


@contextmanager
def sniffing(lab: Lab, buffer_bytes: int) -> Iterator[Sniffing]:
    """A sniffer with a kernel buffer of that size, as `sniffer.main` runs it."""
    code = (
        "import sys; from capture import sniffer; "
        f"sniffer.RECEIVE_BUFFER_BYTES = {buffer_bytes}; sys.exit(sniffer.main(sys.argv[1:]))"
    )
    ours, its = socket.socketpair()
    command = [sys.executable, "-c", code, str(its.fileno()), "", "443"]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(Path(sniffer.__file__).parents[1])}
    process = lab.popen(command, env=environment, pass_fds=[its.fileno()])
    its.close()
    try:
        head = ours.recv(sniffer.HEAD.size, socket.MSG_WAITALL)
        assert sniffer.HEAD.unpack(head)[0] == sniffer.READY
        yield Sniffing(process, ours)
    finally:
        ours.close()
        process.kill()
        process.wait()


class Counting:
    """Counts the messages of a sniffer, without reading the packets."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._buffer = bytearray()
        self.packets = self.dropped = 0

    def read(self) -> int:
        """How many packets there were, dropped ones included."""
        try:
            while data := self._link.recv(1 << 20, socket.MSG_DONTWAIT):
                self._buffer += data
        except BlockingIOError:
            pass
        at, head = 0, sniffer.HEAD
        while at + head.size <= len(self._buffer):
            kind, length, number = head.unpack_from(self._buffer, at)
            if at + head.size + length > len(self._buffer):
                break
            self.packets += kind == sniffer.PACKET
            self.dropped += number if kind == sniffer.DROPPED else 0
            at += head.size + length
        del self._buffer[:at]
        return self.packets + self.dropped


def body(scenario: Scenario) -> str:
    asked = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 64,
        "stream": True,
        "messages": [{"role": "user", "content": scenario.marker}],
    }
    return json.dumps(asked)


def ask(lab: Lab, keys: Path, *scenarios: Scenario) -> None:
    """Each of these once, by a curl of its own."""
    for each in scenarios:
        argv = ["curl", "-sS", "-o", "/dev/null", "--http1.1"]
        argv += ["https://api.anthropic.com/v1/messages", "-d", body(each)]
        done = lab.run(argv, env=lab.environment(SSLKEYLOGFILE=str(keys)))
        assert done.returncode == 0, done.stderr


def test_every_packet_comes_or_is_counted_as_dropped(lab: Lab, home: Path) -> None:
    with sniffing(lab, 64 << 20) as ample, sniffing(lab, TINY_BYTES) as tiny:
        all_of_them, some = Counting(ample.link), Counting(tiny.link)
        ask(lab, home / "keys.log", *[LONG] * 2)

        def are_equal() -> bool:
            return some.read() == all_of_them.read() and some.dropped > 0

        wait_until(are_equal, "as many packets, with those that the tiny buffer dropped")
        assert all_of_them.dropped == 0


class Metered:
    """What a live capture and the pipeline make of a link's bytes."""

    def __init__(self, link: socket.socket, keys: Path, home: Path) -> None:
        self.source = LiveCapture(
            link, [keys], lambda host: host == "api.anthropic.com", lambda *_: None, lambda *_: None
        )
        self.meter = Pipeline(home, {}).meter
        self.chunks: list[TlsChunk] = []
        self.events: list[PricedEvent] = []

    def read(self) -> None:
        self._take(self.source.read())

    def finish(self) -> None:
        self._take(self.source.finish())
        self.events += self.meter.finish(0)

    def _take(self, items: list[Any]) -> None:
        for item in items:
            self.chunks += [item] if isinstance(item, TlsChunk) else []
            self.events += self.meter.receive(item)


def test_a_reader_that_pauses_loses_counted_packets_and_no_request_is_invented(
    lab: Lab, home: Path
) -> None:
    keys = home / "keys.log"
    with sniffing(lab, TINY_BYTES) as tiny:
        metered = Metered(tiny.link, keys, home / "data")
        skip = len(lab.ledger())
        ask(lab, keys, *[LONG] * 3)  # nobody reads meanwhile
        paused_kb = tiny.memory_kb()
        wait_until(
            lambda: metered.read() or metered.source.losses["packets_dropped"], "the count of drops"
        )
        # What follows the pause is whole again.
        ask(lab, keys, Scenario(n=2))
        wait_until(lambda: metered.read() or inputs(metered) & {102}, "a whole request")
        metered.finish()
    served = {entry["response_id"]: entry for entry in lab.ledger()[skip:]}
    assert metered.source.losses["packets_dropped"] > 0
    assert paused_kb < MEMORY_KB_MAX
    # The first one's head fits into the buffer, its answer does not.
    assert [each for each in metered.events if each.usage.outcome is not Outcome.COMPLETE]
    for event in metered.events:
        if event.usage.response_id is not None:
            assert event.usage.response_id in served
        if event.usage.outcome is Outcome.COMPLETE:
            assert event.usage.tokens.output == served[event.usage.response_id]["tokens"]["output"]


def inputs(metered: Metered) -> set[int | None]:
    """Input tokens of the whole requests among what was metered."""
    whole = [each.usage for each in metered.events if each.usage.outcome is Outcome.COMPLETE]
    return {usage.tokens.input for usage in whole}


@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nftables: apt install nftables")
@pytest.mark.parametrize("hook", ["input", "output"])
def test_what_the_network_loses_is_sent_again_and_metered_once(
    lab: Lab, home: Path, hook: str
) -> None:
    """Behind the packet socket at `input`, which sees both; before it at `output`."""
    rules = (
        f"add table inet lossy; add chain inet lossy {hook} "
        f"{{ type filter hook {hook} priority 0; }}; "
        f"add rule inet lossy {hook} tcp sport 443 numgen inc mod 9 == 8 drop"
    )
    skip = len(lab.ledger())
    long = Scenario(n=5, chunks=200, piece_bytes=300).marker
    argv = curl(4, "--http1.1")
    argv[-1] = json.dumps({**json.loads(argv[-1]), "stream": True, "messages": long})
    done = lab.run(["nft", rules])
    assert done.returncode == 0, done.stderr
    try:
        done, told = run(lab, home, *argv)
    finally:
        assert lab.run(["nft", "delete table inet lossy"]).returncode == 0
    assert done.returncode == 0, done.stderr
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}


def test_a_command_whose_meter_is_stopped_is_metered_afterwards(lab: Lab, home: Path) -> None:
    """Stopped as a whole for as long as its command runs: the kernel's buffer holds it all."""
    skip = len(lab.ledger())
    asked = "; ".join(shlex.join(curl(n, "--http1.1")) for n in range(3))
    script = f"kill -STOP $PPID; {asked}; kill -CONT $PPID"
    done, told = run(lab, home, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
