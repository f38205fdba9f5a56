"""Clients not written by us, metered exactly by `run --via proxy`: each against the ledger."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capture.processes.arguments import without_secrets
from tests.lab.conftest import CLIENTS, HALTON_METER, assert_metered, stored_events
from tests.lab.real_clients.results import note
from tests.lab.test_clients import (
    ALL_MODES,
    PACKAGES,
    anthropic_body,
    curl,
    said_version,
    version_of,
)
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import slow

pytestmark = pytest.mark.lab


@dataclass
class Proxied:
    """What a command did behind the proxy: its ledger, its events, what was told at its end."""

    output: str
    served: list[dict[str, Any]]
    events: list[dict[str, Any]]
    told: dict[str, Any]


class ProxyBench:
    """Runs commands under `halton-meter run --via proxy` as the lab's user, in one home."""

    def __init__(self, lab: Lab, project: Path, python: str, name: str) -> None:
        self.lab, self.project, self.python = lab, project, python
        self.home = lab.user.home / name
        self.home.mkdir()
        os.chown(self.home, lab.user.uid, lab.user.gid)
        self._known: set[str] = set()

    def observe(
        self, argv: Sequence[str], seconds: float = 90, more: Sequence[str] = (), **extra: str
    ) -> Proxied:
        """Run a command to its end; what it added to the ledger and to the store.

        `more` are options for `run`, `extra` is more of its environment.
        """
        lab = self.lab
        skip = len(lab.ledger())
        summary = self.home / "summary.json"
        options = ["--via", "proxy", "--json-summary", str(summary), *more]
        environment = lab.environment(HALTON_METER_HOME=str(self.home), **extra)
        done = lab.run(
            [*HALTON_METER, "run", *options, "--", *argv],
            user=lab.user,
            cwd=self.project,
            env=environment,
            timeout_s=seconds,
        )
        assert done.returncode == 0, done.stderr
        events = [
            event for event in stored_events(lab, self.home) if event["id"] not in self._known
        ]
        self._known.update(event["id"] for event in events)
        return Proxied(done.stdout, lab.ledger()[skip:], events, json.loads(summary.read_text()))


@pytest.fixture(scope="module")
def bench(lab: Lab, project: Path, python: str) -> ProxyBench:
    """See ProxyBench."""
    return ProxyBench(lab, project, python, "proxied")


def assert_proxied(seen: Proxied, program: str) -> None:
    """Each exchange of the ledger is one event, of the program, its project and its user."""
    assert_metered(seen.served, seen.events, "proxy")
    assert seen.told["requests"] == len(seen.served)
    assert seen.told["losses"] == {}
    for event in seen.events:
        assert Path(event["process"]).name.startswith(program), event
        assert (event["project"], event["git_branch"]) == ("acme", "topic/lab"), event
        assert event["user"] == "labrat"


@pytest.mark.parametrize(
    ("client", "modes"),
    [
        ("anthropic", ALL_MODES),
        slow("openai", ALL_MODES),
        slow("openai-responses", ALL_MODES),
        slow("openai-embeddings", "sync,async"),
        slow("groq", ALL_MODES),
        slow("gemini", ALL_MODES),
        slow("requests", "sync,stream"),
        slow("httpx2", "async,async-stream"),
    ],
)
def test_python_client(bench: ProxyBench, client: str, modes: str) -> None:
    argv = [bench.python, str(CLIENTS / "sdk.py"), client, modes, "1", "8"]
    seen = bench.observe(argv)
    assert len(seen.served) == 8 * len(modes.split(","))
    assert_proxied(seen, "python")
    assert {tuple(event["argv"]) for event in seen.events} == {without_secrets(argv)}
    assert len({event["pid"] for event in seen.events}) == 1
    package = PACKAGES.get(client, client.partition("-")[0])
    version = version_of(bench.lab, bench.python, package)
    note(f"{package} (Python)", version, "OpenSSL, shared", "proxy")


@pytest.mark.parametrize(
    ("client", "mode"),
    [("fetch", ("stream",)), slow("https", ()), slow("fetch", ()), slow("https", ("stream",))],
)
def test_node(bench: ProxyBench, client: str, mode: tuple[str, ...]) -> None:
    seen = bench.observe(["node", str(CLIENTS / "node.mjs"), client, "1", "6", *mode])
    assert len(seen.served) == 6
    assert_proxied(seen, "node")
    note("Node.js", said_version(["node", "--version"]), "OpenSSL", "proxy")


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        slow("--http1.1", "http/1.1", id="http1"),
        pytest.param("--http2", "http/2", id="http2"),
    ],
)
def test_curl_one_process_a_request(bench: ProxyBench, version: str, spoken: str) -> None:
    """Each process lives for one request, and is known all the same."""
    script = "".join(f"{shlex.join(curl(version))} -d '{anthropic_body(n)}' &\n" for n in range(10))
    seen = bench.observe(["sh", "-c", script + "wait"])
    assert len(seen.served) == 10
    assert {entry["http"] for entry in seen.served} == {spoken}
    assert_proxied(seen, "curl")
    assert len({event["pid"] for event in seen.events}) == 10
    note("curl", said_version(["curl", "--version"]), "OpenSSL, shared", "proxy")


