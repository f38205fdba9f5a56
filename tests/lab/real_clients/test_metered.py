"""Programs with their own stripped BoringSSL, run in the lab under the service, metered exactly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from lab.conftest import Bench, assert_metered, wait_until

from .programs import BUN, CLAUDE, OPENCODE, Program

pytestmark = [pytest.mark.lab, pytest.mark.slow]

Install = Callable[[Program], Path]
Note = Callable[..., None]
STACK = "BoringSSL, static and stripped"
SCRIPT = Path(__file__).with_name("fetch.mjs")


def recognised(bench: Bench, program: Path) -> None:
    """Return once the service has probes in the program, which a first run made it look at."""

    def attached() -> bool:
        status = bench.service.status() or {}
        return str(program) in status.get("libraries", ())

    bench.lab.run([str(program), "--version"], user=bench.lab.user)  # Go's client just fails
    wait_until(attached, f"probes in {program}")


@pytest.mark.parametrize("program", BUN, ids=str)
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_bun_fetch(
    bench: Bench, installed: Install, program: Program, mode: tuple[str, ...], proved: Note
) -> None:
    bun = installed(program)
    script = bun.with_name("fetch.mjs")
    script.write_bytes(SCRIPT.read_bytes())
    script.chmod(0o644)
    recognised(bench, bun)
    seen = bench.observe([str(bun), str(script), "1", "6", *mode])
    assert seen.output.split() == ["200"] * 6
    assert len(seen.served) == 6
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    assert {event["project"] for event in seen.events} == {"acme"}
    proved("Bun", program.version, STACK)


@pytest.mark.parametrize("program", CLAUDE, ids=str)
def test_claude_print(bench: Bench, installed: Install, program: Program, proved: Note) -> None:
    claude = installed(program)
    recognised(bench, claude)
    command = [str(claude), "-p", "say lab[n=5&chunks=6]", "--output-format", "json"]
    seen = bench.observe([*command, "--model", "claude-sonnet-4-5"])
    assert seen.served
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    said = json.loads(seen.output)
    assert said["is_error"] is False
    ours = sum(Decimal(event["list_usd"]) for event in seen.events)
    assert abs(ours - Decimal(str(said["total_cost_usd"]))) < Decimal("1e-9")
    proved("Claude Code", program.version, STACK)


@pytest.mark.parametrize("program", OPENCODE, ids=str)
def test_opencode_run(bench: Bench, installed: Install, program: Program, proved: Note) -> None:
    opencode = installed(program)
    recognised(bench, opencode)
    seen = bench.observe(
        [str(opencode), "run", "--model", "anthropic/claude-sonnet-4-5", "say lab[n=7&chunks=6]"]
    )
    assert seen.served
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    proved("opencode", program.version, STACK)


GO_SOURCE = Path(__file__).parents[2] / "capture" / "code" / "go_client"


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
@pytest.mark.parametrize("mode", [(), ("http2",)], ids=["http1", "http2"])
@pytest.mark.parametrize(
    "flags", [("-ldflags=-s -w",), ("-buildmode=pie",)], ids=["stripped", "pie"]
)
def test_go(bench: Bench, mode: tuple[str, ...], flags: tuple[str, ...], proved: Note) -> None:
    program = (
        bench.lab.folder / "programs" / "-".join(("go", *flags, *mode)).replace(" ", "") / "client"
    )
    environment = {**os.environ, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
    subprocess.run(
        ["go", "build", *flags, "-o", str(program), "."],
        cwd=GO_SOURCE,
        env=environment,
        check=True,
        timeout=300,
    )
    for path in (program, program.parent, program.parent.parent):
        path.chmod(0o755)
    recognised(bench, program)
    body = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [
        {"role": "user", "content": "lab[n=3&chunks=6]"}]}  # fmt: skip
    lab = bench.lab.environment(CA=str(bench.lab.folder / "ca.pem"), BODY=json.dumps(body))
    argv = [str(program), "https://api.anthropic.com/v1/messages", *mode]
    seen = bench.observe(argv, env=lab)
    assert len(seen.served) == 3
    assert {line["http"] for line in seen.served} == {"http/2" if mode else "http/1.1"}
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
    proved("Go net/http", "1.19", "crypto/tls, stripped")
