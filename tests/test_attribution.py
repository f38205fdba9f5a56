"""Project and branch: the order of the signs, and hostile files."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.attribution import Attribution, LocalFiles, clean_name
from halton_meter.model import Process


class FilesUnder(LocalFiles):
    """The real reader, with chosen homes and parents' folders."""

    def __init__(self, home: Path, cwds: dict[int, str] | None = None) -> None:
        self.home = str(home)
        self.cwds = cwds or {}

    def cwd_of(self, pid: int, child_ns: int) -> str | None:
        return self.cwds.get(pid)

    def home_of(self, uid: int | None) -> str | None:
        return self.home


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "ann"
    folder.mkdir()
    return folder


def made(path: Path, text: str | None = None) -> Path:
    if text is None:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def repository(folder: Path, branch: str = "main", url: str | None = None) -> Path:
    made(folder / ".git" / "HEAD", f"ref: refs/heads/{branch}\n")
    origin = f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {url}\n' if url else "[core]\n"
    made(folder / ".git" / "config", origin)
    return folder


def named(home: Path, cwd: Path | str | None, **fields: object) -> tuple[str | None, str | None]:
    cwds = fields.pop("cwds", None)
    files = FilesUnder(home, cwds)  # type: ignore[arg-type]  # a test's own keyword
    process = Process(
        pid=7,
        started_ns=1,
        cwd=None if cwd is None else str(cwd),
        uid=1000,
        **fields,  # type: ignore[arg-type]
    )
    return Attribution(files)(process)


def test_each_sign_beats_all_that_follow_it(home: Path) -> None:
    work = repository(made(home / "code" / "api"), "topic/x", "git@github.com:acme/billing.git")
    deep = made(work / "src" / "deep")
    other = repository(made(home / "code" / "tooling"))
    parents = {"parents": ((5, "/bin/bash"),), "cwds": {5: str(other)}}
    assert named(home, deep, **parents) == ("billing", "topic/x")
    made(work / ".idea" / ".name", "Billing IDE\n")
    assert named(home, deep, **parents) == ("Billing IDE", "topic/x")
    made(work / "src" / ".haltonrc", 'project = "invoices"  # ours\n')
    assert named(home, deep, **parents) == ("invoices", "topic/x")
    assert named(home, deep, project_hint="override", **parents) == ("override", "topic/x")


def test_parents_then_folder_then_misc(home: Path) -> None:
    loose = made(home / "notes")
    tooling = repository(made(home / "code" / "tooling"))
    parents = {"parents": ((5, "/bin/bash"), (4, "/usr/bin/tmux"))}
    assert named(home, loose, cwds={4: str(tooling)}, **parents) == ("tooling", None)
    assert named(home, loose, cwds={}, **parents) == ("notes", None)
    assert named(home, home) == ("misc", None)
    assert named(home, "/") == ("misc", None)
    assert named(home, None) == ("misc", None)
    assert named(home, "/tmp") == ("misc", None)


def test_two_programs_of_one_process_have_each_its_own_project(home: Path) -> None:
    """`env HALTON_PROJECT=b client` that a client became: pid, start and folder are the same."""
    attribution = Attribution(FilesUnder(home))
    first = Process(pid=7, started_ns=1, cwd=str(home), project_hint="a")
    second = Process(pid=7, started_ns=1, cwd=str(home), project_hint="b")
    assert [attribution(each)[0] for each in (first, second, first)] == ["a", "b", "a"]


def test_a_later_process_of_a_parents_number_is_nobodys_parent(tmp_path: Path) -> None:
    began_ns = time.time_ns()
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=tmp_path)
    try:
        files = LocalFiles()
        assert files.cwd_of(child.pid, time.time_ns()) == str(tmp_path)
        assert files.cwd_of(child.pid, began_ns - 60 * 10**9) is None
    finally:
        child.communicate()
    assert files.cwd_of(child.pid, time.time_ns()) is None


