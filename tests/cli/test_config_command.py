"""`halton-meter config`: what it writes and leaves alone, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.settings.config import CONFIG_NAME, load

COMMENTED = """\
# My settings.
retention_days = 30  # a month

[proxy]  # the company's
port = 9000

[projects."my app"]
paths = [
  "~/app",  # the app itself
]
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VISUAL", raising=False)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def config(*arguments: str) -> Result:
    done = CliRunner().invoke(main, ["config", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def text_of(home: Path) -> str:
    return (home / CONFIG_NAME).read_text()


def test_a_setting_goes_into_a_new_file_that_is_the_users_alone(home: Path) -> None:
    assert config("set", "proxy.port", "8082").exit_code == 0
    assert text_of(home) == "[proxy]\nport = 8082\n"
    assert stat.S_IMODE((home / CONFIG_NAME).stat().st_mode) == 0o600


def test_comments_and_layout_stay(home: Path) -> None:
    (home / CONFIG_NAME).write_text(COMMENTED)
    config("set", "proxy.port", "9001")
    config("set", 'projects."my app".paths', "--add", "~/app2")
    assert text_of(home) == COMMENTED.replace("9000", "9001").replace(
        '  "~/app",  # the app itself\n', '  "~/app",  # the app itself\n  "~/app2",\n'
    )
    assert load(home).projects[0].paths == ("~/app", "~/app2")


def test_a_link_stays_one(home: Path, tmp_path: Path) -> None:
    (tmp_path / "dotfiles.toml").write_text("retention_days = 3\n")
    (home / CONFIG_NAME).symlink_to(tmp_path / "dotfiles.toml")
    config("set", "retention_days", "4")
    assert (home / CONFIG_NAME).is_symlink()
    assert (tmp_path / "dotfiles.toml").read_text() == "retention_days = 4\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("proxy.port", "80"), "did you mean 8081?"),
        (("retention_days", "90d"), "did you mean 90?"),
        (("retention_days", "0"), "to keep everything, remove the line"),
        (("retenton_days", "90"), "did you mean retention_days?"),
        (("hosts.llm.example.com", "openia"), 'did you mean "openai"?'),
        (("users", "ann"), "only root chooses users"),
        (("bodies", "true"), "prompts and answers are never kept"),
        (("projects.acme.path", "~/acme"), 'did you mean "paths"?'),
        (("projects.acme.paths", "work/acme"), 'did you mean "~/work/acme"?'),
        (("loader", "bcc", "libbpf"), "loader takes one value, not 2"),
        (("loader", "--add", "bcc"), "--add is for lists"),
        (("a b", "1"), "is not a setting's name"),
        (("", "1"), "is not a setting's name"),
    ],
)
def test_what_is_wrong_or_without_effect_is_not_written(
    home: Path, arguments: tuple[str, ...], said: str
) -> None:
    (home / CONFIG_NAME).write_text(COMMENTED)
    done = config("set", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert text_of(home) == COMMENTED


def test_a_wrong_value_that_was_there_does_not_keep_others_from_being_set(home: Path) -> None:
    (home / CONFIG_NAME).write_text("loader = 3\n")
    assert config("set", "retention_days", "7").exit_code == 0
    assert text_of(home) == "loader = 3\nretention_days = 7\n"
    assert config("set", "loader", "bcc").exit_code == 0
    assert load(home).loader == "bcc"


@pytest.mark.parametrize("text", ["a = \n", "[a\n", "a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_left_alone(home: Path, text: str) -> None:
    (home / CONFIG_NAME).write_text(text)
    done = config("set", "retention_days", "7")
    assert done.exit_code == 1
    assert f"{home / CONFIG_NAME}:" in done.stderr
    assert "halton-meter config edit" in done.stderr
    assert text_of(home) == text


def test_lists_grow_and_shrink(home: Path) -> None:
    key = "openai_compatible_hosts"
    config("set", key, "a.example.com", "b.example.com", "a.example.com")
    config("set", key, "--add", "c.example.com", "b.example.com")
    config("set", key, "--remove", "a.example.com")
    assert load(home).openai_compatible_hosts == ("b.example.com", "c.example.com")


def test_unset_takes_the_table_with_it_that_is_empty_then(home: Path) -> None:
    config("set", "hosts.llm.example.com", "openai")
    config("set", "retention_days", "7")
    done = config("unset", "hosts.llm.example.com")
    assert "removed from" in done.stdout
    assert text_of(home) == "retention_days = 7\n"
    assert "is not set in" in config("unset", "hosts.llm.example.com").stdout
    unknown = config("unset", "retention_dais")
    assert unknown.exit_code == 2
    assert "there is no setting retention_dais; did you mean retention_days?" in unknown.stderr


def test_get_says_where_each_value_comes_from(home: Path) -> None:
    (home / CONFIG_NAME).write_text(COMMENTED)
    found = json.loads(config("get", "--json").stdout)
    rows = {row["key"]: (row["value"], row["set_at"]) for row in found["settings"]}
    path = home / CONFIG_NAME
    assert rows["proxy.port"] == (9000, f"{path}:5")
    assert rows["proxy.upstream"] == (None, None)
    assert rows["loader"] == ("auto", None)
    assert rows['projects."my app".paths'] == (["~/app"], f"{path}:8")
    assert config("get", "proxy.port").stdout == "9000\n"
    assert config("get", "retenton_days").exit_code == 2


def test_get_of_a_wrong_file_shows_what_counts_and_fails(home: Path) -> None:
    (home / CONFIG_NAME).write_text("retention_days = -1\n[proxy]\nport = 9000\n")
    done = config("get", "proxy.port")
    assert (done.exit_code, done.stdout) == (1, "9000\n")
    assert "retention_days must be" in done.stderr


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (COMMENTED, 0, "every value is right"),
        ("bodies = true\n", 0, "1 setting without effect"),
        ("[proxy]\nport = 1\n", 1, ":2: [proxy] port must be"),
        ("a = \n", 1, "this is no TOML"),
    ],
)
def test_check_tells_by_its_exit_code(home: Path, text: str, code: int, said: str) -> None:
    (home / CONFIG_NAME).write_text(text)
    other = home / "new.toml"
    other.write_text(text)
    for arguments in ((), (str(other),)):
        done = config("check", *arguments)
        assert done.exit_code == code
        assert said in done.output
    listed = json.loads(config("check", "--json").stdout)
    assert listed["ok"] == (code == 0)


def test_check_without_a_file(home: Path) -> None:
    done = config("check")
    assert (done.exit_code, "the defaults count" in done.stdout) == (0, True)


def test_check_of_a_file_that_is_none(home: Path, tmp_path: Path) -> None:
    for named, said in (
        (tmp_path, "this is a folder, not a file; name a TOML file"),
        (Path("/dev/null"), "this is not a file; name a TOML file"),
        (tmp_path / "none.toml", "no such file; name a TOML file"),
    ):
        done = config("check", str(named))
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == f"halton-meter: {named}: {said}\n"
    (home / "config.toml").mkdir(parents=True)
    done = config("check", str(home / "config.toml"))
    assert done.stderr.endswith(f"mv {home}/config.toml {home}/config.toml.old\n")


def test_path(home: Path) -> None:
    assert config("path").stdout == f"{home / CONFIG_NAME}\n"
    assert config("path", "--system").stdout == "/etc/halton-meter/config.toml\n"


def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "an editor"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("EDITOR", f"'{program}'")


def test_edit_writes_what_is_right(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(tmp_path, monkeypatch, 'echo "retention_days = 5" >> "$1"')
    done = config("edit")
    assert done.exit_code == 0
    assert load(home).retention_days == 5
    assert text_of(home).startswith("# Settings of Halton Meter.")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo "retention_days = no" >> "$1"', "was left as it is"),
        ("exit 3", "ended with code 3"),
        ('echo "proxy = 1" > "$1"', "proxy must be a table"),
    ],
)
def test_edit_leaves_the_file_alone_where_the_result_is_wrong(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    (home / CONFIG_NAME).write_text(COMMENTED)
    editor(tmp_path, monkeypatch, script)
    done = config("edit")
    assert done.exit_code == 1
    assert said in done.stderr
    assert text_of(home) == COMMENTED


def test_edit_without_a_change_makes_no_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(tmp_path, monkeypatch, "true")
    assert "nothing changed" in config("edit").stdout
    assert not (home / CONFIG_NAME).exists()


def test_reload_without_a_service_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halton_meter.accounts.is_root", lambda: False)
    done = config("reload")
    assert (done.exit_code, "no service runs" in done.stderr) == (1, True)


def test_what_is_no_file_is_not_edited(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(tmp_path, monkeypatch, "true")
    os.mkfifo(home / CONFIG_NAME)
    done = config("edit")
    assert done.exit_code == 1
    assert f"{home / CONFIG_NAME}: " in done.stderr
    assert "pipe, not a file" in done.stderr


@pytest.mark.parametrize(
    ("is_set_up", "fix"),
    [
        (False, "halton-meter stop --via proxy; halton-meter start --via proxy"),
        (True, "halton-meter init"),
    ],
)
def test_another_port_is_said_to_wait_for_the_command_that_moves_the_proxy(
    home: Path, monkeypatch: pytest.MonkeyPatch, is_set_up: bool, fix: str
) -> None:
    def ask(home: Path, what: str, *, name: str) -> dict[str, object] | None:
        assert what == "reload"
        is_proxy = name == "proxy.sock"
        return {"reloaded": True, "addresses": ["127.0.0.1:8081"]} if is_proxy else None

    monkeypatch.setattr("halton_meter.live.control.ask_service", ask)
    if is_set_up:
        (home / "changes.json").write_text("{}")
    assert "the local proxy uses it from now on" in config("set", "retention_days", "90").stdout
    said = config("set", "proxy.port", "9999").stdout
    assert said.endswith(
        "  the local proxy uses it, except for the port: it listens on 127.0.0.1:8081 until you "
        f"run: {fix}\n"
    )


NEXT = (
    ("get", "  fix: halton-meter config edit"),
    ("check", "  fix: halton-meter config edit"),
    ("reload", "  fix: halton-meter status"),
    ("set proxy.port 9000", "  fix: halton-meter config edit"),
    ("unset proxy.port", "  fix: halton-meter config edit"),
    ("check other.toml", "  fix: correct the file, then: halton-meter config check other.toml"),
    ("check none.toml", "halton-meter: none.toml: no such file; name a TOML file"),
)


@pytest.mark.parametrize(("command", "fix"), NEXT)
def test_a_wrong_file_leads_to_the_next_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, command: str, fix: str
) -> None:
    monkeypatch.chdir(home)
    for name in (CONFIG_NAME, "other.toml"):
        (home / name).write_text("a = [\n")
    done = config(*command.split())
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, fix)


