"""One conversation, seen by uprobes, in its recorded capture and by the proxy: equal events."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER, Service
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

CALLS = 25
# What may differ in any case: who saw it, and when.
OWN = ("source", "at", "ttft_ms", "duration_ms")
# What a capture cannot know.
OF_THE_PROCESS = (
    *("pid", "process", "argv", "cwd", "user", "project", "git_branch"),
    *("session_id", "session_source"),  # where the client names none
)
# What differs because the conversation was held a second time.
WITHOUT_AN_ID = 5  # embeddings, a transcription, errors
OF_THE_RUN = ("id", "response_id", "pid", "session_id")
IN_ORDER = ("provider", "endpoint", "tokens", "outcome", "response_id")


class Recording:
    """What goes over the lab's loopback, in a file."""

    def __init__(self, lab: Lab, file: Path) -> None:
        self.file = file
        # -B: MiB for what comes while it writes.
        command = ["dumpcap", "-i", "lo", "-B", "16", "-w", str(file), "-f", "tcp port 443"]
        self._process = lab.popen(command, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: file.exists() and file.stat().st_size, "dumpcap's start")

    def stop(self) -> None:
        """Return when all packets so far are in the file."""
        self._process.send_signal(signal.SIGINT)
        said = self._process.communicate(timeout=120)[1]
        assert self._process.returncode == 0, said
        assert "/0 (" in said, said  # received/dropped


class Sightings:
    """The conversation held twice: under uprobes and recorded; then by the proxy, under uprobes."""

    def __init__(self, lab: Lab, service: Service, project: Path, python: str) -> None:
        self._lab, self._service = lab, service
        self._project, self._python = project, python
        folder = lab.user.home / "parity"
        folder.mkdir()
        os.chown(folder, lab.user.uid, lab.user.gid)
        self._folder = folder
        recording = Recording(lab, lab.folder / "parity.pcapng")
        self.uprobes = self._metered({"RUN": "first", "SSLKEYLOGFILE": str(folder / "keys.log")})
        recording.stop()
        self.capture = self._replayed(recording.file)
        home = folder / "home"
        environment = {"RUN": "second", "HALTON_METER_HOME": str(home)}
        proxy = [*HALTON_METER, "run", "--via", "proxy", "--"]
        self.beside = self._metered(environment, proxy)
        self.proxy = self._stored(home)

    def _metered(self, extra: dict[str, str], wrapper: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Hold the conversation; what the service saw of it by uprobes."""
        self._service.settle()
        known = {event["id"] for event in self._service.events()}
        argv = [*wrapper, self._python, str(CLIENTS / "conversation.py")]
        environment = self._lab.environment(**extra)
        done = self._lab.run(argv, user=self._lab.user, cwd=self._project, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == CALLS, done.stdout
        self._service.settle()
        events = [event for event in self._service.events() if event["id"] not in known]
        self._service.known_ids.update(event["id"] for event in events)
        return events

    def _replayed(self, capture: Path) -> list[dict[str, Any]]:
        keys = str(self._folder / "keys.log")
        os.chown(capture, self._lab.user.uid, self._lab.user.gid)  # the person reads it
        argv = [*HALTON_METER, "replay", "--json", "--keys", keys, str(capture)]
        done = self._lab.run(argv, env=self._lab.environment())
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _stored(self, home: Path) -> list[dict[str, Any]]:
        environment = self._lab.environment(HALTON_METER_HOME=str(home))
        argv = [*HALTON_METER, "events", "--json", "--limit", "1000"]
        done = self._lab.run(argv, user=self._lab.user, env=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def seen(lab: Lab, service: Service, project: Path, python: str) -> Sightings:
    """See Sightings."""
    return Sightings(lab, service, project, python)


def comparable(events: list[dict[str, Any]], *ignored: str) -> list[dict[str, Any]]:
    """Events in an order of their own, without what may differ."""
    hidden = {*OWN, *ignored}
    ordered = sorted(events, key=lambda event: json.dumps([event[name] for name in IN_ORDER]))
    return [{k: v for k, v in event.items() if k not in hidden} for event in ordered]


def test_every_call_is_an_event_of_each_source(seen: Sightings) -> None:
    for source, events in (
        ("uprobes", seen.uprobes),
        ("pcap", seen.capture),
        ("proxy", seen.proxy),
        ("uprobes", seen.beside),
    ):
        assert {event["source"] for event in events} == {source}
        assert len(events) == CALLS, source


def test_the_capture_gives_the_events_of_the_uprobes(seen: Sightings) -> None:
    expected = comparable(seen.uprobes, "id", *OF_THE_PROCESS)
    assert comparable(seen.capture, "id", *OF_THE_PROCESS) == expected
    ids = {event["id"] for event in seen.uprobes if event["response_id"]}
    assert ids == {event["id"] for event in seen.capture if event["response_id"]}
    assert len(ids) == CALLS - WITHOUT_AN_ID


def test_the_proxy_gives_the_events_that_uprobes_gave_without_it(seen: Sightings) -> None:
    """The process, its project and its branch included."""
    assert comparable(seen.proxy, *OF_THE_RUN) == comparable(seen.uprobes, *OF_THE_RUN)
    assert {event["project"] for event in seen.proxy} == {"acme"}


def test_uprobes_and_the_proxy_at_once_give_one_event(seen: Sightings) -> None:
    """Each exchange has one id, also without one of the provider's, and the client's process.

    What mitmproxy says upstream is nobody's exchange.
    """
    assert comparable(seen.proxy) == comparable(seen.beside)
    assert len({event["id"] for event in seen.proxy}) == CALLS
