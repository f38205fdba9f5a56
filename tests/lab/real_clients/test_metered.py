"""Programs as their makers ship them, run in the lab under the service: each exchange is exact.

The newest version of each belongs to `make test`, the others to `make clients`. What a test proves
it notes as its last line, for the table in docs/capture.md.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Bench, Observed, assert_metered, projects
from tests.lab.real_clients.programs import BUN, CLAUDE, NODE, OPENCODE, Program
from tests.lab.real_clients.results import note
from tests.support.lab.grpc_answers import TICKS_A_TOKEN
from tests.support.quick import first, slow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

Install = Callable[[Program], Path]
STACK = "BoringSSL, static and stripped"
# What nobody runs yet is searched at the lowest priority: beside busy programs that may take long.
SEARCHED_S_MAX = 400.0
RUNS_MAX = 5
TOLD = ("worker", "probes", "losses_since_restart", "losses", "outages", "coverage")
HERE = Path(__file__).parent
SCRIPT = HERE / "fetch.mjs"
GRPC_CLIENT = HERE / "grpc_client.py"


def newest_first(programs: Sequence[Program]) -> list[Any]:
    """All but the newest are for `make clients`."""
    return first(programs[::-1])


def attached(bench: Bench, library: Path | str, seconds: float = SEARCHED_S_MAX) -> None:
    """Return once the service has probes in a file (or in one of that name)."""

    status: dict[str, Any] = {}

    def has_probes() -> bool:
        status.clear()
        status.update(bench.service.status() or {})
        return any(Path(each).match(str(library)) for each in status.get("libraries", ()))

    try:
        wait_until(has_probes, f"probes in {library}", seconds)
    except AssertionError as late:
        told = {name: status[name] for name in TOLD if name in status} or "no answer"
        raise AssertionError(f"{late}; the service: {json.dumps(told)}") from late


def recognised(bench: Bench, library: Path | str, *argv: str) -> None:
    """The same, where a run must make the service look at the file.

    A search that had no answer on a busy machine is made again when the program is run again.
    """
    for left in reversed(range(RUNS_MAX)):
        bench.lab.run([*(argv or (str(library), "--version"))], user=bench.lab.user)
        try:
            return attached(bench, library, SEARCHED_S_MAX / RUNS_MAX)
        except AssertionError:
            if not left:
                raise


def exact(seen: Observed, count: int | None = None) -> None:
    """All that was served is metered, exactly, under the client's own pid."""
    assert seen.served
    assert count is None or len(seen.served) == count
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    assert projects(seen.events) <= {"acme"}, seen.events


def script_beside(program: Path) -> Path:
    """The fetching script, where the lab's user reaches it."""
    script = program.with_name("fetch.mjs")
    script.write_bytes(SCRIPT.read_bytes())
    script.chmod(0o644)
    return script


@pytest.mark.parametrize("program", newest_first(BUN), ids=str)
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_bun_fetch(
    bench: Bench, installed: Install, program: Program, mode: tuple[str, ...]
) -> None:
    bun = installed(program)
    recognised(bench, bun)
    seen = bench.observe([str(bun), str(script_beside(bun)), "1", "6", *mode])
    assert seen.output.split() == ["200"] * 6
    exact(seen, 6)
    note("Bun", program.version, STACK)


def test_a_version_installed_while_the_service_runs_is_metered_at_its_first_exec(
    bench: Bench, installed: Install
) -> None:
    """As Claude Code updates itself: a new file beside the old one, moved there when whole."""
    folder = bench.lab.user.home
    for part in (".local", "share", "claude", "versions"):
        folder /= part
        folder.mkdir(exist_ok=True)
        os.chown(folder, bench.lab.user.uid, bench.lab.user.gid)
    for release in "1", "2":
        program = BUN[-1]
        original = installed(program)
        script = script_beside(original)
        # Bytes after the end make it a program that was never seen, as every release is.
        download = folder / ".download"
        download.write_bytes(original.read_bytes() + release.encode())
        download.chmod(0o755)
        client = download.rename(folder / f"{program.version}.{release}")
        attached(bench, client)
        exact(bench.observe([str(client), str(script), "1", "3"]), 3)