@pytest.mark.parametrize(
    ("editor", "said"),
    [
        ("", "there is no terminal to edit in\n  fix: halton-meter config set KEY VALUE, or: "),
        ("false", "the editor false ended with code 1; nothing was changed\n  fix: EDITOR=nano "),
        ("/no/such", "cannot be started: No such file or directory\n  fix: EDITOR=nano "),
        ("'vi", 'EDITOR is no command: "\'vi": no closing quotation\n  fix: export EDITOR=nano\n'),
        ("true", "was left as it is\n  fix: halton-meter config edit\n"),
    ],
)
def test_an_edit_that_comes_to_nothing_leads_to_the_next_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, editor: str, said: str
) -> None:
    (home / CONFIG_NAME).write_text("loader = 3\n")
    monkeypatch.setenv("EDITOR", editor)
    done = config("edit")
    assert (done.exit_code, said in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("command", ["get", "check", "edit", "reload", "unset a", "set a 1"])
def test_a_data_folder_that_can_be_none_is_told_by_all(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", "/dev/null")
    monkeypatch.setenv("EDITOR", "true")
    done = config(*command.split())
    what = "HALTON_METER_HOME names /dev/null, and /dev/null is not a folder"
    fix = "name another folder: export HALTON_METER_HOME=FOLDER"
    assert (done.exit_code, done.stderr) == (1, f"halton-meter: {what}; {fix}\n")


def test_what_stands_in_the_way_of_the_file_is_not_to_be_edited(home: Path) -> None:
    (home / CONFIG_NAME).mkdir()
    done = config("check")
    moved = f"mv {home / CONFIG_NAME} {home / CONFIG_NAME}.old"
    assert done.stderr.endswith(f"a folder, not a file; move it away: {moved}\n")


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("users", "sudoedit /etc/halton-meter/config.toml"),
        ("projects.x", "halton-meter project set --help"),
        ("hosts", "halton-meter config set hosts.HOST PROVIDER"),
    ],
)
def test_what_is_not_set_leads_to_what_sets_it(home: Path, key: str, fix: str) -> None:
    assert config("get", key).stderr == f"halton-meter: {key} is not set\n  fix: {fix}\n"


def test_a_table_that_is_set_to_a_number_is_said_to_be_one(home: Path) -> None:
    assert "proxy must be a table, not 3:" in config("set", "proxy", "3").stderr
    assert "budgets must be tables, not 3:" in config("set", "budgets", "3").stderr
