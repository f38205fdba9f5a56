"""Which project a process works for: the first of nine signs that is there.

The order is the product's promise: HALTON_PROJECT, `.haltonrc` in a parent folder, the user's rules
(`[projects]` of config.toml: by folder, by git's remote, by program), the IDE's workspace, the git
repository, the parent processes, the folder's name, `misc`; a process in a container is
`docker:NAME` unless its HALTON_PROJECT or a rule for its program says otherwise. What has an alias
in the rules goes by the name that they give. Nothing is executed, git least
of all: a repository's configuration can name commands. Every file read is bounded, must be a
regular file, and is read with the rights of whoever runs this.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from halton_meter.model import NO_PROJECT, Process
from halton_meter.settings.projects import NO_RULES, ProjectRules

DEFAULT_PROJECT = "misc"

PARENT_FOLDERS_MAX = 40
PARENT_PROCESSES_MAX = 16
NAME_CHARACTERS_MAX = 100
FILE_BYTES_MAX = 64 * 1024
FOLDER_NAMES_MAX = 2000
PROCESSES_REMEMBERED_MAX = 2048
# How far the clock may have been put right since a process's start was noted.
CLOCK_STEP_NS_MAX = 1_000_000_000

# Folders whose name says nothing about the work done there.
_NAMELESS = frozenset({"", "tmp", "root", "home", "usr", "bin", "opt", "var", "srv", "mnt", "src"})
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_BRANCH = re.compile(r"ref:\s*refs/heads/(\S.{0,254})")
_RC_LINE = re.compile(r"""project\s*[=:]\s*(["']?)(.*?)\1\s*(#.*)?""")


class Files(Protocol):
    """What attribution may ask of the file system; each answer is None when it cannot be had."""

    def read(self, path: str) -> bytes | None:
        """At most FILE_BYTES_MAX bytes of the regular file `path`."""

    def is_folder(self, path: str) -> bool:
        """Whether `path` is a folder."""

    def workspace_file(self, folder: str) -> str | None:
        """The name of a `*.code-workspace` file in `folder`, if there is exactly one."""

    def cwd_of(self, pid: int, child_ns: int) -> str | None:
        """The working folder of a running process, if it began before its child (Unix time)."""

    def home_of(self, uid: int | None) -> str | None:
        """The home of an account."""


class LocalFiles:
    """`Files` on this machine."""

    def read(self, path: str) -> bytes | None:
        """See `Files`. A pipe or device is not opened for real: the read can never hang."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except (OSError, ValueError):
            return None
        try:
            return os.read(fd, FILE_BYTES_MAX) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        except OSError:
            return None
        finally:
            os.close(fd)

    def is_folder(self, path: str) -> bool:
        """See `Files`."""
        try:
            return os.path.isdir(path)
        except ValueError:
            return False

    def workspace_file(self, folder: str) -> str | None:
        """See `Files`. A folder of more than FOLDER_NAMES_MAX entries is not searched further."""
        found: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for count, entry in enumerate(entries):
                    if entry.name.endswith(".code-workspace"):
                        found.append(entry.name)
                    if count >= FOLDER_NAMES_MAX or len(found) > 1:
                        break
        except (OSError, ValueError):
            return None
        return found[0] if len(found) == 1 else None

    def cwd_of(self, pid: int, child_ns: int) -> str | None:
        """See `Files`. A later process that was given the number is nobody's parent."""
        try:
            folder = os.readlink(f"/proc/{pid}/cwd")
            with open(f"/proc/{pid}/stat", "rb") as file:
                ticks = int(file.read(FILE_BYTES_MAX).rpartition(b")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            return None
        boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        began_ns = boot_ns + ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
        return folder if began_ns <= child_ns + CLOCK_STEP_NS_MAX else None

    def home_of(self, uid: int | None) -> str | None:
        """See `Files`."""
        import pwd

        try:
            return pwd.getpwuid(uid).pw_dir if uid is not None else None
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class _Git:
    """A repository: its folder, its git folder, and the git folder that its worktrees share."""

    folder: str
    git: str
    common: str


@dataclass(frozen=True, slots=True)
class _Place:
    """What a folder says: the project, and the HEAD file that tells the branch."""

    project: str | None
    head_path: str | None


class Attribution:
    """Names projects, remembering each process's answer; only its branch is looked up anew."""

    def __init__(self, files: Files | None = None, rules: ProjectRules = NO_RULES) -> None:
        self._files: Files = LocalFiles() if files is None else files
        self._rules = rules
        # What ~ means in rules: they are this user's, also for other users' processes.
        self._own_home = self._files.home_of(os.getuid())
        self._known: OrderedDict[Process, _Place] = OrderedDict()

    def __call__(self, process: Process) -> tuple[str | None, str | None]:
        """The project and the git branch (None: no repository, or a detached head)."""
        # The whole of it: one pid may have run several programs in one place, each with a
        # HALTON_PROJECT of its own.
        place = self._known.get(process)
        if place is None:
            place = self._known[process] = self._place(process)
            if len(self._known) > PROCESSES_REMEMBERED_MAX:
                self._known.popitem(last=False)
        return place.project, self._branch(place.head_path)

    def use_rules(self, rules: ProjectRules) -> None:
        """Decide by other rules from now on."""
        self._rules = rules
        self._known.clear()

    def by_rules(self, process: Process, project: str | None) -> str | None:
        """The project of an event that is stored with `project`, by the rules as they are now.

        It stays where no rule matches, and where HALTON_PROJECT or a `.haltonrc` names it; then
        only an alias counts. Of the process, only what is stored is known; folders are read anew.
        """
        cwd, ruled = _folder(process.cwd), None
        if process.container is not None and not process.project_hint:
            ruled = self._rules.of_process(process.exe, process.argv)
        elif not process.project_hint and not (cwd and self._rc(cwd)):
            ruled = self._ruled(process, cwd)
        found = ruled or project
        return self._rules.renamed(found) if found is not None else None

    def _place(self, process: Process) -> _Place:
        place = self._found(process)
        return _Place(self._rules.renamed(place.project or DEFAULT_PROJECT), place.head_path)

    def _found(self, process: Process) -> _Place:
        hint = clean_name(process.project_hint)
        if process.container is not None:
            ruled = self._rules.of_process(process.exe, process.argv) if self._rules else None
            return _Place(hint or ruled or f"docker:{_container_name(process.container)}", None)
        cwd = _folder(process.cwd)
        home = self._files.home_of(process.uid)
        git = self._repository(cwd, home) if cwd else None
        project = (
            hint
            or (cwd and self._rc(cwd))
            or (self._ruled(process, cwd) if self._rules else None)
            or (cwd and self._workspace(cwd, home))
            or (git and git.project)
            or self._from_parents(process, home)
            or (cwd and _folder_name(cwd, home))
            or DEFAULT_PROJECT
        )
        return _Place(project, git.head_path if git else None)

    def _ruled(self, process: Process, cwd: str | None) -> str | None:
        """By the folder, as the most exact; then by the repository, then by the program."""
        rules = self._rules
        return (
            (rules.of_path(cwd, self._own_home) if cwd is not None else None)
            or (rules.of_remote(self._remote(cwd)) if cwd and rules.read_remotes else None)
            or rules.of_process(process.exe, process.argv)
        )

    def _rc(self, cwd: str) -> str | None:
        for folder in _upward(cwd):
            raw = self._files.read(f"{folder}/.haltonrc")
            if raw is not None and (name := _rc_project(raw)):
                return name
        return None

    def _workspace(self, cwd: str, home: str | None) -> str | None:
        for folder in _upward(cwd):
            if folder in (home, ""):
                return None  # ~/.vscode holds extensions, not a workspace
            name = self._workspace_here(folder)
            if name:
                return name
        return None

    def _workspace_here(self, folder: str) -> str | None:
        if self._files.is_folder(f"{folder}/.idea"):
            named = self._files.read(f"{folder}/.idea/.name")
            return _text_name(named) or clean_name(PurePosixPath(folder).name)
        workspace = self._files.workspace_file(folder)
        if workspace is not None:
            return clean_name(workspace.removesuffix(".code-workspace"))
        if self._files.is_folder(f"{folder}/.vscode"):
            return clean_name(PurePosixPath(folder).name)
        return None

    def _repository(self, cwd: str, home: str | None) -> _Place | None:
        found = self._git_of(cwd)
        if found is None or found.folder == home:
            return None  # dotfiles under version control do not make home a project
        url = self._origin(found.common)
        name = _name_in(url) if url else None
        return _Place(name or _repository_folder(found.common, found.folder), f"{found.git}/HEAD")

    def _remote(self, cwd: str) -> str | None:
        """The address of the remote "origin" of the repository that a folder is in."""
        found = self._git_of(cwd)
        return self._origin(found.common) if found is not None else None

    def _git_of(self, cwd: str) -> _Git | None:
        for folder in _upward(cwd):
            dot_git = f"{folder}/.git"
            git: str | None
            if self._files.is_folder(dot_git):
                git, common = dot_git, dot_git
            elif (raw := self._files.read(dot_git)) is not None:
                git = _git_link(raw, folder)
                common = self._common_git(git or "")
            else:
                continue
            if git and self._files.read(f"{git}/HEAD") is not None:
                return _Git(folder, git, common)
        return None

    def _common_git(self, git: str) -> str:
        """The repository that a worktree's (or submodule's) git folder belongs to."""
        raw = self._files.read(f"{git}/commondir")
        text = _first_line(raw) if raw is not None else None
        return os.path.normpath(os.path.join(git, text)) if text else git

    def _origin(self, git: str) -> str | None:
        raw = self._files.read(f"{git}/config")
        section = ""
        for line in map(str.strip, (raw or b"").decode(errors="replace").splitlines()):
            if line.startswith("["):
                section = line
            elif section == '[remote "origin"]' and line.replace(" ", "").startswith("url="):
                return line.partition("=")[2].strip().rstrip("/")
        return None

    def _from_parents(self, process: Process, home: str | None) -> str | None:
        for pid, _ in process.parents[:PARENT_PROCESSES_MAX]:
            cwd = _folder(self._files.cwd_of(pid, process.started_ns)) if pid > 1 else None
            if cwd is None or cwd == _folder(process.cwd):
                continue
            name = (
                self._rc(cwd)
                or self._rules.of_path(cwd, self._own_home)
                or self._workspace(cwd, home)
            )
            git = self._repository(cwd, home)
            if name or git:
                return name or (git.project if git else None)
        return None

    def _branch(self, head_path: str | None) -> str | None:
        raw = self._files.read(head_path) if head_path else None
        found = _BRANCH.fullmatch(_first_line(raw) or "") if raw is not None else None
        return clean_name(found[1]) if found else None


def clean_name(name: str | None) -> str | None:
    """A name fit to be shown and stored: one line, printable, bounded; None when none is left, and
    for NO_PROJECT, by which people ask for requests without a project.
    """
    if name is None:
        return None
    text = "".join(c for c in name[: NAME_CHARACTERS_MAX * 4] if c.isprintable()).strip()
    text = text[:NAME_CHARACTERS_MAX].strip()
    return text if text not in ("", NO_PROJECT) else None


def _name_in(url: str) -> str | None:
    """The repository's name in a remote's address."""
    return clean_name(re.split(r"[/:]", url)[-1].removesuffix(".git"))


def _folder(path: str | None) -> str | None:
    """An absolute, normal path without a trailing slash ("" is the root), or None."""
    if not path or not path.startswith("/"):
        return None
    path = path.removesuffix(" (deleted)")
    return "/" + os.path.normpath(path).strip("/") if path.strip("/") else ""


def _upward(folder: str) -> list[str]:
    folders = [folder]
    while folder and len(folders) < PARENT_FOLDERS_MAX:
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    return folders


def _first_line(raw: bytes) -> str | None:
    return raw.decode(errors="replace").partition("\n")[0].strip() or None


def _text_name(raw: bytes | None) -> str | None:
    return clean_name(_first_line(raw)) if raw else None


def _rc_project(raw: bytes) -> str | None:
    """The project a `.haltonrc` names: `project = "name"`, `project: name`, or one bare line."""
    if b"\0" in raw:
        return None
    lines = [line.strip() for line in raw.decode(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "["))]
    for line in lines:
        if found := _RC_LINE.fullmatch(line):
            return clean_name(found[2])
    bare = len(lines) == 1 and not re.search(r"[=:{}\"]", lines[0])
    return clean_name(lines[0]) if bare else None


def _git_link(raw: bytes, folder: str) -> str | None:
    """Where a `.git` file ("gitdir: PATH") of a worktree or submodule points."""
    line = _first_line(raw) or ""
    target = line.removeprefix("gitdir:").strip() if line.startswith("gitdir:") else ""
    return os.path.normpath(os.path.join(folder or "/", target)) if target else None


def _repository_folder(common: str, folder: str) -> str | None:
    main = common.removesuffix("/.git") if common.endswith("/.git") else folder
    return clean_name(PurePosixPath(main).name.removesuffix(".git"))


def _folder_name(cwd: str, home: str | None) -> str | None:
    name = PurePosixPath(cwd or "/").name
    if cwd == home or name in _NAMELESS:
        return None
    return clean_name(name)


def _container_name(container: str) -> str:
    if _CONTAINER_ID.fullmatch(container):
        return container[:12]
    return clean_name(container.removeprefix("docker:")) or "unknown"