@pytest.mark.parametrize("program", newest_first(CLAUDE), ids=str)
def test_claude_print(bench: Bench, installed: Install, program: Program) -> None:
    claude = installed(program)
    recognised(bench, claude)
    command = [str(claude), "-p", "say lab[n=5&chunks=6]", "--output-format", "json"]
    seen = bench.observe([*command, "--model", "claude-sonnet-4-5"])
    exact(seen)
    said = json.loads(seen.output)
    assert said["is_error"] is False
    ours = sum(Decimal(event["list_usd"]) for event in seen.events)
    assert abs(ours - Decimal(str(said["total_cost_usd"]))) < Decimal("1e-9")
    note("Claude Code", program.version, STACK)


@pytest.mark.slow
@pytest.mark.parametrize("program", newest_first(OPENCODE), ids=str)
def test_opencode_run(bench: Bench, installed: Install, program: Program) -> None:
    opencode = installed(program)
    recognised(bench, opencode)
    home = bench.lab.user.home / str(program)  # each keeps a database of another form
    home.mkdir()
    os.chown(home, bench.lab.user.uid, bench.lab.user.gid)
    seen = bench.observe(
        [str(opencode), "run", "--model", "anthropic/claude-sonnet-4-5", "say lab[n=7&chunks=6]"],
        env=bench.lab.environment(HOME=str(home)),
    )
    exact(seen)
    note("opencode", program.version, STACK)


@pytest.mark.slow
@pytest.mark.parametrize("program", newest_first(NODE), ids=str)
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_node_fetch(
    bench: Bench, installed: Install, program: Program, mode: tuple[str, ...]
) -> None:
    """Its OpenSSL is static, with symbols: probed where nvm installs it, before its first exec."""
    original = installed(program)
    node = bench.lab.user.home / ".nvm/versions/node" / f"v{program.version}" / "bin" / "node"
    if not node.exists():
        node.parent.mkdir(parents=True)
        node.write_bytes(original.read_bytes())
        node.chmod(0o755)
    attached(bench, node)
    seen = bench.observe([str(node), str(script_beside(original)), "1", "6", *mode])
    exact(seen, 6)
    note("Node.js", program.version, "OpenSSL, static with symbols")


@pytest.mark.parametrize(
    ("who", "mode"),
    [("xai", "stream"), ("gemini", "whole"), slow("xai", "whole"), slow("gemini", "stream")],
)
def test_grpc(bench: Bench, who: str, mode: str) -> None:
    """The makers' own SDKs over grpcio, whose BoringSSL reads and writes memory, no socket."""
    recognised(bench, "cygrpc*.so", bench.python, "-c", "import grpc, time; time.sleep(1)")
    client = bench.lab.folder / "grpc_client.py"
    client.write_bytes(GRPC_CLIENT.read_bytes())
    client.chmod(0o644)
    environment = bench.lab.environment(
        GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=str(bench.lab.folder / "ca.pem")
    )
    seen = bench.observe([bench.python, str(client), who, "3", mode], env=environment)
    exact(seen, 3)
    said = {line["id"]: line for line in map(json.loads, seen.output.splitlines())}
    assert said.keys() == {event["response_id"] for event in seen.events}
    assert {line["http"] for line in seen.served} == {"http/2"}
    if who == "xai":
        for event in seen.events:
            (entry,) = (e for e in seen.served if e["response_id"] == event["response_id"])
            charged = Decimal(entry["cost_ticks"]) / 10**10
            assert entry["cost_ticks"] % TICKS_A_TOKEN == 0
            assert Decimal(event["reported_usd"]) == charged
    package = {"xai": "xai-sdk", "gemini": "google-ai-generativelanguage"}[who]
    note(f"{package} (gRPC)", version_in(bench.python, package), "BoringSSL of grpcio, stripped")


def version_in(python: str, package: str) -> str:
    """Which version of a package an interpreter has."""
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
