"""HTTP/3: a real client's packets, decrypted with the keys that it writes, and metered exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER, assert_metered, stored_events
from tests.lab.test_key_log import as_sudo, by_id, run
from tests.lab.test_key_log import home as home
from tests.lab.test_key_log_service import KeyLogService
from tests.lab.test_key_log_service import key_log as key_log
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario

pytestmark = pytest.mark.lab


def client(count: int, scenario: Scenario, stream: bool = True) -> list[str]:
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 64,
        "stream": stream,
        "messages": [{"role": "user", "content": scenario.marker}],
    }
    place = ["api.anthropic.com", "/v1/messages", str(count), json.dumps(body)]
    return [sys.executable, str(CLIENTS / "http3.py"), *place]


@pytest.mark.parametrize("update", ["0", "1"], ids=["", "a key update"])
def test_requests_over_http3_are_metered_exactly(
    lab: Lab, home: Path, project: Path, update: str
) -> None:
    skip = len(lab.ledger())
    argv = ["env", f"KEY_UPDATE={update}", *client(6, Scenario(n=4, chunks=60))]
    done, told = run(lab, home, *argv, project=project)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["200"] * 6
    served, events = lab.ledger()[skip:], stored_events(lab, home / "data")
    assert {entry["http"] for entry in served} == {"http/3"}
    assert_metered(served, events, "keylog")
    assert told["losses"] == {}
    assert told["connections"]["metered"] == told["connections"]["seen"] == 1
    assert {event["project"] for event in events} == {"acme"}
    assert all("http3.py" in " ".join(event["argv"]) for event in events)


def test_requests_before_the_handshake_are_metered_exactly(
    lab: Lab, home: Path, project: Path
) -> None:
    """0-RTT: the second connection goes on with the first one's session."""
    skip = len(lab.ledger())
    argv = ["env", "ZERO_RTT=1", *client(4, Scenario(n=4, chunks=20))]
    done, told = run(lab, home, *argv, project=project)
    assert done.returncode == 0, done.stderr
    *answers, early = done.stdout.splitlines()
    assert [line.split()[0] for line in answers] == ["200"] * 4
    assert early == "early True"
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
    assert told["connections"]["metered"] == told["connections"]["seen"] == 2


def test_without_its_keys_the_connection_is_named(lab: Lab, home: Path) -> None:
    elsewhere = home / "elsewhere.log"
    argv = ["env", f"SSLKEYLOGFILE={elsewhere}", *client(1, Scenario(n=4), stream=False)]
    done, told = run(lab, home, *argv)
    assert done.returncode == 0, done.stderr
    assert "no request was metered; what the command spent is not known" in done.stderr
    assert "it wrote no TLS keys. Use: turn HTTP/3 off in the program\n" in done.stderr
    assert told["connections"]["metered"] == 0
    assert told["connections"]["seen"] == 1


def test_a_recording_has_http3_and_replays(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    file = home / "recorded.pcapng"
    command = [*HALTON_METER, "record", str(file), "--", *client(3, Scenario(n=4, chunks=60))]
    done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert "recorded: 1 connection" in done.stderr
    metered = stored_events(lab, home / "data")
    replay = [*HALTON_METER, "replay", "--json", str(file)]
    said = lab.run(replay, user=lab.user, env=as_sudo(lab, home))
    assert said.returncode == 0, said.stderr
    assert "not read" not in said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert_metered(lab.ledger()[skip:], events, "pcap")
    same = ("id", "tokens", "list_usd", "outcome", "ttft_ms", "duration_ms")
    assert by_id(events, same) == by_id(metered, same)


def test_the_service_meters_http3(lab: Lab, key_log: KeyLogService) -> None:
    skip = len(lab.ledger())
    key_log.client(*client(3, Scenario(n=2, chunks=20)))
    events = key_log.events(3)
    assert_metered(lab.ledger()[skip:], events, "keylog")
    found = key_log.status()
    assert found is not None
    assert (found["losses"], found["outages"]) == ({}, [])
    assert all("http3.py" in " ".join(event["argv"] or ()) for event in events)
