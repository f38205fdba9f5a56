"""Programs with their own stripped BoringSSL, run in the lab under the service, metered exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from lab.conftest import Bench, assert_metered, wait_until

from .programs import BUN, CLAUDE, OPENCODE, Program

pytestmark = [pytest.mark.lab, pytest.mark.slow]

Install = Callable[[Program], Path]
SCRIPT = Path(__file__).with_name("fetch.mjs")


def recognised(bench: Bench, program: Path) -> None:
    """Return once the service has probes in the program, which a first run made it look at."""

    def attached() -> bool:
        status = bench.service.status() or {}
        return str(program) in json.dumps(status)

    bench.lab.run([str(program), "--version"], user=bench.lab.user)
    wait_until(attached, f"probes in {program}")


@pytest.mark.parametrize("program", BUN, ids=str)
@pytest.mark.parametrize("mode", [(), ("stream",)], ids=["whole", "stream"])
def test_bun_fetch(
    bench: Bench, installed: Install, program: Program, mode: tuple[str, ...]
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


@pytest.mark.parametrize("program", CLAUDE, ids=str)
def test_claude_print(bench: Bench, installed: Install, program: Program) -> None:
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


@pytest.mark.parametrize("program", OPENCODE, ids=str)
def test_opencode_run(bench: Bench, installed: Install, program: Program) -> None:
    opencode = installed(program)
    recognised(bench, opencode)
    seen = bench.observe(
        [str(opencode), "run", "--model", "anthropic/claude-sonnet-4-5", "say lab[n=7&chunks=6]"]
    )
    assert seen.served
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}
