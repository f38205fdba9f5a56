"""Codex as it is set up by default: all that it says to a provider is metered, and no proxy needed.

It has two TLS stacks. Since about 0.120 its turns go over WebSocket, through rustls; HTTPS goes
through OpenSSL: to providers of one's own, and when WebSocket fails. With a variable that names a
certificate authority, all of it goes through rustls.
"""

from __future__ import annotations

import pytest

from tests.lab.conftest import HALTON_METER, Bench, assert_metered, stored_events
from tests.lab.real_clients.programs import CODEX, Program
from tests.lab.real_clients.results import note
from tests.lab.real_clients.test_metered import exact, newest_first, recognised
from tests.lab.real_clients.test_proxied import installed_with_all
from tests.support.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

FIRST_WITH_WEBSOCKET = "0.130.0-linux-x64"  # of those tried
EXEC = ("exec", "--skip-git-repo-check", "--model", "gpt-5-codex")
OWN_PROVIDER = (
    *("-c", 'model_provider="own"'),
    "-c",
    'model_providers.own={name="own",base_url="https://api.openai.com/v1",'
    'wire_api="responses",env_key="OPENAI_API_KEY"}',
)


def without_authority(lab: Lab) -> dict[str, str]:
    """The lab's environment, with nothing in it that names a certificate authority."""
    environment = lab.environment(CODEX_API_KEY="made-up")
    return {name: at for name, at in environment.items() if at != environment["SSL_CERT_FILE"]}


def speaks_websocket(program: Program) -> bool:
    versions = [each.version for each in CODEX]
    return versions.index(program.version) >= versions.index(FIRST_WITH_WEBSOCKET)


WITH_WEBSOCKET = [each for each in CODEX if speaks_websocket(each)]


@pytest.mark.usefixtures("trusted_by_the_system")
@pytest.mark.parametrize("program", newest_first(CODEX), ids=str)
def test_https_is_metered_exactly(bench: Bench, program: Program) -> None:
    codex = installed_with_all(bench.lab, program, 1)
    recognised(bench, codex)
    command = [str(codex), *EXEC]
    if speaks_websocket(program):
        command += OWN_PROVIDER
    prompt = "say lab[n=5&chunks=6]"
    seen = bench.observe([*command, prompt], stdin=-3, env=without_authority(bench.lab))
    assert [entry["n"] for entry in seen.served] == [5]
    assert seen.served[0]["http"] == "http/1.1"
    exact(seen, 1)
    (event,) = seen.events
    assert event["process"] == str(codex)
    assert event["user"] == "labrat"
    assert prompt not in event["argv"]
    version = program.version.partition("-")[0]
    note("Codex CLI, HTTPS", version, "OpenSSL, static and stripped")


@pytest.mark.usefixtures("trusted_by_the_system")
@pytest.mark.parametrize("program", newest_first(WITH_WEBSOCKET), ids=str)
def test_websocket_is_metered_exactly(bench: Bench, program: Program) -> None:
    codex = installed_with_all(bench.lab, program, 1)
    recognised(bench, codex)
    command = [str(codex), *EXEC, "say lab[n=20&chunks=6]"]
    seen = bench.observe(command, stdin=-3, env=without_authority(bench.lab))
    assert [(entry["http"], entry["n"]) for entry in seen.served] == [
        ("websocket", 0),
        ("websocket", 20),
    ]
    exact(seen, 2)
    version = program.version.partition("-")[0]
    note("Codex CLI, WebSocket", version, "rustls, static and stripped")


@pytest.mark.parametrize("program", newest_first(WITH_WEBSOCKET), ids=str)
def test_https_through_rustls_is_metered_exactly(bench: Bench, program: Program) -> None:
    """A variable names the authority: then its HTTPS goes through rustls, too, by HTTP/2."""
    codex = installed_with_all(bench.lab, program, 1)
    recognised(bench, codex)
    command = [str(codex), *EXEC, *OWN_PROVIDER, "say lab[n=5&chunks=6]"]
    environment = bench.lab.environment(CODEX_API_KEY="made-up")
    seen = bench.observe(command, stdin=-3, env=environment)
    assert [(entry["http"], entry["n"]) for entry in seen.served] == [("http/2", 5)]
    exact(seen, 1)
    note("Codex CLI, HTTPS by rustls", program.version.partition("-")[0], "rustls")


@pytest.mark.usefixtures("trusted_by_the_system")
def test_three_at_once_are_told_apart(bench: Bench) -> None:
    lab = bench.lab
    codex = installed_with_all(lab, CODEX[-1], 1)
    recognised(bench, codex)
    bench.service.settle()
    known = {event["id"] for event in bench.service.events()}
    skip = len(lab.ledger())
    command = [str(codex), *EXEC, "say lab[n=20&chunks=40&delay_ms=20]"]
    options = {"user": lab.user, "cwd": bench.project, "env": without_authority(lab)}
    clients = [lab.popen(command, **options, stdin=-3, stdout=-3, stderr=-3) for _ in range(3)]
    assert [client.wait(180) for client in clients] == [0, 0, 0]
    bench.service.settle()
    events = [event for event in bench.service.events() if event["id"] not in known]
    assert_metered(lab.ledger_of(6, skip), events)
    pids = sorted(event["pid"] for event in events)
    assert pids == sorted(client.pid for client in clients for _ in range(2))


@pytest.mark.usefixtures("trusted_by_the_system")
def test_a_run_meters_it_with_no_proxy(lab: Lab) -> None:
    codex = installed_with_all(lab, CODEX[-1], 1)
    home = lab.user.home / "codex-run"
    environment = without_authority(lab) | {"HALTON_METER_HOME": str(home)}
    command = [*HALTON_METER, "run", "--via", "uprobes", "--", str(codex), *EXEC]
    skip = len(lab.ledger())
    done = lab.run([*command, "say lab[n=5]"], env=environment, timeout_s=180)
    assert done.returncode == 0, done.stderr
    told = done.stderr[done.stderr.index("halton-meter: 2 requests") :]
    assert "--via proxy" not in told, told
    assert_metered(lab.ledger_of(2, skip), stored_events(lab, home))
