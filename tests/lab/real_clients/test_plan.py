"""Claude Code under a plan: its windows, who used how much of them, and its status line.

The stand-in for the provider states in its headers what each prompt asks it to state.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER, Bench
from tests.lab.real_clients.programs import CLAUDE
from tests.lab.real_clients.test_metered import Install, exact, recognised
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

MODEL = ("--model", "claude-sonnet-4-5")
HOUR_S = 3600


@pytest.fixture
def beta(lab: Lab) -> Path:
    """Another project of the lab's user."""
    folder = lab.user.home / "code" / "beta"
    folder.mkdir(exist_ok=True)
    (folder / ".haltonrc").write_text("project = beta\n")
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder


def asked(bench: Bench, *arguments: str, piped: str | None = None) -> str:
    """What a command of the user's prints."""
    environment = bench.lab.environment(HALTON_METER_HOME=str(bench.service.home), NO_COLOR="1")
    command = [*HALTON_METER, *arguments]
    done = bench.lab.run(command, env=environment, user=bench.lab.user, input_text=piped)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_windows_shares_and_the_status_line(bench: Bench, installed: Install, beta: Path) -> None:
    claude = installed(CLAUDE[-1])
    recognised(bench, claude)
    now_s = int(time.time())
    resets = {"five_resets": now_s + 4 * HOUR_S, "seven_resets": now_s + 100 * HOUR_S}
    sessions = []

    def say(five: int, seven: int, project: Path) -> dict[str, Any]:
        prompt = f"say {Scenario(n=five, five=five, seven=seven, **resets).marker}"
        command = [str(claude), "-p", prompt, "--output-format", "json", *MODEL]
        seen = bench.observe(command, cwd=project)
        exact(seen) if project == bench.project else None
        said: dict[str, Any] = json.loads(seen.output)
        sessions.append(said["session_id"])
        return said

    for five in (10, 14):
        say(five, 3, bench.project)
    for five in (14, 20, 27):
        last = say(five, 4, beta)

    accounts = json.loads(asked(bench, "plan", "--json"))["accounts"]
    (account,) = (each for each in accounts if each["plan"] == "claude")
    windows = {window["window"]: window for window in account["windows"]}
    five_hours = windows["5h"]
    assert (five_hours["used"], windows["7d"]["used"]) == ("0.27", "0.04")
    assert five_hours["length_seconds"] == 5 * HOUR_S
    shares = {
        "elsewhere" if each["elsewhere"] else each["key"]: each
        for each in five_hours["used_by"]["project"]
    }
    # acme was at work from 10 to 14 %, beta from 14 to 27 %, less than one at each end.
    assert shares["acme"]["used_min"] >= 0.03 - 1e-9
    assert 0.12 - 1e-9 <= shares["beta"]["used_min"] <= 0.13
    assert shares["beta"]["used_max"] == pytest.approx(0.14)
    total = sum(each["used_estimate"] for each in shares.values())
    assert total == pytest.approx(0.27)
    assert "5-hour window" in asked(bench, "plan")

    said = {"session_id": last["session_id"], "cost": {"total_cost_usd": last["total_cost_usd"]}}

    def line() -> str | None:
        text = asked(bench, "statusline", piped=json.dumps(said))
        assert text.count("\n") == 1
        return text if f"${last['total_cost_usd']:.2f} session" in text else None

    text = wait_until(line, "the session's cost in the status line")
    assert "≠" not in text
    assert "5h 27%" in text
    assert "today" in text


def test_a_bare_429_is_told(bench: Bench) -> None:
    body = json.dumps(
        {
            "model": "claude-sonnet-4-5",
            "max_tokens": 9,
            "messages": [{"role": "user", "content": Scenario(status=429).marker}],
        }
    )
    bench.observe(
        [
            *("curl", "-s", "https://api.anthropic.com/v1/messages", "-H", "x-api-key: made-up"),
            *("-H", "content-type: application/json", "-d", body),
        ]
    )
    found = json.loads(asked(bench, "plan", "--json"))["accounts"]
    refusals = [w for a in found for w in a["windows"] if w["kind"] == "refusal"]
    assert [(each["status"], each["resets_at"]) for each in refusals] == [("429", None)]
    assert "the response did not say for how long" in asked(bench, "plan")
