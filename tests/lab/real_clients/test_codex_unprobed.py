"""Codex, whose rustls is not probed: `status` says so, and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest

from lab.conftest import HALTON_METER, Bench, wait_until

from .programs import CODEX
from .test_proxied import installed_with_all

pytestmark = [pytest.mark.lab, pytest.mark.slow]


def test_status_says_what_to_do_about_codex(bench: Bench) -> None:
    lab, home = bench.lab, bench.service.home
    codex = installed_with_all(lab, CODEX[0], 1)
    prompt = "say lab[n=5&chunks=100&delay_ms=100]"
    command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex", prompt]
    environment = lab.environment(CODEX_API_KEY="made-up")
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
    assert client.wait(60) == 0
    assert (line["stack"], line["state"]) == ("rustls", "unsupported")
    assert line["library"] == str(codex)
    assert "rustls is not probed; use `halton-meter run --via proxy`" in line["advice"]
    assert "use `halton-meter run --via proxy`" in text
    bench.service.settle()
    served = {entry["response_id"] for entry in lab.ledger()[skip:]}
    assert served
    assert served.isdisjoint(event["response_id"] for event in bench.service.events())
