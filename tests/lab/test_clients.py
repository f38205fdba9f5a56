"""Clients not written by us, metered exactly by the service: each against the server's ledger."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from capture.processes.arguments import without_secrets
from tests.lab.conftest import CLIENTS, HALTON_METER, Bench, Service, assert_metered, projects
from tests.lab.real_clients.results import note
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import first, slow

pytestmark = pytest.mark.lab

ALL_MODES = "sync,stream,async,async-stream"


@pytest.mark.parametrize(
    ("client", "modes", "count"),
    [
        ("anthropic", ALL_MODES, 20),
        ("openai", ALL_MODES, 20),
        ("openai-responses", ALL_MODES, 20),
        slow("openai-embeddings", "sync,async", 20),
        slow("groq", ALL_MODES, 20),
        slow("xai", ALL_MODES, 20),
        ("gemini", ALL_MODES, 20),
        slow("requests", "sync,stream", 5),
        ("aiohttp", "async,async-stream", 20),
        ("aiohttp-websocket", "async", 5),
        slow("httpx2", "async,async-stream", 20),
    ],
)
def test_python_client(bench: Bench, client: str, modes: str, count: int) -> None:
    argv = [bench.python, str(CLIENTS / "sdk.py"), client, modes, "1", str(count)]
    seen = bench.observe(argv)
    said = [json.loads(line) for line in seen.output.splitlines()]
    assert len(said) == len(seen.served) == count * len(modes.split(","))
    assert_metered(seen.served, seen.events)
    assert sorted(str(line["id"]) for line in said) == sorted(
        str(event["response_id"]) for event in seen.events
    )
    for event in seen.events:
        assert event["pid"] == seen.pid
        assert tuple(event["argv"]) == without_secrets(argv)
        assert event["argv"][0].endswith("/python")
        assert event["user"] == bench.lab.user.name
        assert event["cwd"] == str(bench.project)
        assert (event["project"], event["git_branch"]) == ("acme", "topic/lab")
        assert event["list_usd"] is not None
    package = PACKAGES.get(client, client.partition("-")[0])
    note(f"{package} (Python)", version_of(bench.lab, bench.python, package), "OpenSSL, shared")


PACKAGES = {"gemini": "google-genai", "httpx2": "httpx", "xai": "openai"}


def version_of(lab: Lab, python: str, package: str) -> str:
    """The version of a package that the clients' Python has."""
    ask = f"from importlib.metadata import version; print(version({package!r}))"
    return lab.run([python, "-c", ask]).stdout.strip()


def said_version(argv: Sequence[str]) -> str:
    """The first version number in what a program says of itself."""
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return str(re.findall(r"\d+(?:\.\d+)+", said)[0])


@pytest.mark.parametrize("client", ["fetch", "https"])
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_node(bench: Bench, client: str, mode: tuple[str, ...]) -> None:
    argv = ["node", str(CLIENTS / "node.mjs"), client, "1", "12", *mode]
    seen = bench.observe(argv)
    assert len(seen.served) == 12
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    assert projects(seen.events) <= {"acme"}
    note("Node.js", said_version(["node", "--version"]), "OpenSSL")


def anthropic_body(n: int, **options: float) -> str:
    """A request to Anthropic that asks for scenario `n`."""
    prompt = Scenario(n=n, **options).marker  # type: ignore[arg-type]  # ints where ints belong
    messages = [{"role": "user", "content": prompt}]
    return json.dumps({"model": "claude-haiku-4-5", "stream": n % 2 == 1, "messages": messages})


def curl(*options: str) -> list[str]:
    """A curl command to Anthropic's endpoint."""
    return [
        "curl",
        "-sS",
        *options,
        "-H",
        "x-api-key: made-up",
        "https://api.anthropic.com/v1/messages",
    ]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl_one_process_a_request(bench: Bench, version: str) -> None:
    script = "".join(
        f"curl -sS {version} https://api.anthropic.com/v1/messages -d '{anthropic_body(n)}' &\n"
        for n in range(10)
    )
    seen = bench.observe(["sh", "-c", script + "wait"])
    assert len(seen.served) == 10
    assert_metered(seen.served, seen.events)
    assert len({event["pid"] for event in seen.events}) == 10
    assert {Path(event["process"]).name for event in seen.events} == {"curl"}
    note("curl", said_version(["curl", "--version"]), "OpenSSL, shared")


