"""Codex as it is set up by default: HTTPS through its OpenSSL is metered, and no proxy is needed.

Since about 0.120 its turns go over WebSocket, through rustls, which is not probed; HTTPS is left
for providers of one's own, and for when WebSocket fails. `status` and `run` say what is not seen.
With a variable that names a certificate authority, all of it goes through rustls.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER, Bench
from tests.lab.real_clients.programs import CODEX, Program
from tests.lab.real_clients.results import note
from tests.lab.real_clients.test_metered import exact, newest_first, recognised
from tests.lab.real_clients.test_proxied import installed_with_all
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow]

FIRST_WITH_WEBSOCKET = "0.130.0-linux-x64"  # of those tried
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


@pytest.mark.usefixtures("trusted_by_the_system")
@pytest.mark.parametrize("program", newest_first(CODEX), ids=str)
def test_https_is_metered_exactly(bench: Bench, program: Program) -> None:
    codex = installed_with_all(bench.lab, program, 1)
    recognised(bench, codex)
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex"]
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
@pytest.mark.parametrize("authority", ["of-the-system", "by-variable"])
def test_status_says_what_is_not_seen_and_what_to_do(bench: Bench, authority: str) -> None:
    lab, home = bench.lab, bench.service.home
    codex = installed_with_all(lab, CODEX[-1], 1)
    recognised(bench, codex)
    prompt = "say lab[n=5&chunks=100&delay_ms=100]"
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex", prompt]
    environment = lab.environment(CODEX_API_KEY="made-up")
    if authority == "of-the-system":
        environment = without_authority(lab)
    skip = len(lab.ledger())
    client = lab.popen(
        command, user=lab.user, cwd=bench.project, env=environment, stdin=-3, stdout=-3, stderr=-3
    )

    def told() -> dict[str, Any] | None:
        lines = (bench.service.status() or {}).get("coverage", ())
        return next((line for line in lines if line["pid"] == client.pid), None)

    line = wait_until(told, "codex in the coverage")
    environment = lab.environment(HALTON_METER_HOME=str(home))
    text = lab.run([*HALTON_METER, "status"], user=lab.user, env=environment).stdout
    assert client.wait(120) == 0
    # It asks for its models over HTTPS: by then there is something that is metered.
    states = {("rustls", "unsupported")}
    if authority == "of-the-system":
        states.add(("OpenSSL", "metered"))
    assert (line["stack"], line["state"]) in states
    assert line["library"] == str(codex)
    assert "rustls is not probed; use `halton-meter run --via proxy`" in line["advice"]
    assert "use `halton-meter run --via proxy`" in text
    bench.service.settle()
    served = {entry["response_id"] for entry in lab.ledger()[skip:]}
    assert served
    assert served.isdisjoint(event["response_id"] for event in bench.service.events())


@pytest.mark.usefixtures("trusted_by_the_system")
def test_a_run_tells_at_its_end_what_it_may_not_have_seen(lab: Lab) -> None:
    codex = installed_with_all(lab, CODEX[-1], 1)
    home = lab.user.home / "codex-run"
    environment = without_authority(lab) | {"HALTON_METER_HOME": str(home)}
    command = [
        str(codex),
        "exec",
        "--skip-git-repo-check",
        "--model",
        "gpt-5-codex",
        "say lab[n=5]",
    ]
    done = lab.run(
        [*HALTON_METER, "run", "--via", "uprobes", "--", *command],
        env=environment,
        timeout_s=120,
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr[done.stderr.index("halton-meter: 0 requests") :]
    assert f"perhaps not all of {codex} is metered:" in told
    assert "rustls is not probed; use `halton-meter run --via proxy`" in told
