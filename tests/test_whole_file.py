"""Files of ours are whole or as they were, and nothing is left of what a full disk refused."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture.helper.files.own_folder import OwnFolder
from halton_meter.inspection import replayed
from halton_meter.live import snapshot_writer
from halton_meter.live.outages import Outages
from halton_meter.live.probes import remembered
from halton_meter.spending.ledger import write_whole
from halton_meter.whole_file import replacing
from pricing import overrides


def test_a_file_is_its_owners_alone_and_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    path.chmod(0o644)
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"new", None])  # type: ignore[list-item]
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_what_stands_in_the_way_of_the_new_file_is_not_written_to(tmp_path: Path) -> None:
    path, precious = tmp_path / "state.json", tmp_path / "precious"
    precious.write_text("theirs")
    (tmp_path / f".state.json.{os.getpid()}").symlink_to(precious)
    with replacing(path) as file:
        file.write(b"new")
    assert (path.read_text(), precious.read_text()) == ("new", "theirs")


_WRITERS: dict[str, Callable[[Path], Any]] = {
    "captures.json": lambda home: replayed.remember(home, [home / "a.pcapng"], 1, 2),
    "pricing.toml": lambda home: overrides.write(home, []),
    "snapshot.json": lambda home: snapshot_writer._write(home, {}),
    "daemon.state": lambda home: Outages(home).alive(1),
    "functions": lambda home: OwnFolder(home, files_max=9, bytes_max=99).write("found", "text"),
    "libraries": lambda home: remembered.remember(home, ["/home/ann/lib/libssl.so.3"]),
    "budgets": lambda home: write_whole(home / "spending.ndjson", [b"line"]),
}


@pytest.mark.parametrize("name", _WRITERS)
def test_a_full_disk_leaves_nothing_half_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_from: Path, _to: Path) -> None:
        assert list(tmp_path.iterdir()), "nothing was written"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        for call in ("replace", "rename"):
            disk.setattr(os, call, full)
        with contextlib.suppress(OSError):
            _WRITERS[name](tmp_path)
    assert list(tmp_path.iterdir()) == []
    _WRITERS[name](tmp_path)
    assert [each.stat().st_mode & 0o077 for each in tmp_path.iterdir()] == [0]
