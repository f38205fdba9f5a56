"""Every client of `clients.toml`, in every way: exact, or named with its fix."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from halton_meter.cli.coverage import NO_SURE_FIX
from halton_meter.live.unmetered import CAUSES
from tests.lab.conftest import CLIENTS, HALTON_METER, assert_metered, stored_events
from tests.lab.real_clients.programs import Unavailable
from tests.lab.real_clients.results import WAYS, note
from tests.lab.real_clients.table import CLIENT_SECONDS_MAX, EXACT, TABLE, Client, installed
from tests.lab.test_clients import anthropic_body
from tests.lab.test_run import as_sudo
from tests.support.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.usefixtures("trusted_by_the_system")]

HOSTS = {"api.anthropic.com", "api.openai.com"}


@pytest.fixture
def home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lab.user.home / tmp_path_factory.mktemp("client").name
    folder.mkdir()
    (folder / "body.json").write_text(anthropic_body(3))
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("client", TABLE, ids=str)
def test_client(lab: Lab, home: Path, client: Client, way: str) -> None:
    expected = {"uprobes": client.uprobes, "key log": client.key_log, "proxy": client.proxy}[way]
    if not expected:
        pytest.skip("not tried this way")
    try:
        variables, version = installed(client)
    except Unavailable as reason:
        pytest.skip(f"cannot install {client.package}: {reason}")
    variables |= {"URL": "https://api.anthropic.com/v1/messages", "BODY": f"{home}/body.json"}
    variables |= {"HERE": str(home), "LIBRARIES": str(CLIENTS)}
    skip, summary, via = len(lab.ledger()), home / "summary.json", way.replace(" ", "")
    argv = [*HALTON_METER, "run", "--via", via, "--json-summary", str(summary), "--"]
    # As root on behalf of the lab's user, or as that user.
    who: dict[str, Any] = {"env": as_sudo(lab, home, **variables)}
    if way == "proxy":
        mine = lab.environment(HALTON_METER_HOME=str(home), **variables)
        who = {"env": mine, "user": lab.user}
    done = lab.run([*argv, "bash", "-c", client.script], **who, timeout_s=CLIENT_SECONDS_MAX)
    assert done.returncode == 0, done.stderr
    served, events = lab.ledger()[skip:], stored_events(lab, home, missing_ok=True)
    told = json.loads(summary.read_text())
    assert len(served) == client.count, (served, done.stderr)
    if expected == EXACT:
        assert told["requests"] == client.count, done.stderr
        assert_metered(served, events, via)
        assert "not metered" not in done.stderr, done.stderr
    else:
        assert events == []
        is_named(client, expected, told, done.stderr)
    result = EXACT if expected == EXACT else f"named: {CAUSES[expected]}"
    note(client.name, version, client.stack, way, result)


def is_named(client: Client, cause: str, told: Mapping[str, Any], said: str) -> None:
    """All that was sent is counted, with its host, stack and cause, and what to do is said."""
    parts = [part for part in told["connections"]["parts"] if part["cause"] is not None]
    assert {part["cause"] for part in parts} == {cause}, parts
    # All names lead to one address here, so a host that the address alone tells is one of several.
    assert all(HOSTS & set(part["host"].split(" or ")) for part in parts), parts
    # Which library that would be is not known of each, nor to who sees packets alone.
    if cause not in ("proxy_ignored", "no_keys"):
        named = client.named or client.stack.partition(",")[0]
        assert {part["stack"] for part in parts} == {named}, parts
    lines = [line for line in said.splitlines() if "not metered: " in line]
    assert lines, said
    fixes = (". Use: ", NO_SURE_FIX)
    assert all(CAUSES[cause] in line and any(fix in line for fix in fixes) for line in lines), said
