"""Which large programs a command line names, through wrappers, scripts, links and packages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from halton_meter.accounts import invoking_account
from halton_meter.live.probes import programs
from halton_meter.live.probes.programs import Search, programs_ahead


class Place:
    """A user's folders: `bin` is on the PATH, `work` is where the command is typed."""

    def __init__(self, root: Path) -> None:
        self.bin, self.work, self.home = root / "bin", root / "work", root / "home"
        for each in (self.bin, self.work, self.home):
            each.mkdir()

    def program(self, path: Path, size_bytes: int = programs.PROGRAM_BYTES_MIN) -> Path:
        """A program of that size, which is nothing but its size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x7fELF")
        os.truncate(path, size_bytes)
        path.chmod(0o755)
        return path

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def package(self, folder: Path, **content: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text(json.dumps({"name": folder.name, **content}))
        return folder

    def found(self, *argv: str) -> list[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.home)}
        return list(Search(environment, self.work).programs(argv))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


WRAPPED = [
    ("claude", "-p", "hi"),
    ("timeout", "40", "claude", "-p", "hi"),
    ("env", "A=b", "nice", "-n", "5", "claude"),
    ("bash", "-c", "cd /tmp && claude -p 'hi there' | cat; true"),
    ("sh", "-ec", 'claude -p "an end that does not come'),
    ("sh", "script"),
    ("./script",),
    ("make", "ask"),
    ("npm", "run", "ask"),
]


@pytest.mark.parametrize("argv", WRAPPED, ids=" ".join)
def test_a_program_behind_a_wrapper(place: Place, argv: tuple[str, ...]) -> None:
    claude = place.program(place.bin / "claude")
    place.script(place.work / "script", '#!/bin/sh\nset -e\nexec claude "$@"\n')
    place.script(place.work / "Makefile", "ask:\n\t@claude -p hi\n")
    place.package(place.work, scripts={"ask": "claude -p hi"})
    assert place.found(*argv) == [str(claude)]


def test_a_link_to_a_link(place: Place) -> None:
    version = place.program(place.home / "versions/2.1.332")
    (place.home / "current").symlink_to(version)
    (place.bin / "claude").symlink_to(place.home / "current")
    assert place.found("claude") == [str(version)]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("argv", [("npx", "codex"), ("npx", "@openai/codex@latest"), ("codex",)])
def test_the_program_in_a_package_for_this_machine(
    place: Place, argv: tuple[str, ...], inside: bool
) -> None:
    """A launcher of JavaScript; the program is in another package, beside it or inside."""
    modules = place.work / "node_modules"
    optional = {"@openai/codex-linux-x64": "1", "@openai/codex-win32-x64": "1"}
    package = place.package(modules / "@openai/codex", optionalDependencies=optional)
    place.script(package / "bin/codex.js", "#!/usr/bin/env node\nspawn('claude')\n")
    place.program(place.bin / "claude")  # a word of JavaScript is no command
    (modules / ".bin").mkdir()
    (modules / ".bin/codex").symlink_to("../@openai/codex/bin/codex.js")
    beside = (package if inside else place.work) / "node_modules/@openai/codex-linux-x64"
    codex = place.program(beside / "vendor/x86_64-unknown-linux-musl/bin/codex")
    place.program(beside / "vendor/x86_64-unknown-linux-musl/lib/libother.so.1")
    assert place.found(*argv) == [str(codex)]


def test_what_npx_has_in_its_cache(place: Place) -> None:
    modules = place.home / ".npm/_npx/0123abcd/node_modules"
    addon = place.program(place.package(modules / "tool") / "build/runtime.node")
    assert place.found("npx", "tool@1.2.3") == [str(addon)]


def test_a_shim_of_a_package_manager(place: Place) -> None:
    modules = place.work / "node_modules"
    claude = place.program(place.package(modules / "@anthropic-ai/claude-code") / "bin/claude.exe")
    shim = """#!/bin/sh
basedir=$(dirname "$(echo "$0" | sed -e 's,\\\\,/,g')")
exec "$basedir/../@anthropic-ai/claude-code/bin/claude.exe"   "$@"
"""
    place.script(modules / ".bin/claude", shim)
    assert place.found("node_modules/.bin/claude", "-p", "hi") == [str(claude)]


def test_small_programs_options_and_prompts_are_nothing(place: Place) -> None:
    place.program(place.bin / "ls", 1000)
    place.program(place.bin / "-p")
    place.program(place.bin / "say claude")
    assert place.found("ls", "-p", "A=claude", "no such thing", "/nowhere") == []
    assert place.found() == []


def test_it_ends_soon_whatever_it_finds(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts that run each other, links in circles, more programs than it names."""
    for one, other in (("a", "b"), ("b", "a")):
        place.script(place.bin / one, f"#!/bin/sh\n{other} {one} a b\n")
    (place.bin / "loop").symlink_to(place.bin / "loop")
    names = [f"big{n}" for n in range(programs.PROGRAMS_MAX + 5)]
    for name in names:
        place.program(place.bin / name)
    assert len(place.found("a", "loop", *names)) == programs.PROGRAMS_MAX
    monkeypatch.setattr(programs, "SECONDS_MAX", -1.0)
    assert place.found(*names) == []


def test_what_the_account_says(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    claude = place.program(place.bin / "claude")
    monkeypatch.chdir(place.work)
    environment = {"PATH": str(place.bin), "HOME": str(place.home)}
    assert programs_ahead(["claude"], environment, invoking_account()) == (str(claude),)