def test_curl_parallel_streams_on_one_connection(bench: Bench) -> None:
    # A first request opens the connection that the 20 streams then share.
    one = [*curl("--http2"), "-d", anthropic_body(0)]
    others: list[str] = []
    for n in range(1, 21):
        others += ["--next", *curl("--http2")[1:], "-d", anthropic_body(n, chunks=30, delay_ms=2)]
    seen = bench.observe([*one, "-Z", "--parallel-max", "50", *others])
    assert len(seen.served) == 21
    assert {entry["http"] for entry in seen.served} == {"http/2"}
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}


def test_large_requests_and_answers(bench: Bench) -> None:
    body = json.dumps(
        {
            "model": "claude-haiku-4-5",
            "padding": "x" * 300_000,
            "messages": [
                {"role": "user", "content": Scenario(n=9, chunks=40, piece_bytes=40_000).marker}
            ],
        }
    )
    request = bench.lab.folder / "large.json"
    request.write_text(body)
    seen = bench.observe([*curl("--http1.1"), "-d", f"@{request}"])
    assert len(seen.output) > 1_600_000
    assert_metered(seen.served, seen.events)


def test_failed_requests_are_events_too(bench: Bench) -> None:
    for status, kind in ((429, "rate_limit"), (529, "server_error"), (401, "auth")):
        seen = bench.observe([*curl(), "-d", anthropic_body(3, status=status)])
        (event,) = seen.events
        assert (event["http_status"], event["error_class"]) == (status, kind)
        assert event["basis"] == "free"


def test_a_stream_that_the_client_leaves_is_aborted_with_what_is_known(bench: Bench) -> None:
    body = anthropic_body(7, chunks=2000, delay_ms=5)
    script = f"curl -sS -N https://api.anthropic.com/v1/messages -d '{body}' | head -c 300; true"
    (event,) = bench.observe(["sh", "-c", script]).events
    assert event["outcome"] == "aborted"
    assert event["tokens"]["input"] == Scenario(n=7).fresh


def test_noise_on_other_hosts_never_reaches_user_space(bench: Bench) -> None:
    before = bench.service.status()
    noise = json.dumps({"text": Scenario(piece_bytes=500_000).marker})
    for host in ("api.example.com", "files.example.org"):
        seen = bench.observe(["curl", "-sS", f"https://{host}/v1/messages", "-d", noise])
        assert len(seen.output) > 500_000
        assert seen.events == []
    after = bench.service.status()
    assert before is not None
    assert after is not None
    assert after["bytes"] == before["bytes"]


def test_another_users_processes_are_out_of_scope(bench: Bench) -> None:
    before = bench.service.status()
    seen = bench.observe([*curl(), "-d", anthropic_body(1)], user=bench.lab.other, cwd=Path("/"))
    after = bench.service.status()
    assert len(seen.served) == 1
    assert seen.events == []
    assert before is not None
    assert after is not None
    assert after["bytes"] == before["bytes"]


def test_a_variable_names_the_project(bench: Bench) -> None:
    environment = bench.lab.environment(HALTON_PROJECT="from the variable")
    (event,) = bench.observe([*curl(), "-d", anthropic_body(1)], env=environment).events
    assert event["project"] == "from the variable"


def test_the_store_holds_no_prompt_and_no_key(service: Service, lab: Lab) -> None:
    service.settle()
    for path in service.home.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
            assert path.stat().st_uid == lab.user.uid, path
            raw = path.read_bytes()
            assert b"made-up" not in raw, path
            assert b"count this please" not in raw, path


def test_the_report_counts_what_the_store_holds(bench: Bench) -> None:
    command = [*HALTON_METER, "report", "--json", "--by", "provider"]
    done = bench.lab.run(command, env=bench.lab.environment(), user=bench.lab.user)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    events = bench.service.events()
    assert report["totals"]["requests"] == len(events)
    counted = {group["key"]: group["requests"] for group in report["groups"]}
    assert counted == Counter(event["provider"] for event in events)


@pytest.mark.parametrize("count", first([1000, 5000]))
def test_of_thousands_of_exchanges_none_is_missing_none_double(bench: Bench, count: int) -> None:
    argv = [bench.python, str(CLIENTS / "many.py"), str(count), "8"]
    seen = bench.observe(argv, seconds=600)
    assert len(set(json.loads(seen.output))) == count
    assert_metered(seen.served, seen.events)
