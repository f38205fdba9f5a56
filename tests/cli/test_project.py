"""`halton-meter project` and `retag --rules`: rules, for new requests and for stored ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.model import PricedEvent, Process
from halton_meter.settings.config import load
from halton_meter.settings.projects import ProjectRule
from halton_meter.store import Store
from halton_meter.store.rollup import DAY_NS
from tests.support.made import NOON_NS, made

PROCESS = Process(4711, NOON_NS, "/usr/bin/claude", ("claude", "-p"), "/src/web/api", 0, "root")


def event(event_id: str, **of_process: object) -> PricedEvent:
    return made(event_id, process=replace(PROCESS, **of_process))  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    with Store(home) as store:
        store.append(
            [
                event("a"),
                event("b", cwd="/src/other"),
                event("c", project_hint="web"),
                event("d", cwd="/x", argv=("node", "/opt/agent")),
                made("e", project="old", process=None),
                made("f", project=None, process=None),
            ]
        )
        store.flush()
    return home


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


def projects() -> dict[str | None, int]:
    listed = json.loads(run("project", "list", "--json").stdout)["projects"]
    return {row["project"]: row["requests"] for row in listed if row["requests"]}


def test_rules_are_set_added_and_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "work").mkdir()
    monkeypatch.chdir(home)
    run("project", "set", "acme", "--path", "work", "--remote", "github.com/acme/*")
    run("project", "set", "acme", "--path", "~/b/", "--process", "cursor")
    run("project", "alias", "old", "acme")
    paths = (str(home / "work"), "~/b")
    rule = ProjectRule("acme", paths, ("github.com/acme/*",), ("cursor",), ("old",))
    assert load(home).projects == (rule,)
    run("project", "set", "acme", "--path", "~/b", "--process", "cursor", "--remove")
    run("project", "alias", "old", "acme", "--remove")
    assert load(home).projects == (ProjectRule("acme", paths[:1], rule.remotes),)
    assert "are so already" in run("project", "set", "acme", "--path", "work").stdout
    run("project", "remove", "acme")
    assert load(home).projects == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("set", "acme"), "nothing to set"),
        (("set", " acme", "--path", "/x"), "no space before or behind it"),
        (("alias", "a", "a"), "no alias of itself"),
        (("show", "wep"), "did you mean 'web'?"),
        (("remove", "web"), "has no rules"),
        (("set", "web", "--path", ""), "an empty text is no rule"),
        (("set", "web", "--process", " "), "an empty text is no rule"),
    ],
)
def test_what_is_no_rule_is_refused(home: Path, arguments: tuple[str, ...], said: str) -> None:
    assert said in run("project", *arguments, code=2).stderr
    assert not (home / "config.toml").exists()


def test_an_alias_of_two_projects_is_refused(home: Path) -> None:
    run("project", "alias", "x", "a")
    assert 'another name of "a" already' in run("project", "alias", "x", "b", code=2).stderr


def test_stored_requests_move_by_the_rules(home: Path) -> None:
    run("project", "set", "api", "--path", "/src/web/api")
    run("project", "set", "agents", "--process", "agent")
    run("project", "alias", "old", "new")
    said = run("retag", "--rules").stdout
    assert "3 requests would move. Add --apply." in said
    assert projects() == {"web": 4, "old": 1, None: 1}
    moved = json.loads(run("retag", "--rules", "--apply", "--json").stdout)["moves"]
    assert {(each["from"], each["to"], each["events"]) for each in moved} == {
        ("web", "api", 1),
        ("web", "agents", 1),
        ("old", "new", 1),
    }
    assert projects() == {"web": 2, "api": 1, "agents": 1, "new": 1, None: 1}
    assert "Every stored request is in the project" in run("retag", "--rules", "--apply").stdout
    with Store(home).reading() as reader:
        assert reader.rows("SELECT count(*), sum(events) FROM retagging") == [(3, 3)]


def test_a_haltonrc_counts_more_than_a_rule_for_stored_requests_too(
    home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / ".haltonrc").write_text("web\n")
    with Store(home) as store:
        store.append([event("g", cwd=str(folder))])
        store.flush()
    run("project", "set", "acme", "--path", str(tmp_path))
    assert "Every stored request" in run("retag", "--rules").stdout


def test_the_days_that_change_are_summed_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halton_meter.store.rollup.ROLLED_EVENTS_MIN", 1)
    with Store(home) as store:
        store.append([made("later")])
        store.flush()
    day = f"SELECT count(*) FROM rolled_day WHERE day = {NOON_NS // DAY_NS}"
    with Store(home).reading() as reader:
        assert reader.rows(day) == [(1,)]
    run("project", "set", "api", "--path", "/src/web/api")
    run("retag", "--rules", "--apply")
    with Store(home).reading() as reader:
        assert reader.rows(day) == [(0,)]


def test_rules_need_rules_and_exclude_names(home: Path) -> None:
    assert "there are no rules" in run("retag", "--rules", code=2).stderr
    assert "--rules excludes" in run("retag", "--rules", "--to", "x", code=2).stderr
    assert "--to is missing" in run("retag", "--from", "x", code=2).stderr


def test_show_says_what_belongs_to_a_project(home: Path) -> None:
    run("project", "set", "web", "--path", "/src/web")
    said = run("project", "show", "web").stdout
    for part in ("4 requests, $1.00", "/src/web/api", "/usr/bin/claude", "main", "paths: /src/web"):
        assert part in said
    found = json.loads(run("project", "show", "web", "--json").stdout)
    assert found["rules"]["paths"] == ["/src/web"]
    assert [each["value"] for each in found["programs"]] == ["/usr/bin/claude"]
    assert sum(each["requests"] for each in found["folders"]) == 4


def test_without_a_store_rules_can_be_set_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "none"))
    assert "No projects yet" in run("project", "list").stdout
    run("project", "set", "acme", "--path", "/src")
    assert "acme" in run("project", "list").stdout
    assert "Nothing metered yet" in run("retag", "--rules").stdout


def test_an_alias_that_is_none_is_not_removed(home: Path) -> None:
    said = run("project", "alias", "a", "b", "--remove").stdout
    assert said.startswith("'a' is no alias of 'b', in ")