def test_a_large_request_for_which_curl_expects_100_continue(bench: ProxyBench) -> None:
    asked = Scenario(n=9, chunks=40, piece_bytes=40_000).marker
    body = json.dumps(
        {
            "model": "claude-haiku-4-5",
            "padding": "x" * 3_000_000,
            "messages": [{"role": "user", "content": asked}],
        }
    )
    request = bench.lab.folder / "large-by-proxy.json"
    request.write_text(body)
    seen = bench.observe([*curl("--http1.1"), "-d", f"@{request}"])
    assert len(seen.output) > 1_600_000
    assert_proxied(seen, "curl")


def test_a_stream_that_the_client_leaves_is_aborted_with_what_is_known(bench: ProxyBench) -> None:
    body = anthropic_body(7, chunks=2000, delay_ms=5)
    seen = bench.observe(["sh", "-c", f"{shlex.join(curl('-N'))} -d '{body}' | head -c 300; true"])
    (event,) = seen.events
    assert event["outcome"] == "aborted"
    assert event["tokens"]["input"] == Scenario(n=7).fresh
    assert Path(event["process"]).name == "curl"


def test_hosts_that_are_nobodys_provider_are_not_looked_into(bench: ProxyBench) -> None:
    script = (
        "curl -sS --fail https://api.example.com/v1/messages -d hello --cacert"
        f" {bench.lab.folder}/ca.pem -v 2>&1 | grep -i issuer"
    )
    seen = bench.observe(["sh", "-c", script])
    assert "mitmproxy" not in seen.output
    assert "Halton" not in seen.output
    assert seen.events == []


def wget(lab: Lab, n: int, *options: str) -> list[str]:
    """A wget command to Anthropic's endpoint."""
    fields = ["--header=x-api-key: made-up", "--header=content-type: application/json"]
    command = ["wget", "-nv", "-t1", "-O/dev/null", *options, *fields]
    return [*command, f"--post-data={anthropic_body(n)}", "https://api.anthropic.com/v1/messages"]


def test_wget_trusts_us_by_a_copy_of_its_settings(bench: ProxyBench) -> None:
    """Its GnuTLS reads no variable, and would refuse our certificate after the handshake."""
    own = bench.lab.user.home / ".wgetrc"
    own.write_text("header = X-Own: kept\n")
    seen = bench.observe(["sh", "-c", "; ".join(shlex.join(wget(bench.lab, n)) for n in (1, 2, 3))])
    own.unlink()
    assert len(seen.served) == 3
    assert_proxied(seen, "wget")
    assert seen.told["unmetered"] == []
    note("wget", said_version(["wget", "--version"]), "GnuTLS, shared", "proxy")


def test_wget_that_reads_no_settings_works_from_the_first_time_and_is_named(
    bench: ProxyBench,
) -> None:
    trust = f"--ca-certificate={bench.lab.folder}/ca.pem"
    seen = bench.observe(wget(bench.lab, 5, "--no-config", trust))
    assert len(seen.served) == 1
    assert seen.events == []
    [row] = seen.told["unmetered"]
    assert Path(row["program"].partition(" ")[0]).name == "wget"
    assert (row["host"], row["connections"]) == ("api.anthropic.com", 1)
    assert (row["stack"], row["cause"]) == ("GnuTLS", "trust_not_configurable")


def test_a_client_that_ignores_the_proxy_is_named(bench: ProxyBench) -> None:
    """aiohttp reads no environment unless its program says so."""
    script = bench.project / "past.py"
    body = anthropic_body(7, chunks=40, delay_ms=20)  # seen while it lasts, as real answers are
    script.write_text(
        "import aiohttp, asyncio\n"
        "async def main():\n"
        "    async with aiohttp.ClientSession() as session:\n"
        "        url = 'https://api.anthropic.com/v1/messages'\n"
        f"        async with session.post(url, data={body!r}) as answer:\n"
        "            await answer.read()\n"
        "asyncio.run(main())\n"
    )
    seen = bench.observe([bench.python, str(script)])
    assert len(seen.served) == 1
    assert seen.events == []
    [row] = seen.told["unmetered"]
    assert row["program"].endswith("past.py")
    # The lab's hosts share an address; the script says which it was, if it was read in time.
    assert "api.anthropic.com" in row["host"].split(" or ")
    assert row["connections"] == 1
    assert (row["stack"], row["cause"]) == ("OpenSSL", "proxy_ignored")
    assert row["fix"] == "sudo halton-meter run -- CMD"
