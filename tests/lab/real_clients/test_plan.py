"""Claude Code under a plan: its windows, who used how much of them, and its status line.

The stand-in for the provider states in its headers what each prompt asks it to state.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from halton_meter.statusline.line import money
from tests.lab.conftest import HALTON_METER, Bench
from tests.lab.real_clients.programs import CLAUDE, CODEX, Program
from tests.lab.real_clients.test_metered import Install, exact, recognised
from tests.lab.real_clients.test_proxied import installed_with_all
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
        if project == bench.project:
            exact(seen)
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
    # Sessions as the client names them: each of the last three rose by what came after it.
    used = {each["key"]: each["used_estimate"] for each in five_hours["used_by"]["session"]}
    assert set(sessions) <= set(used)
    total = sum(each["used_estimate"] for each in shares.values())
    assert total == pytest.approx(0.27)
    assert "5-hour window" in asked(bench, "plan")

    said = {"session_id": last["session_id"], "cost": {"total_cost_usd": last["total_cost_usd"]}}

    def line() -> str | None:
        text = asked(bench, "statusline", piped=json.dumps(said))
        assert text.count("\n") == 1
        return text if text.startswith(f"{money(last['total_cost_usd'])} session · ") else None

    text = wait_until(line, "the session's cost in the status line")
    assert "5h 27%" in text
    assert "today" in text


@pytest.mark.slow
def test_claude_code_shows_the_line_in_a_terminal(bench: Bench, installed: Install) -> None:
    """Installed into its settings by our command, and gone again by our command."""
    lab, claude = bench.lab, installed(CLAUDE[-1])
    recognised(bench, claude)
    home = lab.user.home / "with-a-status-line"
    settings = home / ".claude" / "settings.json"
    settings.parent.mkdir(parents=True)
    before = '{"model": "claude-sonnet-4-5"}'
    settings.write_text(before)
    key = lab.environment()["ANTHROPIC_API_KEY"]
    trusted = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
    onboarded = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "customApiKeyResponses": {"approved": [key[-20:]], "rejected": []},
        "projects": {str(bench.project): trusted},
    }
    (home / ".claude.json").write_text(json.dumps(onboarded))
    for path in (home, *home.rglob("*")):
        os.chown(path, lab.user.uid, lab.user.gid)
    environment = lab.environment(
        HOME=str(home), HALTON_METER_HOME=str(bench.service.home), TERM="xterm-256color"
    )

    def change(what: str) -> None:
        done = lab.run([*HALTON_METER, "statusline", what], env=environment, user=lab.user)
        assert done.returncode == 0, done.stderr

    change("install")
    now_s = int(time.time())
    resets = {"five_resets": now_s + 4 * HOUR_S, "seven_resets": now_s + 100 * HOUR_S}
    prompt = f"say {Scenario(n=17, five=61, seven=7, **resets).marker}"
    in_terminal = f"stty cols 160 rows 50; exec {shlex.quote(str(claude))}"
    process = lab.popen(
        ["script", "-qfec", f"bash -c {shlex.quote(in_terminal)}", "/dev/null"],
        user=lab.user,
        cwd=bench.project,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen: list[bytes] = []
    reader = threading.Thread(target=lambda: seen.extend(iter(process.stdout.read1, b"")))
    reader.start()

    def shows(text: str) -> bool:
        plain = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b.", b" ", b"".join(seen)).decode(
            "utf-8", "replace"
        )
        return text in " ".join(plain.split())

    try:
        wait_until(lambda: shows("today"), "the line before the first request")
        process.stdin.write(prompt.encode())
        process.stdin.flush()
        wait_until(lambda: shows(prompt[-20:]), "the prompt in the client's input")
        process.stdin.write(b"\r")
        process.stdin.flush()
        wait_until(lambda: shows("5h 61%"), "the window in the line", 120)
        assert shows("cache →")
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        reader.join()
    change("uninstall")
    assert settings.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("program", CODEX[2:3], ids=str)
def test_codex_under_a_chatgpt_plan_over_a_websocket(lab: Lab, program: Program) -> None:
    """Signed in with ChatGPT, by tokens that nobody gave out; through the local proxy."""
    codex = installed_with_all(lab, program, 1)
    home = lab.user.home / "chatgpt-plan"
    (home / ".codex").mkdir(parents=True)
    (home / ".codex" / "auth.json").write_text(json.dumps(signed_in()))
    for path in (home, *home.rglob("*")):
        os.chown(path, lab.user.uid, lab.user.gid)
    data = home / "data"
    environment = lab.environment(
        HOME=str(home), CODEX_HOME=str(home / ".codex"), HALTON_METER_HOME=str(data)
    )
    del environment["OPENAI_API_KEY"]
    now_s = int(time.time())
    resets = {"five_resets": now_s + 4 * HOUR_S, "seven_resets": now_s + 100 * HOUR_S}
    for five in (10, 14):
        prompt = f"say {Scenario(n=5, five=five, seven=3, **resets).marker}"
        command = [str(codex), "exec", "--skip-git-repo-check", "--model", "gpt-5-codex", prompt]
        done = lab.run(
            [*HALTON_METER, "run", "--via", "proxy", "--", *command],
            env=environment,
            user=lab.user,
        )
        assert done.returncode == 0, done.stderr
    done = lab.run([*HALTON_METER, "plan", "--json"], env=environment, user=lab.user)
    (account,) = json.loads(done.stdout)["accounts"]
    assert (account["provider"], account["plan"]) == ("openai", "chatgpt")
    assert account["account"] is not None
    windows = {window["window"]: window for window in account["windows"]}
    used = {name: each["used"] for name, each in windows.items() if each["kind"] == "plan"}
    assert used == {"codex primary": "0.14", "codex secondary": "0.03"}
    assert windows["overall"]["detail"] == "pro"
    (session,) = (
        each for each in windows["codex primary"]["used_by"]["process"] if each["key"] == str(codex)
    )
    assert session["used_min"] == pytest.approx(0.03)


def signed_in() -> dict[str, Any]:
    """Codex's auth.json, with a token that nobody signed."""

    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    plan = {"chatgpt_plan_type": "pro", "chatgpt_user_id": "u1", "chatgpt_account_id": "made-up"}
    claims = {"exp": int(time.time()) + 9_000_000, "https://api.openai.com/auth": plan}
    token = f"{part({'alg': 'none'})}.{part(claims)}.c2ln"
    return {
        "OPENAI_API_KEY": None,
        "tokens": {
            "id_token": token,
            "access_token": token,
            "refresh_token": "made-up",
            "account_id": "made-up",
        },
        "last_refresh": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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