def test_a_worktree_belongs_to_its_main_repository(home: Path) -> None:
    main = repository(made(home / "meter"))
    tree = made(home / "wt-fix")
    git = main / ".git" / "worktrees" / "wt-fix"
    made(git / "HEAD", "ref: refs/heads/fix\n")
    made(git / "commondir", "../..\n")
    made(tree / ".git", f"gitdir: {git}\n")
    assert named(home, tree) == ("meter", "fix")


def test_a_submodule_has_its_own_name(home: Path) -> None:
    outer = repository(made(home / "outer"))
    made(outer / ".git" / "modules" / "lib" / "HEAD", "ref: refs/heads/dev\n")
    made(outer / ".git" / "modules" / "lib" / "config", '[remote "origin"]\nurl=../inner.git\n')
    made(outer / "lib" / ".git", "gitdir: ../.git/modules/lib\n")
    assert named(home, outer / "lib") == ("inner", "dev")


def test_a_detached_head_has_no_branch_and_a_switched_one_is_seen(home: Path) -> None:
    work = repository(made(home / "api"))
    attribute = Attribution(FilesUnder(home))
    process = Process(pid=7, started_ns=1, cwd=str(work), uid=1000)
    assert attribute(process) == ("api", "main")
    (work / ".git" / "HEAD").write_text("ref: refs/heads/next\n")
    assert attribute(process) == ("api", "next")
    (work / ".git" / "HEAD").write_text("4b825dc642cb6eb9a060e54bf8d69288fbee4904\n")
    assert attribute(process) == ("api", None)


def test_an_editors_own_folder_in_the_home_is_no_workspace(home: Path) -> None:
    made(home / ".vscode" / "extensions")
    assert named(home, made(home / "scratch")) == ("scratch", None)
    made(home / "proj" / ".vscode")
    assert named(home, made(home / "proj" / "sub")) == ("proj", None)
    made(home / "multi" / "Everything.code-workspace", "{}")
    assert named(home, home / "multi") == ("Everything", None)


def test_a_container_is_named_unless_it_names_its_project(home: Path) -> None:
    assert named(home, "/app", container="web-1") == ("docker:web-1", None)
    assert named(home, "/app", container="a" * 64) == ("docker:" + "a" * 12, None)
    assert named(home, "/app", container="web-1", project_hint="shop") == ("shop", None)


@pytest.mark.parametrize(
    ("text", "project"),
    [
        ("acme\n", "acme"),
        ("# ours\nproject: acme\n", "acme"),
        ("project = 'a c'\n", "a c"),
        ('[halton]\nproject="x" # y\n', "x"),
        ("project = \n", None),
        ("", None),
        ("\x1b[2Jevil", "[2Jevil"),
        ("\0binary", None),
        ('{"a": 1}', None),
        ("project = " + "x" * 5000, "x" * 100),
    ],
)
def test_haltonrc_in_every_spelling(home: Path, text: str, project: str | None) -> None:
    folder = made(home / "code")
    made(folder / ".haltonrc", text)
    assert named(home, folder)[0] == (project or "code")


def test_a_haltonrc_that_is_no_file_neither_hangs_nor_counts(home: Path) -> None:
    folder = made(home / "trap")
    os.mkfifo(folder / ".haltonrc")
    os.symlink("/dev/zero", home / ".haltonrc")
    assert named(home, folder)[0] == "trap"


def test_a_deleted_or_odd_working_folder_still_has_a_name(home: Path) -> None:
    assert named(home, f"{home}/gone (deleted)")[0] == "gone"
    assert named(home, "relative")[0] == "misc"
    assert named(home, "/a/" * 3000)[0] is not None


@given(raw=st.binary(max_size=300))
@settings(max_examples=60, deadline=None)
def test_hostile_git_and_rc_files_give_a_clean_name(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("h")
    work = made(home / "w" / ".git").parent
    for name in (".haltonrc", ".git/HEAD", ".git/config", ".git/commondir"):
        (work / name).write_bytes(raw)
    project, branch = named(home, work)
    assert project is not None
    assert project == clean_name(project)
    assert branch is None or branch == clean_name(branch)


def test_what_stands_for_no_project_is_no_name() -> None:
    assert clean_name(" - ") is None
    assert clean_name("--") == "--"
