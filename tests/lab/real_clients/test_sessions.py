"""Sessions, turns and agents of real clients: as each of them says it, and never mixed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER, Bench
from tests.lab.real_clients.programs import CLAUDE, CODEX, GEMINI, OPENCODE, Program
from tests.lab.real_clients.test_metered import recognised
from tests.lab.real_clients.test_proxied import installed_with_all
from tests.lab.test_proxied_clients import ProxyBench
from tests.support.lab.lab import Lab

pytestmark = pytest.mark.lab

Install = Callable[[Program], Path]


@pytest.fixture(scope="module")
def proxied(lab: Lab, project: Path, python: str) -> ProxyBench:
    """See ProxyBench."""
    return ProxyBench(lab, project, python, "sessions")


def paired(
    served: list[dict[str, Any]], events: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each request said of who asks, with its event, in the order of the requests."""
    by_id = {event["response_id"]: event for event in events}
    assert len(by_id) == len(events) == len(served)
    pairs = [(entry["said"], by_id[entry["response_id"]]) for entry in served]
    return sorted(pairs, key=lambda pair: pair[1]["at"])


def asked_as(said: dict[str, Any], event: dict[str, Any]) -> None:
    """Claude Code's words stand in the event."""
    assert event["session_id"] == said["x-claude-code-session-id"]
    assert event["session_source"] == "client"
    assert event["turn_id"] == said["x-claude-code-prompt-id"]
    assert event["request_class"] == said["x-claude-code-request-class"]
    assert event["retry_count"] == int(said["x-stainless-retry-count"])
    assert said["user-agent"].startswith(f"{event['client']}/{event['client_version']} ")
    user = json.loads(said["body"]["metadata"]["user_id"])
    assert user["session_id"] == event["session_id"]
    assert user["device_id"] not in json.dumps(event)


