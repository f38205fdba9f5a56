"""Clients are found where they are installed, and word comes when a new version appears there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture.helper import installs
from capture.helper.installs import Installs, homes_of
from tests.support.waiting import is_readable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def watched(home: Path) -> Iterator[Installs]:
    patterns = [pattern for pattern in installs._PATTERNS if pattern.startswith("{home}")]
    made = Installs([str(home)], patterns)
    yield made
    made.close()


def put(path: Path, content: str = "program") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return str(path)


def listed(installs: Installs) -> list[str]:
    """All of it at once."""
    return [path for path in installs.candidates() if path is not None]


def word_came(watched: Installs) -> bool:
    """Events of this process's own acts are in the queue before the acts return."""
    return is_readable(watched) and watched.changed()


CLIENTS = (
    ".local/share/claude/versions/2.1.330",
    ".claude/local/node_modules/@anthropic-ai/claude-code-linux-x64/claude",
    ".npm-global/lib/node_modules/@anthropic-ai/claude-code/bin/claude.exe",
    ".nvm/versions/node/v22.1.0/lib/node_modules/opencode-ai/node_modules/opencode-linux-x64/bin/opencode",
    ".bun/bin/bun",
    ".opencode/bin/opencode",
    ".local/bin/codex",
    "go/bin/mods",
    ".local/lib/python3.12/site-packages/grpc/_cython/cygrpc.cpython-312-x86_64-linux-gnu.so",
)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_is_listed_and_its_installation_is_told(
    home: Path, watched: Installs, name: str
) -> None:
    assert listed(watched) == []
    path = home
    for part in Path(name).parts[:-1]:  # each folder may come long before the next
        path /= part
        path.mkdir()
        watched.changed()
        listed(watched)
    client = put(home / name)
    assert word_came(watched)
    assert listed(watched) == [client]


def test_a_package_that_comes_at_once_is_told(home: Path, watched: Installs) -> None:
    listed(watched)
    client = put(home / CLIENTS[1])
    assert word_came(watched)
    assert listed(watched) == [client]


def test_a_new_version_beside_the_old_is_told(home: Path, watched: Installs) -> None:
    folder = home / ".local/share/claude/versions"
    first = put(folder / "2.1.330")
    assert listed(watched) == [first]
    assert not watched.changed()
    second = put(folder / "2.1.331")
    assert word_came(watched)
    assert listed(watched) == [first, second]


def test_a_download_moved_into_place_is_told(home: Path, watched: Installs) -> None:
    folder = home / ".bun/bin"
    put(folder / "bun")
    listed(watched)
    put(home / "download").encode()
    os.rename(home / "download", folder / "bun")
    assert word_came(watched)


def test_a_file_still_being_written_is_told_again_when_it_is_whole(
    home: Path, watched: Installs
) -> None:
    folder = home / ".bun/bin"
    folder.mkdir(parents=True)
    listed(watched)
    with (folder / "bun").open("w") as file:
        assert word_came(watched)
        file.write("half")
    assert word_came(watched)


def test_a_file_found_half_written_under_its_own_name_is_told_again(
    home: Path, watched: Installs
) -> None:
    folder = home / ".nvm/versions/node/v26.10.0/bin"
    folder.mkdir(parents=True)
    with (folder / "node").open("w") as file:
        file.write("half")
        assert listed(watched) == [str(folder / "node")]
        watched.changed()
    assert word_came(watched)


def test_other_files_of_a_home_are_no_news(home: Path, watched: Installs) -> None:
    listed(watched)
    put(home / ".bash_history")
    put(home / "code" / "main.c")
    assert not watched.changed()


def test_a_folder_that_went_and_came_is_watched_again(home: Path, watched: Installs) -> None:
    client = Path(put(home / ".bun/bin/bun"))
    listed(watched)
    client.unlink()
    client.parent.rmdir()
    client.parent.parent.rmdir()
    assert word_came(watched)
    assert listed(watched) == []
    put(client)
    assert word_came(watched)
    assert listed(watched) == [str(client)]


def test_watches_are_limited(
    home: Path, watched: Installs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installs, "WATCHES_MAX", 3)
    for number in range(9):
        put(home / f".nvm/versions/node/v{number}/lib/node_modules/opencode-ai/bin/opencode")
    assert len(listed(watched)) == 9
    assert len(watched._watched) == 3


def test_homes_come_from_the_list_of_accounts() -> None:
    root = homes_of([0])
    assert root == ["/root"]
    assert "/root" in homes_of(None)
    assert "/nonexistent" not in homes_of(None)
    assert homes_of([4_000_000_000]) == []
