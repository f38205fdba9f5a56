"""Rules for projects: which of them match, which counts, and what the table may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.attribution import Attribution
from halton_meter.model import Process
from halton_meter.settings.config import load, read_text
from halton_meter.settings.projects import ProjectRule, ProjectRules, remote_name
from tests.test_attribution import FilesUnder, made, repository

RULES = ProjectRules(
    [
        ProjectRule("acme", paths=("~/work/acme", "/srv/*/acme"), aliases=("acme-old", "acme2")),
        ProjectRule("acme-web", paths=("~/work/acme/web",), remotes=("github.com/acme/*-web",)),
        ProjectRule("forks", remotes=("github.com/*", "git@gitlab.com:me/x.git")),
        ProjectRule("editor", processes=("cursor", "/opt/ai/*")),
    ]
)


@pytest.mark.parametrize(
    ("folder", "project"),
    [
        ("/home/ann/work/acme", "acme"),
        ("/home/ann/work/acme/api/src", "acme"),
        ("/home/ann/work/acme/web", "acme-web"),
        ("/home/ann/work/acme/web/src", "acme-web"),
        ("/home/ann/work/acmes", None),
        ("/home/ann/work", None),
        ("/srv/one/acme/x", "acme"),
        ("/srv/one/two/acme", "acme"),
        ("", None),
    ],
)
def test_a_folder_is_the_project_of_the_longest_pattern(folder: str, project: str | None) -> None:
    assert RULES.of_path(folder, "/home/ann") == project


@pytest.mark.parametrize(
    ("url", "project"),
    [
        ("git@github.com:acme/shop-web.git", "acme-web"),
        ("https://ann:t0ken@github.com/acme/shop-web", "acme-web"),
        ("ssh://git@github.com:22/acme/shop-web.git/", "acme-web"),
        ("https://GitHub.com/Acme/Shop-Web", "acme-web"),
        ("https://github.com/other/x", "forks"),
        ("git@gitlab.com:me/x", "forks"),
        ("git@gitlab.com:you/x", None),
        ("/srv/git/x.git", None),
        (None, None),
    ],
)
def test_a_repository_by_its_remote(url: str | None, project: str | None) -> None:
    assert RULES.of_remote(url) == project


def test_no_password_is_in_a_remotes_name() -> None:
    assert remote_name("https://ann:t0ken@example.com:8443/a/b.git") == "example.com/a/b"


@given(st.text(max_size=60))
def test_whatever_a_remote_says_it_has_a_name_or_none(url: str) -> None:
    name = remote_name(url)
    assert name is None or ("/" in name and name == name.lower())
    RULES.of_remote(url)


@pytest.mark.parametrize(
    ("exe", "argv", "project"),
    [
        ("/usr/bin/cursor", (), "editor"),
        ("/usr/bin/node", ("node", "/home/ann/bin/cursor"), "editor"),
        ("/usr/bin/node", ("node", "--cursor"), None),
        ("/opt/ai/bin/agent", (), "editor"),
        ("/usr/bin/cursors", (), None),
        (None, (), None),
    ],
)
def test_a_program_by_its_name_or_path(
    exe: str | None, argv: tuple[str, ...], project: str | None
) -> None:
    assert RULES.of_process(exe, argv) == project


# --- beside the other signs -----------------------------------------------------------------------


def named(home: Path, cwd: Path, rules: ProjectRules, **fields: object) -> str | None:
    process = Process(pid=7, started_ns=1, cwd=str(cwd), uid=1000, **fields)  # type: ignore[arg-type]
    return Attribution(FilesUnder(home), rules)(process)[0]


def test_a_rule_counts_more_than_the_repository_and_less_than_what_was_said(tmp_path: Path) -> None:
    home = made(tmp_path / "ann")
    folder = repository(home / "code" / "thing", url="https://github.com/me/thing")
    rules = ProjectRules([ProjectRule("mine", paths=("~/code",))])
    assert named(home, folder, ProjectRules()) == "thing"
    assert named(home, folder, rules) == "mine"
    made(folder / ".haltonrc", "project = here\n")
    assert named(home, folder, rules) == "here"
    assert named(home, folder, rules, project_hint="said") == "said"


def test_a_remote_is_read_of_a_worktree_too(tmp_path: Path) -> None:
    home = made(tmp_path / "ann")
    folder = repository(home / "thing", url="git@github.com:acme/thing.git")
    tree = made(home / "tree" / "src").parent
    inner = folder / ".git" / "worktrees" / "tree"
    made(inner / "HEAD", "ref: refs/heads/next\n")
    made(inner / "commondir", "../..\n")
    made(tree / ".git", f"gitdir: {inner}\n")
    rules = ProjectRules([ProjectRule("acme", remotes=("github.com/acme/*",))])
    assert named(home, tree / "src", rules) == "acme"


def test_an_alias_renames_whatever_named_it(tmp_path: Path) -> None:
    home = made(tmp_path / "ann")
    rules = ProjectRules([ProjectRule("new", aliases=("old", "docker:web"))])
    assert named(home, home, rules, project_hint="old") == "new"
    assert named(home, repository(home / "old"), rules) == "new"
    assert named(home, home, rules, container="docker:web") == "new"


def test_a_container_is_ruled_by_its_program_alone(tmp_path: Path) -> None:
    rules = ProjectRules([ProjectRule("a", paths=("/",)), ProjectRule("b", processes=("agent",))])
    inside = {"container": "docker:web", "exe": "/usr/bin/agent"}
    assert named(tmp_path, Path("/app"), rules, **inside) == "b"
    assert named(tmp_path, Path("/app"), rules, container="docker:web") == "docker:web"


def test_a_parent_in_a_ruled_folder_lends_its_project(tmp_path: Path) -> None:
    home = made(tmp_path / "ann")
    files = FilesUnder(home, {5: str(made(home / "work" / "acme"))})
    process = Process(pid=7, started_ns=1, cwd="/tmp", uid=1000, parents=((5, "sh"),))
    assert Attribution(files, RULES)(process)[0] == "acme"


def test_other_rules_count_for_processes_that_were_seen(tmp_path: Path) -> None:
    home = made(tmp_path / "ann")
    attribution = Attribution(FilesUnder(home))
    process = Process(pid=7, started_ns=1, cwd=str(made(home / "x")), uid=1000)
    assert attribution(process)[0] == "x"
    attribution.use_rules(ProjectRules([ProjectRule("y", paths=("~/x",))]))
    assert attribution(process)[0] == "y"


# --- the table ------------------------------------------------------------------------------------


def test_everything_that_a_rule_can_say(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        '[projects."my app"]\npaths = ["~/app", "/srv/app"]\nremotes = ["github.com/me/app"]\n'
        'processes = ["app"]\naliases = ["app-old"]\n'
    )
    rule = ProjectRule(
        "my app", ("~/app", "/srv/app"), ("github.com/me/app",), ("app",), ("app-old",)
    )
    assert load(tmp_path).projects == (rule,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("projects = 3", "1: projects must be a table, not 3"),
        ("[projects]\na = 3", '2: [projects] "a" must be a table, not 3: write [projects.a]'),
        ('[projects." a"]', "names no project: a name has no space before or behind it"),
        ('[projects."a\\u0007"]', "names no project: a name has no control characters in it"),
        ('[projects.a]\npaths = "~/a"', "2: [projects.a] paths must be a list of texts in quotes"),
        ('[projects.a]\npaths = ["a/b"]', 'a path begins with / or ~/; did you mean "~/a/b"?'),
        ("[projects.a]\nprocesses = [\n1]", "3: [projects.a] processes 1: this must be a text"),
        (
            '[projects.a]\naliases = ["b"]\n[projects.b]\naliases = ["c"]\n[projects.d]\n'
            'aliases = ["c"]',
            '6: [projects.d] aliases "c": this is another name of "b" already',
        ),
        ('[projects.a]\naliases = ["a"]', "this is a project with rules of its own"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(text: str, line: str) -> None:
    found = read_text(text.encode(), "c.toml")
    assert any(line in each for each in found.wrong), found.wrong


def test_rules_of_roots_file_have_no_effect() -> None:
    from halton_meter.settings.config import _judged
    from halton_meter.toml_file import parsed

    text = b'retention_days = 3\n[projects.a]\npaths = ["/"]\n'
    found = _judged(parsed(text, "s.toml"), of_system=True)
    assert (found.config.projects, found.config.retention_days) == ((), None)
    assert [note.partition(" has no effect here")[0] for note in found.notes] == [
        "s.toml:2: projects",
        "s.toml:1: retention_days",
    ]