def json_of(bench: Bench, *arguments: str) -> Any:
    """What a command prints with --json over the service's store."""
    environment = bench.lab.environment(HALTON_METER_HOME=str(bench.service.home))
    command = [*HALTON_METER, *arguments, "--json"]
    done = bench.lab.run(command, env=environment, user=bench.lab.user)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_sessions_of_claude_code_at_once_with_a_sub_agent(
    bench: Bench, installed: Install
) -> None:
    program = CLAUDE[-1]
    claude = installed(program)
    recognised(bench, claude)
    bench.service.settle()
    bench.service.known_ids.update(event["id"] for event in bench.service.events())
    skip = len(bench.lab.ledger())
    prompts = [
        "say lab[n=5&chunks=30&delay_ms=30&agent=general-purpose]",
        "say lab[n=7&chunks=30&delay_ms=30]",
    ]
    clients = [
        bench.lab.popen(
            [str(claude), "-p", prompt, "--model", "claude-sonnet-4-5", "--output-format", "json"],
            user=bench.lab.user,
            cwd=bench.project,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for prompt in prompts
    ]
    said = [json.loads(client.communicate(timeout=180)[0]) for client in clients]
    bench.service.settle()
    known = bench.service.known_ids
    events = [event for event in bench.service.events() if event["id"] not in known]
    pairs = paired(bench.lab.ledger()[skip:], events)
    for words, event in pairs:
        asked_as(words, event)
        assert event["client_version"] == program.version
    for client, result in zip(clients, said, strict=True):
        mine = [event for event in events if event["session_id"] == result["session_id"]]
        assert {event["pid"] for event in mine} == {client.pid}
        cost = sum(Decimal(event["list_usd"]) for event in mine)
        assert abs(cost - Decimal(str(result["total_cost_usd"]))) < Decimal("1e-9")
    alone = {event["turn_id"] for event in events if event["session_id"] == said[1]["session_id"]}
    assert len(alone) == 1  # what comes back from a sub-agent may begin a turn of its own
    assert len({event["session_id"] for event in events}) == 2

    with_agent = json_of(bench, "session", "show", said[0]["session_id"])
    labels = [agent["agent_label"] for agent in with_agent["agents"]]
    assert labels == ["main", "general-purpose"], with_agent["agents"]
    assert with_agent["session"]["list_usd"] == with_agent["requests"][-1]["running_list_usd"]
    listed = json_of(bench, "session", "list")
    total = sum(Decimal(each["list_usd"] or 0) for each in listed["sessions"])
    total += Decimal(listed["without_session"]["list_usd"] or 0)
    assert total == Decimal(json_of(bench, "report")["totals"]["list_usd"])


def test_codex_over_its_websocket(proxied: ProxyBench) -> None:
    codex = installed_with_all(proxied.lab, CODEX[-1], 1)
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex"]
    seen = proxied.observe([*command, "say lab[n=5&chunks=6]"], CODEX_API_KEY="made-up")
    for said, event in paired(seen.served, seen.events):
        told = json.loads(said["body"]["client_metadata"]["x-codex-turn-metadata"])
        assert event["session_id"] == told["session_id"] == said["session-id"]
        assert event["session_source"] == "client"
        assert event["turn_id"] == (told["turn_id"] or None)
        assert (event["agent"], event["request_class"]) == ("/root", told["request_kind"])
        assert event["agent_id"] == told["thread_id"]
        assert (event["client"], event["client_version"]) == ("codex_exec", "0.171.0")
        assert told["installation_id"] not in json.dumps(event)
    assert {event["turn_id"] is not None for event in seen.events} == {False, True}


@pytest.mark.slow
def test_codex_before_it_named_its_agents(proxied: ProxyBench) -> None:
    codex = installed_with_all(proxied.lab, CODEX[2], 1)
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex"]
    seen = proxied.observe([*command, "say lab[n=5&chunks=6]"], CODEX_API_KEY="made-up")
    for said, event in paired(seen.served, seen.events):
        told = json.loads(said["body"]["client_metadata"]["x-codex-turn-metadata"])
        assert event["session_id"] == told["session_id"] == said["session_id"]
        assert event["turn_id"] == (told["turn_id"] or None)
        assert event["agent"] == "/root"


@pytest.mark.slow
def test_opencode(proxied: ProxyBench, installed: Install) -> None:
    opencode = installed(OPENCODE[-1])
    command = [str(opencode), "run", "--model", "anthropic/claude-sonnet-4-5"]
    seen = proxied.observe([*command, "say lab[n=7&chunks=6]"])
    assert seen.events
    for said, event in paired(seen.served, seen.events):
        assert event["session_id"] == said["x-opencode-session-id"]
        assert (event["agent"], event["client"]) == ("main", "opencode")
        assert event["client_version"] == OPENCODE[-1].version


@pytest.mark.slow
def test_gemini_cli_with_a_key_names_no_session(proxied: ProxyBench) -> None:
    """The process at the root of its tree stands for it: it starts itself a second time."""
    gemini = installed_with_all(proxied.lab, GEMINI[0], 1)
    command = ["node", str(gemini), "--skip-trust", "--model", "gemini-2.5-flash"]
    seen = proxied.observe([*command, "-p", "say lab[n=5&chunks=6]"])
    assert seen.events
    assert {event["session_source"] for event in seen.events} == {"process"}
    assert len({event["session_id"] for event in seen.events}) == 1
    assert {event["client_version"] for event in seen.events} == {GEMINI[0].version}


@pytest.mark.slow
def test_an_older_claude_code(proxied: ProxyBench, installed: Install) -> None:
    claude = installed(CLAUDE[0])
    command = [str(claude), "-p", "say lab[n=5&chunks=6]", "--output-format", "json"]
    seen = proxied.observe([*command, "--model", "claude-sonnet-4-5"])
    said = json.loads(seen.output)
    assert {event["session_id"] for event in seen.events} == {said["session_id"]}
    assert {event["client_version"] for event in seen.events} == {CLAUDE[0].version}


def test_two_runs_of_an_sdks_script_at_once_are_two_sessions(bench: Bench) -> None:
    """The script names no session; both have one parent, and one program."""
    script = str(CLIENTS / "sdk.py")
    shell = f'for n in 1 2; do "{bench.python}" "{script}" anthropic sync 1 2 & done; wait'
    seen = bench.observe(["/bin/sh", "-c", shell])
    assert {event["session_source"] for event in seen.events} == {"process"}
    by_pid: dict[int, set[str]] = {}
    for event in seen.events:
        by_pid.setdefault(event["pid"], set()).add(event["session_id"])
        assert event["client"] == "anthropic-python"
        assert event["retry_count"] == 0
    assert len(by_pid) == 2
    assert all(len(names) == 1 for names in by_pid.values())
    assert len({name for names in by_pid.values() for name in names}) == 2
