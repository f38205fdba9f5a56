"""Real programs behind `run --via proxy`, among them those whose TLS uprobes cannot see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from tests.lab.conftest import CLIENTS
from tests.lab.real_clients.programs import (
    BUN,
    CLAUDE,
    CODEX,
    GEMINI,
    NODE,
    OPENCODE,
    Program,
    Unavailable,
    fetched,
)
from tests.lab.real_clients.results import note
from tests.lab.test_clients import version_of
from tests.lab.test_proxied_clients import ProxyBench, assert_proxied
from tests.support.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

Install = Callable[[Program], Path]


@pytest.fixture(scope="module")
def bench(lab: Lab, project: Path, python: str) -> ProxyBench:
    """See ProxyBench."""
    return ProxyBench(lab, project, python, "proxied-programs")


def installed_with_all(lab: Lab, program: Program, above: int) -> Path:
    """A program's copy among the files that it needs: `above` folders up, and all that is there."""
    try:
        original = fetched(program)
    except Unavailable as reason:
        pytest.skip(f"cannot fetch {program}: {reason}")
    root = original.parents[above]
    copy = lab.folder / "programs" / f"{program}-all"
    if not copy.exists():
        shutil.copytree(root, copy)
        for path in (copy.parent, copy, *copy.rglob("*")):
            path.chmod(0o755)
    return copy / original.relative_to(root)


@pytest.mark.parametrize("program", CODEX[-1:], ids=str)
def test_codex_exec(bench: ProxyBench, program: Program) -> None:
    """It speaks WebSocket through rustls, which is out of uprobes' sight."""
    codex = installed_with_all(bench.lab, program, 1)
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex"]
    seen = bench.observe([*command, "say lab[n=5&chunks=6]"], CODEX_API_KEY="made-up")
    assert len(seen.served) >= 1
    assert 5 in {entry["n"] for entry in seen.served}
    assert_proxied(seen, "codex")
    note("Codex CLI", program.version.partition("-")[0], "rustls", "proxy")


@pytest.mark.parametrize("program", GEMINI, ids=str)
def test_gemini_prompt(bench: ProxyBench, program: Program) -> None:
    gemini = installed_with_all(bench.lab, program, 1)
    command = ["node", str(gemini), "--skip-trust", "--model", "gemini-2.5-flash"]
    seen = bench.observe([*command, "-p", "say lab[n=5&chunks=6]"])
    assert 5 in {entry["n"] for entry in seen.served}
    assert_proxied(seen, "node")
    assert "lab[n=5" not in json.dumps(seen.events)
    note("Gemini CLI", program.version, "OpenSSL in Node", "proxy")


@pytest.mark.parametrize("program", CLAUDE[-1:], ids=str)
def test_claude_print(bench: ProxyBench, installed: Install, program: Program) -> None:
    claude = installed(program)
    command = [str(claude), "-p", "say lab[n=5&chunks=6]", "--output-format", "json"]
    seen = bench.observe([*command, "--model", "claude-sonnet-4-5"])
    assert seen.served
    assert_proxied(seen, "claude")
    said = json.loads(seen.output)
    assert said["is_error"] is False
    ours = sum(Decimal(event["list_usd"]) for event in seen.events)
    assert abs(ours - Decimal(str(said["total_cost_usd"]))) < Decimal("1e-9")
    note("Claude Code", program.version, "BoringSSL, static and stripped", "proxy")


@pytest.mark.parametrize("program", OPENCODE[-1:], ids=str)
def test_opencode_run(bench: ProxyBench, installed: Install, program: Program) -> None:
    opencode = installed(program)
    command = [str(opencode), "run", "--model", "anthropic/claude-sonnet-4-5"]
    seen = bench.observe([*command, "say lab[n=7&chunks=6]"])
    assert seen.served
    assert_proxied(seen, "opencode")
    note("opencode", program.version, "BoringSSL, static and stripped", "proxy")


@pytest.mark.parametrize("client", ["fetch", "https"])
@pytest.mark.parametrize("program", NODE, ids=str)
def test_node(bench: ProxyBench, installed: Install, program: Program, client: str) -> None:
    """Also with an agent of its own, for which Node knows no proxy."""
    node = installed(program)
    seen = bench.observe([str(node), str(CLIENTS / "node.mjs"), client, "1", "6"])
    assert len(seen.served) == 6
    assert_proxied(seen, "node")
    note("Node.js", program.version, "OpenSSL, static with symbols", "proxy")


@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
@pytest.mark.parametrize("program", BUN[-1:], ids=str)
def test_bun_fetch(
    bench: ProxyBench, installed: Install, program: Program, mode: tuple[str, ...]
) -> None:
    bun = installed(program)
    script = bun.with_name("fetch.mjs")
    script.write_bytes(Path(__file__).with_name("fetch.mjs").read_bytes())
    script.chmod(0o644)
    seen = bench.observe([str(bun), str(script), "1", "6", *mode])
    assert len(seen.served) == 6
    assert_proxied(seen, "bun")
    note("Bun", program.version, "BoringSSL, static and stripped", "proxy")


@pytest.mark.parametrize("mode", ["whole", "stream"])
@pytest.mark.parametrize(
    ("who", "package"), [("xai", "xai-sdk"), ("gemini", "google-ai-generativelanguage")]
)
def test_grpc(bench: ProxyBench, who: str, package: str, mode: str) -> None:
    """HTTP/2 with trailers, by the makers' own SDKs."""
    client = bench.lab.folder / "grpc_client.py"
    client.write_bytes(Path(__file__).with_name("grpc_client.py").read_bytes())
    client.chmod(0o644)
    seen = bench.observe([bench.python, str(client), who, "3", mode])
    assert len(seen.served) == 3
    assert {line["http"] for line in seen.served} == {"http/2"}
    assert_proxied(seen, "python")
    version = version_of(bench.lab, bench.python, package)
    note(f"{package} (gRPC)", version, "BoringSSL of grpcio, stripped", "proxy")


@pytest.mark.skipif(shutil.which("keytool") is None, reason="needs a JDK 17")
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_java_http_client(bench: ProxyBench, mode: tuple[str, ...]) -> None:
    told = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr
    version = re.search(r'version "([^"]+)"', told)
    assert version is not None
    argv = ["java", str(CLIENTS / "Ask.java"), "1", "6", *mode]
    seen = bench.observe(argv, more=["--java"])
    assert seen.output.split() == ["200"] * 6
    assert len(seen.served) == 6
    assert_proxied(seen, "java")
    note("Java HttpClient", version[1], "JSSE", "proxy")
