"""The key of accounts' hashes: made once, private, and never in the way of metering."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from halton_meter.store import account_key, known_account_key
from halton_meter.store.keys import KEY_BYTES, NAME


def test_it_is_made_once_and_is_private(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert known_account_key(home) is None
    key = account_key(home)
    assert key is not None
    assert len(key) == KEY_BYTES
    assert account_key(home) == known_account_key(home) == key
    assert (home / NAME).stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in home.iterdir()) == [NAME, "journal"]
    assert account_key(tmp_path / "other") != key


def test_of_several_that_make_it_at_once_all_have_the_same(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    found: list[bytes | None] = []

    def make() -> None:
        together.wait()
        found.append(account_key(tmp_path))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {known_account_key(tmp_path)}


def test_half_a_key_is_replaced(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"half")
    key = account_key(tmp_path)
    assert key is not None
    assert known_account_key(tmp_path) == key


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_leads_elsewhere_is_not_read(tmp_path: Path, what: str) -> None:
    """Whoever can place it there would otherwise choose the key."""
    if what == "link":
        (tmp_path / "chosen").write_bytes(b"k" * KEY_BYTES)
        (tmp_path / NAME).symlink_to(tmp_path / "chosen")
    else:
        os.mkfifo(tmp_path / NAME)
    assert known_account_key(tmp_path) is None
    assert account_key(tmp_path) not in (None, b"k" * KEY_BYTES)


def test_without_a_folder_accounts_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert account_key(tmp_path / "file" / "home") is None
