"""Which programs a command line may run, so that their files are searched before it begins.

`timeout 40 claude`, `bash -c "claude -p hi"`, `npx codex`, a script, a Makefile: words are looked
up as the user would have them run, scripts and launchers are read for further words, and of an npm
package the programs that lie in it are named. It only saves time: a wrong guess is a file that is
searched for nothing, and what it misses is searched when it is run. So everything is bounded, and
nothing is an error. Reading scripts is the user's business: root calls `programs_ahead`, which
reads as the user.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from halton_meter import untrusted
from halton_meter.accounts import Account
from halton_meter.live.probes.libraries import LIBRARIES_MAX, Libraries
from halton_meter.live.probes.remembered import remembered
from halton_meter.privileges import as_account
from halton_meter.settings.config import ConfigError

PROGRAMS_MAX = 16
PROGRAM_BYTES_MIN = 1_000_000
"""Smaller programs have no TLS of their own that takes long to find."""
SECONDS_MAX = 0.5
WORDS_MAX, DEPTH_MAX, FILES_MAX = 200, 6, 100
SCRIPT_BYTES_MAX = 64 << 10
PACKAGE_ENTRIES_MAX, PACKAGE_DEPTH_MAX = 2000, 7
PATH_CHARACTERS_MAX = 4096
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_SHELL_COMMAND = re.compile(r"-[a-z]*c\Z")
_SCRIPT_WORD = re.compile(r"[\w@.+~/-]+")
_OWN_FOLDER = re.compile(r"\$\{?basedir\}?|\$\(dirname [^)]*\)|\$\{0%/\*\}|%~dp0")
_RECIPES = {
    **dict.fromkeys(("make", "gmake"), ("GNUmakefile", "makefile", "Makefile")),
    "just": ("justfile", "Justfile", ".justfile"),
}
"""Files in the folder of the command that say what these run."""
_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ksh", "source", "."))
_NPM = frozenset(("npm", "npx", "pnpm", "yarn", "bun", "bunx"))


def programs_ahead(
    argv: Sequence[str],
    environment: Mapping[str, str],
    account: Account,
    home: Path | None = None,
) -> tuple[str, ...]:
    """The files of programs that the command may run, then TLS libraries that these may load, or
    that programs metered into `home` have loaded before."""

    def found() -> list[str]:
        search, libraries = Search(environment, Path.cwd()), Libraries(environment)
        programs = list(search.programs(argv))
        libraries.look(argv[:WORDS_MAX], search.small, Path.cwd())
        before = remembered(home) if home else []
        return [*programs, *dict.fromkeys([*libraries.found, *before])]

    with contextlib.suppress(ConfigError, OSError):
        said = {"programs": as_account(account, found)}
        most = PROGRAMS_MAX + LIBRARIES_MAX
        return tuple(untrusted.texts(said, "programs", most, PATH_CHARACTERS_MAX))
    return ()


class Search:
    """One look at a command line."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._folder = folder
        home = environment.get("HOME", "")
        path = environment.get("PATH", os.defpath).split(os.pathsep)
        # npx and npm scripts look there first.
        near = [each / "node_modules/.bin" for each in (folder, *folder.parents)]
        self._path = [*map(Path, path), *near]
        self._npx = Path(home) / ".npm/_npx" if home else None
        self._seen: set[Path] = set()
        self.small: list[Path] = []  # programs whose TLS is in libraries
        self._found: dict[str, None] = {}
        self._until = time.monotonic() + SECONDS_MAX

    def programs(self, argv: Sequence[str]) -> Iterator[str]:
        """Paths of large programs, the likeliest first."""
        self._words(argv, self._folder, 0)
        yield from list(self._found)[:PROGRAMS_MAX]

    @property
    def _is_over(self) -> bool:
        late = time.monotonic() > self._until
        return late or len(self._seen) > FILES_MAX or len(self._found) >= PROGRAMS_MAX

    def _words(self, words: Sequence[str], folder: Path, depth: int) -> None:
        before = ""
        for word in words[:WORDS_MAX]:
            if self._is_over or depth > DEPTH_MAX:
                return
            if _SHELL_COMMAND.match(before) and re.search(r"\s|[;&|]", word):
                self._words(_shell_words(word), folder, depth + 1)
            elif not word.startswith("-") and not _ASSIGNMENT.match(word):
                self._word(word, folder, depth)
                if os.path.basename(before) in _SHELLS:
                    self._script(folder / word, depth + 1)
            before = word

    def _word(self, word: str, folder: Path, depth: int) -> None:
        for name in _RECIPES.get(os.path.basename(word), ()):
            self._script(folder / name, depth + 1)
        if os.path.basename(word) in _NPM:
            for line in _table(folder / "package.json", "scripts").values():
                self._words(_shell_words(line), folder, depth + 1)
        for path in self._places(word, folder):
            self._file(path, depth)
            if self._is_over:
                return

    def _places(self, word: str, folder: Path) -> Iterator[Path]:
        """Where the command of that name is; of a package's name, where its folder is."""
        if "/" in word and not word.startswith("@"):
            yield Path(os.path.expanduser(word)) if word.startswith("~") else folder / word
            return
        name = word.rpartition("@")[0] or word  # npx codex@latest
        for place in self._path:
            if os.access(place / name, os.X_OK) and (place / name).is_file():
                yield place / name
                break
        if not re.fullmatch(r"@?[\w./-]+", name):
            return
        modules = [each.parent for each in self._path if each.match("node_modules/.bin")]
        if self._npx is not None:
            modules += [each / "node_modules" for each in _folders(self._npx)[:WORDS_MAX]]
        for each in modules:
            if (each / name / "package.json").is_file():
                yield each / name / "package.json"
            elif (each / ".bin" / name).exists():
                yield each / ".bin" / name

    def _file(self, path: Path, depth: int) -> None:
        """A program is found; a script, or what lies in a package, leads further."""
        with contextlib.suppress(OSError, RuntimeError):
            path = path.resolve(strict=True)
            if path in self._seen or not stat.S_ISREG(path.stat().st_mode):
                return
            self._seen.add(path)
            if self._is_large_program(path):
                self._found[str(path)] = None
            elif (start := _start_of(path, 4)) == b"\x7fELF":
                self.small.append(path)
            elif start[:2] == b"#!":
                self._script(path, depth + 1)
            self._package_of(path)

    def _script(self, path: Path, depth: int) -> None:
        """The interpreter in its first line, and every word that is the name of a program."""
        text = ""
        with contextlib.suppress(OSError):
            text = _start_of(path, SCRIPT_BYTES_MAX).decode("utf-8", "replace")
        first, _, rest = text.partition("\n")
        if first.startswith("#!"):
            words = first[2:].split()
            self._words(words, path.parent, depth)
            if any(re.match(r"node|deno|bun|python|perl|ruby", Path(w).name) for w in words):
                return  # its words are no commands
        else:
            rest = text
        rest = _OWN_FOLDER.sub(str(path.parent), rest)
        # make's @command; not @scope/package.
        plain = (word if "/" in word else word.lstrip("@") for word in _SCRIPT_WORD.findall(rest))
        self._words([word for word in dict.fromkeys(plain) if word], path.parent, depth)

    def _is_large_program(self, path: Path) -> bool:
        found = path.stat()
        large = found.st_size >= PROGRAM_BYTES_MIN and stat.S_ISREG(found.st_mode)
        return large and _start_of(path, 4) == b"\x7fELF"

    # --- npm packages ---------------------------------------------------------------------------

    def _package_of(self, path: Path) -> None:
        """The programs in a file's npm package, and in those that hold them for each machine."""
        modules = next((each for each in path.parents if each.name == "node_modules"), None)
        if modules is None:
            return
        parts = path.relative_to(modules).parts
        package = modules.joinpath(*parts[: 2 if parts[0].startswith("@") else 1])
        # Those for one kind of machine, beside it or inside.
        optional = _table(package / "package.json", "optionalDependencies")
        parts_of = [
            each / name for name in optional for each in (package / "node_modules", modules)
        ]
        for each in (package, *parts_of):
            self._programs_in(each)

    def _programs_in(self, package: Path) -> None:
        if package in self._seen:
            return
        self._seen.add(package)
        entries = 0
        for folder, folders, names in os.walk(package):
            depth = len(Path(folder).relative_to(package).parts)
            folders[:] = [] if depth >= PACKAGE_DEPTH_MAX else sorted(folders)
            for name in sorted(names):
                entries += 1
                if entries > PACKAGE_ENTRIES_MAX or self._is_over:
                    return
                path = Path(folder, name)
                with contextlib.suppress(OSError):
                    if _may_run(path) and self._is_large_program(path):
                        self._found[str(path.resolve())] = None


def _may_run(path: Path) -> bool:
    """Whether it is a program, or what one loads to speak TLS; not just any library."""
    return path.suffix == ".node" or (".so" not in path.name and os.access(path, os.X_OK))


def _start_of(path: Path, length: int) -> bytes:
    """The first bytes of a regular file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, length) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def _table(path: Path, name: str) -> dict[str, str]:
    """One of the tables in a package.json; empty where there is none."""
    with contextlib.suppress(OSError):
        content = untrusted.parsed(_start_of(path, SCRIPT_BYTES_MAX))
        found = content.get(name) if content else None
        if isinstance(found, dict):
            return {str(key): str(value) for key, value in list(found.items())[:WORDS_MAX]}
    return {}


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(each for each in folder.iterdir() if each.is_dir())
    return []


def _shell_words(text: str) -> list[str]:
    """The words of a shell's command; operators part them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quote that does not end
        return text.split()
