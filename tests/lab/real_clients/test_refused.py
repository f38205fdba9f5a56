"""What real clients make of the proxy's refusal at a limit: they show the reason, and end."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.lab.conftest import HALTON_METER
from tests.lab.real_clients.programs import CLAUDE, CODEX, GEMINI, OPENCODE
from tests.lab.real_clients.test_proxied import installed_with_all
from tests.support.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]

END_S_MAX = 90
REFUSED_MAX = 5  # it asks for a title as well; one that asks again and again has more


@pytest.fixture
def home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = lab.user.home / tmp_path_factory.mktemp("refused").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder


COMMANDS = {
    "claude": (CLAUDE[-1], 0, "-p {} --model claude-sonnet-4-5"),
    "codex": (CODEX[-1], 1, "exec --skip-git-repo-check --model gpt-5-codex {}"),
    "opencode": (OPENCODE[-1], 0, "run --model anthropic/claude-sonnet-4-5 {}"),
    "gemini": (GEMINI[0], 1, "--skip-trust --model gemini-2.5-flash -p {}"),
}


def command_of(lab: Lab, name: str) -> str:
    program, above, options = COMMANDS[name]
    path = installed_with_all(lab, program, above)
    start = "node " if name == "gemini" else ""
    asked = shlex.quote("say lab[n=90000&chunks=6]")
    return f"{start}{shlex.quote(str(path))} {options.format(asked)}"


@pytest.mark.parametrize("name", COMMANDS)
def test_it_shows_the_reason_and_ends(lab: Lab, home: Path, name: str) -> None:
    """The first time spends all there is; the second has its first request refused."""
    command = command_of(lab, name)
    script = f"{command} >first 2>&1 </dev/null; {command} >second 2>&1 </dev/null; echo code $?"
    argv = [*HALTON_METER, "run", "--via", "proxy", "--max-usd", "0.01"]
    environment = lab.environment(HALTON_METER_HOME=str(home / "state"), CODEX_API_KEY="made-up")
    done = lab.run(
        [*argv, "--", "sh", "-c", f"cd {home} && {script}"],
        user=lab.user,
        env=environment,
        timeout_s=END_S_MAX * 2,
    )
    assert (home / "second").exists(), (done.returncode, done.stdout, done.stderr)
    second = (home / "second").read_text()
    assert "this run has spent $" in second, (done.stdout, second)
    assert "budget resume run-" in second
    refused = re.search(r"([\d,]+) requests? (?:was|were) refused", done.stderr)
    assert refused is not None, done.stderr
    assert int(refused[1]) <= REFUSED_MAX
