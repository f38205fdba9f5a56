"""`statusline install` and `uninstall`: the client's settings change reversibly, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from proxy_fallback.setup.changes import write_whole

THEIRS = '{"type": "command", "command": "~/bin/mine.sh", "padding": 0}'
SETTINGS = '{\n  "model": "opus",\n  "hooks": {}\n}\n'


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "claude"))
    (tmp_path / "claude").mkdir()
    return tmp_path / "claude" / "settings.json"


def run(*arguments: str, code: int = 0, piped: str = "") -> Result:
    done = CliRunner().invoke(main, ["statusline", *arguments], input=piped)
    assert done.exit_code == code, done.output
    return done


def command(settings: Path) -> Any:
    return json.loads(settings.read_text())["statusLine"]["command"]


def test_in_and_out_of_settings_that_had_none(settings: Path) -> None:
    settings.write_text(SETTINGS)
    settings.chmod(0o640)
    run("install")
    assert command(settings).endswith("statusline")
    assert json.loads(settings.read_text())["statusLine"]["refreshInterval"] == 10
    assert settings.stat().st_mode & 0o777 == 0o640
    again = settings.read_bytes()
    assert "installed already" in run("install").output
    assert settings.read_bytes() == again
    run("uninstall")
    assert settings.read_text() == SETTINGS


def test_the_one_of_before_comes_back(settings: Path) -> None:
    text = f'{{"statusLine": {THEIRS}, "model": "opus"}}'
    settings.write_text(text)
    assert "the one before is kept" in run("install").output
    run("install")  # twice keeps theirs, not ours
    record = settings.parents[1] / "home" / "statusline.json"
    assert record.stat().st_mode & 0o777 == 0o600
    run("uninstall")
    assert settings.read_text() == text
    assert not record.exists()


def test_what_changed_meanwhile_stays(settings: Path) -> None:
    settings.write_text(f'{{"statusLine": {THEIRS}, "model": "opus"}}')
    run("install")
    settings.write_text(settings.read_text().replace('"opus"', '"haiku"'))
    run("uninstall")
    assert settings.read_text() == f'{{"statusLine": {THEIRS}, "model": "haiku"}}'


def test_a_status_line_that_was_set_since_stays(settings: Path) -> None:
    settings.write_text(SETTINGS)
    run("install")
    settings.write_text(f'{{"statusLine": {THEIRS}}}')
    assert "there is no status line of Halton Meter" in run("uninstall").output
    assert settings.read_text() == f'{{"statusLine": {THEIRS}}}'


def test_settings_that_the_client_wrote_anew_are_still_undone(settings: Path) -> None:
    settings.write_text(SETTINGS)
    run("install")
    settings.write_text(json.dumps(json.loads(settings.read_text()), indent=4))
    run("uninstall")
    assert json.loads(settings.read_text()) == json.loads(SETTINGS)


def test_without_settings_a_file_is_made_and_goes_again(settings: Path) -> None:
    settings.parent.rmdir()
    run("install")
    assert command(settings).endswith("statusline")
    assert settings.stat().st_mode & 0o777 == 0o600
    run("uninstall")
    assert not settings.exists()


def test_the_settings_are_where_claude_code_looks(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLAUDE_CONFIG_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    done = json.loads(run("install", "--json").output)
    assert done["settings"] == str(tmp_path / "ada" / ".claude" / "settings.json")
    assert not settings.exists()


def test_a_link_to_settings_stays_a_link(settings: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "dotfiles.json"
    elsewhere.write_text(SETTINGS)
    settings.symlink_to(elsewhere)
    run("install")
    assert settings.is_symlink()
    assert "statusLine" in elsewhere.read_text()
    run("uninstall")
    assert elsewhere.read_text() == SETTINGS


@pytest.mark.parametrize("broken", [b"{", b"[]", b"\xff\xfe", b'{"a": 1,}', b" " * (5 << 20)])
def test_settings_that_cannot_be_read_are_left_alone(settings: Path, broken: bytes) -> None:
    settings.write_bytes(broken)
    for what in ("install", "uninstall"):
        done = run(what, code=1)
        assert "Nothing was changed" in done.output
        assert "fix:" in done.output
    assert settings.read_bytes() == broken


def test_a_folder_that_cannot_be_written_is_said(settings: Path) -> None:
    settings.parent.rmdir()
    settings.parent.write_text("a file where the folder should be")
    assert "Nothing was changed" in run("install", code=1).output


def test_json(settings: Path) -> None:
    settings.write_text(SETTINGS)
    done = json.loads(run("install", "--json").output)
    assert (done["settings"], done["changed"]) == (str(settings), True)
    assert json.loads(run("uninstall", "--json").output)["changed"] is True
    assert json.loads(run("uninstall", "--json").output)["changed"] is False


def test_uninstall_of_all_takes_the_status_line_too(settings: Path) -> None:
    settings.write_text(SETTINGS)
    run("install")
    done = CliRunner().invoke(main, ["uninstall"])
    assert done.exit_code == 0, done.output
    assert settings.read_text() == SETTINGS


def test_the_line_itself_through_the_ordinary_way(settings: Path) -> None:
    assert run(piped="{}").output.startswith("not metered: service is not running")
    done = CliRunner().invoke(main, ["prompt"])
    assert (done.exit_code, done.output) == (0, "\n")


def test_the_command_is_a_program_that_answers(settings: Path) -> None:
    import subprocess

    run("install")
    done = subprocess.run(
        command(settings),
        shell=True,
        input=b"{}",
        capture_output=True,
        env=dict(os.environ),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"not metered: service is not running")


@pytest.mark.parametrize("more", [(), ("--purge", "--yes")])
def test_settings_that_cannot_be_put_back_keep_nothing_else_from_being_removed(
    settings: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run("install")
    settings.unlink()
    settings.mkdir()
    done = CliRunner().invoke(main, ["uninstall", *more])
    assert done.exit_code == 1
    assert f"{settings} cannot be used: is a folder, not a file. Nothing was changed" in done.stderr
    assert f"fix: ls -l {settings}" in done.stderr
    assert ("nothing to undo" in done.stdout, (tmp_path / "home").exists()) == (True, not more)


def test_settings_that_are_no_file_are_refused_and_stay_what_they_are(settings: Path) -> None:
    os.mkfifo(settings)
    done = CliRunner().invoke(main, ["statusline", "install"])
    assert (done.exit_code, settings.is_fifo()) == (1, True)
    assert f"{settings} cannot be used: is a pipe, not a file" in done.stderr


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        write_whole(pipe, b"{}", 0o600)
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()
