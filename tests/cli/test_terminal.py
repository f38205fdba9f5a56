"""What people read on a terminal holds nothing that a name from traffic could do to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.model import Caller, Process, SessionSource
from halton_meter.store import Store
from tests.support.made import made

# Moves the cursor, sets the title, writes the clipboard, turns the text's direction, hides it.
HOSTILE = "m\x1b[2J\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x9b31m\r\n\u202e\u200bx\x1b[8m"


@pytest.fixture
def home(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for one test."""
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which whatever may have such a name has it."""
    folder = tmp_path_factory.mktemp("kept")
    who = Process(1, 2, f"/x/{HOSTILE}", (HOSTILE,), HOSTILE, 1, HOSTILE)
    with Store(folder) as store:
        event = made(
            "e1",
            None,
            provider="openai",
            model=HOSTILE,
            request_model=HOSTILE,
            project=HOSTILE,
            git_branch=HOSTILE,
            error_class=HOSTILE,
            host=HOSTILE,
            endpoint=HOSTILE,
            process=who,
            caller=Caller(HOSTILE, SessionSource.CLIENT, *[HOSTILE] * 7, account=HOSTILE),
            flags=(f"unpriced:{HOSTILE}",),
        )
        store.append([event])
        store.count_loss(HOSTILE, 1, 1)
        store.flush()
    return folder


def assert_harmless(text: str) -> None:
    for line in text.splitlines():
        assert line.isprintable(), line
    assert text


@pytest.mark.parametrize(
    "command",
    [
        ["events"],
        ["report"],
        *(["report", "--by", name] for name in ("project", "process", "git_branch", "user")),
        ["report", "--by", "host,endpoint,error_class"],
        ["report", "--by", "session,agent,client,client_version,turn,account"],
        ["session", "list"],
        ["session", "show", "latest"],
        ["session", "show", HOSTILE],
        ["events", "--session", HOSTILE],
        ["report", "--branch", HOSTILE],
        ["pricing", "status"],
        ["pricing", "explain", "--text", "e1"],
        ["reprice", "--dry-run"],
        ["retag", HOSTILE, "other"],
        ["retag", "--from", HOSTILE, "--to", f"{HOSTILE}2"],
        ["retag", "--from", HOSTILE, "--to", f"{HOSTILE}2", "--apply"],
        ["pricing", "explain", HOSTILE],
        ["pricing", "list", HOSTILE],
        ["pricing", "list", "--model", HOSTILE],
        ["pricing", "set", HOSTILE, "--discount", "10%"],
        ["pricing", "set", HOSTILE, "--discount", HOSTILE],
        ["pricing", "set", "m", "--rate", f"{HOSTILE}=1"],
        ["pricing", "set", "m", "--factor", "1", "--from", HOSTILE],
        ["pricing", "reset", HOSTILE],
        ["pricing", "refresh", "--file", HOSTILE],
        ["export", "csv", f"/nowhere/{HOSTILE}"],
        ["export", HOSTILE, "x"],
        ["replay", HOSTILE],
        ["run", "--via", "uprobes", "--java", HOSTILE],
        ["events", "--since", HOSTILE],
        ["events", f"--{HOSTILE}"],
        [HOSTILE],
        [f"--{HOSTILE}"],
    ],
    ids=" ".join,
)
def test_no_command_lets_a_name_write_on_the_terminal(home: Path, command: list[str]) -> None:
    done = CliRunner().invoke(main, command)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert_harmless(done.output)


def test_a_price_and_a_file_of_such_a_name_are_told_harmlessly(home: Path, tmp_path: Path) -> None:
    for command in (
        ["pricing", "set", HOSTILE, "--discount", "10%"],
        ["pricing", "set", HOSTILE, "--discount", "20%"],
        ["pricing", "status"],
        ["pricing", "reset", HOSTILE],
        ["export", "csv", str(tmp_path / HOSTILE)],
        ["export", "csv", str(tmp_path / HOSTILE)],
    ):
        assert_harmless(CliRunner().invoke(main, command).output)
