"""`run --via keylog`: real clients' packets and keys, exact; one event where uprobes watch, too."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from capture.pcap import PcapSource
from halton_meter.model import TlsChunk
from tests.lab.conftest import CLIENTS, HALTON_METER, Bench, assert_metered, stored_events
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario

pytestmark = pytest.mark.lab

URL = "https://api.anthropic.com/v1/messages"


@pytest.fixture
def home(lab: Lab, request: pytest.FixtureRequest) -> Path:
    made = lab.user.home / f"key-log-{abs(hash(request.node.name))}"
    made.mkdir()
    os.chown(made, lab.user.uid, lab.user.gid)
    return made


def as_sudo(lab: Lab, home: Path) -> dict[str, str]:
    return lab.environment(
        HALTON_METER_HOME=str(home / "data"),
        HOME=str(home),
        SUDO_UID=str(lab.user.uid),
        SUDO_GID=str(lab.user.gid),
        SUDO_USER=lab.user.name,
    )


def run(
    lab: Lab, home: Path, *argv: str, before: Sequence[str] = (), project: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    summary = home / "summary.json"
    command = [*HALTON_METER, "run", "--via", "keylog", "--json-summary", str(summary), "--", *argv]
    done = lab.run([*before, *command], env=as_sudo(lab, home), cwd=project)
    return done, json.loads(summary.read_text()) if summary.exists() else {}


def curl(n: int, *options: str) -> list[str]:
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": Scenario(n=n).marker}],
    }
    return ["curl", "-sS", "-o", "/dev/null", *options, URL, "-d", json.dumps(body)]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_is_metered_exactly(lab: Lab, home: Path, version: str, project: Path) -> None:
    skip = len(lab.ledger())
    done, told = run(lab, home, *curl(1, version), project=project)
    assert done.returncode == 0, done.stderr
    events = stored_events(lab, home / "data")
    assert_metered(lab.ledger()[skip:], events, "keylog")
    assert told["requests"] == 1
    assert told["losses"] == {}
    assert told["connections"]["metered"] == told["connections"]["seen"] == 1
    assert (home / "data").stat().st_uid == lab.user.uid


def test_an_sdk_is_metered_with_its_process(
    lab: Lab, home: Path, python: str, project: Path
) -> None:
    skip = len(lab.ledger())
    sdk = [python, str(CLIENTS / "sdk.py"), "openai", "sync,async-stream", "1", "5"]
    done, told = run(lab, home, *sdk, project=project)
    assert done.returncode == 0, done.stderr
    events = stored_events(lab, home / "data")
    assert_metered(lab.ledger()[skip:], events, "keylog")
    assert told["requests"] == 10
    assert {event["project"] for event in events} == {"acme"}
    assert {event["user"] for event in events} == {lab.user.name}


@pytest.mark.parametrize("client", ["fetch", "https"])
def test_node_is_metered_by_its_option(lab: Lab, home: Path, client: str, project: Path) -> None:
    skip = len(lab.ledger())
    node = ["node", str(CLIENTS / "node.mjs"), client, "1", "6", "stream"]
    done, told = run(lab, home, *node, project=project)
    assert done.returncode == 0, done.stderr
    events = stored_events(lab, home / "data")
    assert_metered(lab.ledger()[skip:], events, "keylog")
    assert told["losses"] == {}
    assert {event["process"].rpartition("/")[2] for event in events} == {"node"}
    assert len({event["pid"] for event in events}) == 1


def test_packets_and_probes_together_make_one_event_each(bench: Bench) -> None:
    script = "; ".join(shlex.join(curl(n, "--http1.1")) for n in range(4))
    home = bench.service.home
    environment = {**as_sudo(bench.lab, home), "HALTON_METER_HOME": str(home)}
    command = [*HALTON_METER, "run", "--via", "keylog", "--", "sh", "-c", script]
    seen = bench.observe(command, env=environment, user=None)
    assert len(seen.served) == 4
    assert len(seen.events) == 4
    assert {event["response_id"] for event in seen.events} == {
        entry["response_id"] for entry in seen.served
    }


def test_a_connection_without_keys_is_named(lab: Lab, home: Path) -> None:
    done, told = run(lab, home, "env", "-u", "SSLKEYLOGFILE", *curl(1))
    assert done.returncode == 0, done.stderr
    assert "no request was metered; what the command spent is not known" in done.stderr
    assert "it wrote no TLS keys. Use: sudo halton-meter run -- CMD\n" in done.stderr
    assert told["connections"]["metered"] == 0
    assert told["connections"]["seen"] == 1


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("device", "it is no regular file"),
        ("folder", "it is no regular file"),
        ("root's", "you may not write it"),
        ("nowhere", "the command has not made it"),
    ],
)
def test_a_key_file_of_the_user_s_that_gives_no_keys_is_named_with_the_reason(
    lab: Lab, home: Path, kind: str, why: str
) -> None:
    keys = {"device": Path("/dev/null"), "folder": home, "nowhere": home / "no" / "keys.log"}.get(
        kind, home / "keys.log"
    )
    if kind == "root's":
        keys.touch()
    done, told = run(lab, home, *curl(1), before=["env", f"SSLKEYLOGFILE={keys}"])
    assert done.returncode == 0, done.stderr
    assert f"no keys from SSLKEYLOGFILE={keys}: {why}. Use: unset SSLKEYLOGFILE" in done.stderr
    assert told["keys_error"] == f"no keys from SSLKEYLOGFILE={keys}: {why}"


def test_a_key_file_that_is_long_already_is_read_from_near_its_end(lab: Lab, home: Path) -> None:
    keys, skip = home / "keys.log", len(lab.ledger())
    line = "CLIENT_RANDOM {:064x} " + "0" * 96 + "\n"
    with keys.open("w") as file:
        file.writelines(line.format(number) for number in range(1_000_000))
    os.chown(keys, lab.user.uid, lab.user.gid)
    done, told = run(lab, home, *curl(1), before=["env", f"SSLKEYLOGFILE={keys}"])
    assert done.returncode == 0, done.stderr
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["keys_error"] is None


def test_a_connection_that_its_keys_do_not_open_is_named_and_not_metered(
    lab: Lab, home: Path
) -> None:
    suite = ["--tls-max", "1.2", "--ciphers", "ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0"]
    done, told = run(lab, home, *curl(1, *suite))
    assert done.returncode == 0, done.stderr
    assert "no request was metered; what the command spent is not known" in done.stderr
    assert "curl to api.anthropic.com, 1 connection: its TLS keys did not open it" in done.stderr
    assert (told["connections"]["metered"], told["connections"]["seen"]) == (0, 1)
    assert [each["cause"] for each in told["unmetered"]] == ["not_decrypted"]


def test_the_keys_are_deleted_and_the_exit_code_is_the_command_s(lab: Lab, home: Path) -> None:
    done, _ = run(lab, home, "sh", "-c", 'echo "$SSLKEYLOGFILE"; exit 7')
    assert done.returncode == 7
    assert done.stdout.strip().endswith("keys.log")
    assert not Path(done.stdout.strip()).parent.exists()


def test_without_the_right_to_capture_the_command_is_not_started(lab: Lab, home: Path) -> None:
    command = [*HALTON_METER, "run", "--via", "keylog", "--", "touch", str(home / "ran")]
    done = lab.run(command, env=as_sudo(lab, home), user=lab.user)
    assert done.returncode == 1
    assert "to capture packets needs root" in done.stderr
    assert "sudo halton-meter run --via keylog" in done.stderr
    assert not (home / "ran").exists()


def test_a_recording_holds_the_command_s_provider_connections_and_replays(
    lab: Lab, home: Path
) -> None:
    skip = len(lab.ledger())
    file = home / "recorded.pcapng"
    script = f"{shlex.join(curl(1))}; {shlex.join(curl(2, '--http2'))}"
    command = [*HALTON_METER, "record", str(file), "--", "sh", "-c", script]
    done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert "recorded: 2 connections" in done.stderr
    assert file.stat().st_uid == lab.user.uid
    replay = [*HALTON_METER, "replay", "--json", str(file)]
    said = lab.run(replay, user=lab.user, env=as_sudo(lab, home))
    assert said.returncode == 0, said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert_metered(lab.ledger()[skip:], events, "pcap")


def test_a_recording_by_uprobes_needs_no_keys_and_replays_the_same(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    file = home / "recorded.pcapng"
    script = f"{shlex.join(curl(1))}; {shlex.join(curl(2, '--http2'))}"
    command = [*HALTON_METER, "record", str(file), "--via", "uprobes", "--"]
    keyless = ["env", "-u", "SSLKEYLOGFILE", "sh", "-c", script]
    done = lab.run([*command, *keyless], env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert f"recorded: 2 connections, {packets_in(done.stderr)} packets in {file}" in done.stderr
    assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (lab.user.uid, 0o600)
    metered = stored_events(lab, home / "data")
    said = lab.run([*HALTON_METER, "replay", "--json", str(file)], env=as_sudo(lab, home))
    assert said.returncode == 0, said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert_metered(lab.ledger()[skip:], events, "pcap")
    assert sorted(each["id"] for each in events) == sorted(each["id"] for each in metered)
    again = lab.run([*command, "true"], env=as_sudo(lab, home))
    assert (again.returncode, "exists already" in again.stderr) == (1, True)


def test_a_recording_through_the_proxy_needs_no_root(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    file = home / "recorded.pcapng"
    key = "sk-ant-a-key-of-nobody"
    secret = ("-H", f"x-api-key: {key}")
    script = f"{shlex.join(curl(1, *secret))}; {shlex.join(curl(2, '--http2', *secret))}"
    command = [*HALTON_METER, "record", str(file), "--via", "proxy", "--", "sh", "-c", script]
    environment = lab.environment(HALTON_METER_HOME=str(home / "data"), HOME=str(home))
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"packets in {file}; it holds prompts and answers" in done.stderr
    replay = [*HALTON_METER, "replay", "--json", str(file)]
    said = lab.run(replay, user=lab.user, env=environment)
    assert said.returncode == 0, said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert_metered(lab.ledger()[skip:], events, "pcap")
    assert Scenario(n=1).marker.encode() in plaintext_of(file)
    assert key.encode() not in plaintext_of(file)


@pytest.mark.slow
def test_a_recording_through_the_proxy_has_the_turns_of_websockets(
    lab: Lab, home: Path, python: str
) -> None:
    skip = len(lab.ledger())
    file = home / "recorded.pcapng"
    client = [python, str(CLIENTS / "sdk.py"), "aiohttp-websocket", "async", "1", "3"]
    environment = lab.environment(HALTON_METER_HOME=str(home / "data"), HOME=str(home))
    command = [*HALTON_METER, "record", str(file), "--via", "proxy", "--", *client]
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"packets in {file}" in done.stderr
    assert "WebSocket" not in done.stderr
    metered = stored_events(lab, home / "data")
    assert_metered(lab.ledger()[skip:], metered, "proxy")
    said = lab.run([*HALTON_METER, "replay", "--json", str(file)], user=lab.user, env=environment)
    assert said.returncode == 0, said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    assert_metered(lab.ledger()[skip:], events, "pcap")
    same = ("id", "tokens", "list_usd", "outcome", "ttft_ms", "duration_ms")
    assert by_id(events, same) == by_id(metered, same)


def by_id(events: list[dict[str, Any]], names: Sequence[str]) -> list[list[Any]]:
    """Those fields of each event, in the order of their ids."""
    return [
        [event[name] for name in names] for event in sorted(events, key=lambda each: each["id"])
    ]


def plaintext_of(file: Path) -> bytes:
    return b"".join(item.data for item in PcapSource([file]).items() if isinstance(item, TlsChunk))


def packets_in(said: str) -> str:
    found = re.search(r"([\d,]+) packets in", said)
    assert found is not None, said
    return found[1]


def test_a_recording_of_nothing_leaves_no_file(lab: Lab, home: Path) -> None:
    file = home / "recorded.pcapng"
    done = lab.run([*HALTON_METER, "record", str(file), "--", "true"], env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert f"nothing was recorded, so there is no {file}" in done.stderr
    assert not file.exists()


def test_a_redacted_recording_of_an_sdk_replays_and_holds_no_text(
    lab: Lab, home: Path, python: str
) -> None:
    skip = len(lab.ledger())
    file = home / "redacted.pcapng"
    sdk = [python, str(CLIENTS / "sdk.py"), "openai", "sync,async-stream", "1", "2"]
    script = f"{shlex.join(curl(1))}; {shlex.join(curl(2, '--http2'))}; {shlex.join(sdk)}"
    command = [*HALTON_METER, "record", str(file), "--redact", "--", "sh", "-c", script]
    done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    assert "proved: it gives the same" in done.stderr
    assert file.stat().st_uid == lab.user.uid
    replay = [*HALTON_METER, "replay", "--json", str(file)]
    said = lab.run(replay, user=lab.user, env=as_sudo(lab, home))
    assert said.returncode == 0, said.stderr
    events = [json.loads(line) for line in said.stdout.splitlines()]
    served = [entry for entry in lab.ledger()[skip:] if entry["state"] == "done"]
    tokens = sorted(entry["tokens"]["output"] for entry in served)
    assert sorted(event["tokens"]["output"] for event in events) == tokens
    assert all(event["list_usd"] is not None for event in events)
    look = [*HALTON_METER, "inspect", "--show-bodies", str(file)]
    shown = lab.run(look, user=lab.user, env=as_sudo(lab, home))
    assert shown.returncode == 0, shown.stderr
    raw = file.read_bytes()
    for n in (1, 2):
        marker = Scenario(n=n).marker
        assert marker not in shown.stdout
        assert marker.encode() not in raw
    assert [path.name for path in home.iterdir() if path.name.startswith((".", "halton"))] == []
