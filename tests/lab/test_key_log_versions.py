"""Live packets of a Go program with a key log of its own: each version of TLS, resumed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.lab.conftest import HALTON_METER, Bench, assert_metered, stored_events
from tests.lab.real_clients.test_metered import recognised
from tests.lab.test_key_log import as_sudo, curl, run
from tests.lab.test_key_log import home as home
from tests.support.go_programs import GO, go_program
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario

pytestmark = [pytest.mark.lab, pytest.mark.skipif(GO is None, reason="needs Go")]

SOURCE = Path(__file__).parents[1] / "support" / "lab" / "clients" / "keylog.go"
URL = "https://api.anthropic.com/v1/messages"
CONNECTIONS = 4


@pytest.fixture
def client(lab: Lab) -> Path:
    """The program, where the lab's user reaches it."""
    target = lab.folder / "programs" / "keylog-client"
    target.parent.mkdir(exist_ok=True)
    target.parent.chmod(0o755)
    if not target.exists():
        shutil.copy2(go_program(SOURCE, ("-ldflags=-s -w",), GO111MODULE="off"), target)
    target.chmod(0o755)
    return target


def asked(lab: Lab, client: Path, version: str) -> tuple[list[str], list[str]]:
    """What gives the run's environment, and the command.

    A wrapper behind `run` would be named where the client ends before anybody looks.
    """
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 64,
        "stream": True,
        "messages": [{"role": "user", "content": Scenario(n=3, chunks=40).marker}],
    }
    given = [f"CA={lab.folder / 'ca.pem'}", f"BODY={json.dumps(body)}"]
    return ["env", *given], [str(client), URL, version, str(CONNECTIONS)]


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_go_s_own_key_log_resumed_by_ticket_or_psk(
    lab: Lab, home: Path, client: Path, version: str, project: Path
) -> None:
    skip = len(lab.ledger())
    environment, command = asked(lab, client, version)
    done, told = run(lab, home, *command, before=environment, project=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"TLS {version} {'false' if number == 0 else 'true'}" for number in range(CONNECTIONS)
    ]
    events = stored_events(lab, home / "data")
    assert_metered(lab.ledger()[skip:], events, "keylog")
    assert told["losses"] == {}
    assert told["connections"]["metered"] == told["connections"]["seen"] == CONNECTIONS
    assert {event["process"].rpartition("/")[2] for event in events} == {"keylog-client"}


@pytest.mark.parametrize("kind", ["curl", "go"])
def test_ids_of_events_are_those_that_uprobes_give(
    bench: Bench, home: Path, client: Path, kind: str
) -> None:
    """Two stores of the same requests, one by each witness."""
    lab = bench.lab
    before, argv = ([], curl(5, "--http2")) if kind == "curl" else asked(lab, client, "1.3")
    if kind == "go":
        recognised(bench, client)
    command = [*before, *HALTON_METER, "run", "--via", "keylog", "--", *argv]
    seen = bench.observe(command, env=as_sudo(lab, home), user=None)
    events = stored_events(lab, home / "data")
    assert len(seen.events) == len(seen.served) == (1 if kind == "curl" else CONNECTIONS)
    assert {event["source"] for event in seen.events} == {"uprobes"}
    assert {event["source"] for event in events} == {"keylog"}
    assert {event["id"] for event in events} == {event["id"] for event in seen.events}
