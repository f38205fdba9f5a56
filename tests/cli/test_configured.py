"""Every command says what is wrong in the configuration before it does anything; `run` goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import _COMMANDS, main
from halton_meter.live.proxy import run as proxied
from halton_meter.live.result import RunResult

# What a command needs on its line, so that it would start.
_ARGUMENTS = {
    "replay": ["capture.pcapng"],
    "export": ["csv", "out.csv"],
    "redact": ["capture.pcapng", "redacted.pcapng"],
    "inspect": ["capture.pcapng"],
    "retag": ["--from", "a", "--to", "b"],
    "session show": ["latest"],
    "purge": ["--before", "9000d"],
    "project show": ["a"],
    "project set": ["a", "--path", "/a"],
    "project alias": ["a", "b"],
    "project remove": ["a"],
    "budget set": ["daily", "20"],
    "budget remove": ["daily"],
    "pricing explain": ["e1"],
    "pricing set": ["m", "--discount", "10%"],
    "pricing reset": ["--all"],
    "pricing refresh": ["--undo"],
    "init": ["--via", "proxy", "--non-interactive"],
    "start": ["--via", "proxy"],
    "daemon": ["--foreground", "--via", "proxy"],
}
# What stops or removes something needs no configuration; what shows and corrects it (`config`)
# goes on whatever it says.
_NEEDS_NONE = {
    *("stop", "uninstall", "statusline install", "statusline uninstall", "prompt"),
    *("logs", "completion", "man", "version", "doctor"),
}
_GOES_ON = {"run", "record", "status"}
LINE = (
    '{home}/config.toml:2: [hosts] "llm.example.com": no provider is called "openia"; '
    'did you mean "openai"? Known: openai, anthropic, '
)


def commands() -> Iterator[list[str]]:
    """Every command with what it needs, but those that go on."""
    for name in _COMMANDS:
        command = main.get_command(click.Context(main), name)
        several = command.commands if isinstance(command, click.Group) else [""]
        for each in several:
            words = f"{name} {each}".strip()
            if name != "config" and words not in _NEEDS_NONE | _GOES_ON:
                yield [*words.split(), *_ARGUMENTS.get(words, [])]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HALTON_METER_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "capture.pcapng").touch()
    return home


def invoke(*words: str) -> Result:
    done = CliRunner().invoke(main, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_a_wrong_value_is_one_line_and_nothing_runs(home: Path, command: list[str]) -> None:
    (home / "config.toml").write_text('[hosts]\n"llm.example.com" = "openia"\n')
    done = invoke(*command)
    code = 3 if command == ["budget", "check"] else 1  # there 1 means over
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(f"halton-meter: {LINE.format(home=home)}")
    assert done.stderr.count("\n") == 1
    assert [each.name for each in home.iterdir()] == ["config.toml"]
    (home / "config.toml").write_text("all_users = 2\n[prox]\nloader = 3\n")
    lines = invoke(*command).stderr.splitlines()
    daemon = command[0] == "daemon"  # its own log
    assert len(lines) == 2, lines
    assert any("config.toml:1: all_users must be true or false" in line for line in lines)
    assert any("has no effect; did you mean [proxy]?" in line for line in lines) or daemon


@pytest.mark.parametrize("command", [["--help"], ["report", "--help"], ["pricing", "set", "-h"]])
def test_help_needs_no_configuration(home: Path, command: list[str]) -> None:
    (home / "config.toml").write_text("loader = 3\n")
    assert invoke(*command).exit_code == 0


def test_an_unknown_setting_is_said_and_no_failure(home: Path) -> None:
    (home / "config.toml").write_text("[host]\n")
    done = invoke("report")
    assert done.exit_code == 0
    said = 'config.toml:1: unknown setting "host" has no effect; did you mean [hosts]?'
    assert said in done.stderr


def test_status_says_it_and_goes_on(home: Path) -> None:
    (home / "config.toml").write_text("loader = 3\n")
    done = invoke("status")
    assert done.exit_code == 1
    assert "config.toml:1: loader must be" in done.stderr
    assert done.stdout.startswith("stopped")


def test_status_says_what_a_service_does_not_use() -> None:
    from halton_meter.cli.status import _metered_lines

    found: dict[str, Any] = dict.fromkeys(
        ("restarts", "journal_waiting", "store_error", "last_event_at"), None
    )
    found |= {
        "events": 0,
        "totals": {"list_usd": "0"},
        "home": "/h",
        "config_error": "a:1: x\na: y",
    }
    lines = _metered_lines(found)
    assert lines[2:4] == ["  not used: a:1: x", "  not used: a: y"]


def test_run_says_it_and_meters_with_the_rest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def meter_command(*given: Any) -> RunResult:
        asked.extend(given)
        return RunResult(exit_code=7)

    monkeypatch.setattr(proxied, "meter_command", meter_command)
    text = '[hosts]\n"a.example" = "openia"\n"b.example" = "ollama"\n[proxy]\nport = 1\n'
    (home / "config.toml").write_text(f'{text}upstream = "http://p:1"\n')
    done = invoke("run", "--via", "proxy", "--", "true")
    assert done.exit_code == 7
    lines = done.stderr.splitlines()
    assert '"a.example": no provider is called "openia"' in lines[0]
    assert "config.toml:5: [proxy] port must be a number" in lines[1]
    assert asked[3:5] == [{"b.example": "ollama"}, ("p", 1)]


# --- the data folder, and variables ---------------------------------------------------------------


def bad_homes(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").touch()
    return {
        str(tmp_path / "file"): "is not a folder",
        str(tmp_path / "file/x"): "is not a folder",
        "~nobody-of-that-name/x": "there is no user 'nobody-of-that-name' here",
        f"/{'a' * 300}": "cannot be reached",
        os.fsdecode(b"/tmp/a\xff"): "is not UTF-8 text",
    }


def test_a_data_folder_that_can_be_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home, said in bad_homes(tmp_path).items():
        monkeypatch.setenv("HALTON_METER_HOME", home)
        for command in (["report"], ["status", "--json"], ["pricing", "list"]):
            done = invoke(*command)
            assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
            assert said in done.stderr


def test_run_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes: list[Path] = []

    def meter_command(command: Any, home: Path, *given: Any) -> RunResult:
        homes.append(home)
        return RunResult(exit_code=0)

    monkeypatch.setattr(proxied, "meter_command", meter_command)
    for home, said in bad_homes(tmp_path).items():
        monkeypatch.setenv("HALTON_METER_HOME", home)
        done = invoke("run", "--via", "proxy", "--", "true")
        assert done.exit_code == 0
        first = done.stderr.splitlines()[0]
        assert said in first
        assert first.endswith("what this run uses is in its summary only")
        assert homes.pop().is_dir()


def test_a_misspelt_variable_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOEM", "/x")
    done = invoke("report")
    said = "the variable HALTON_METER_HOEM has no effect; did you mean HALTON_METER_HOME?"
    assert done.stderr == f"halton-meter: {said}\n"
    assert done.exit_code == 0
