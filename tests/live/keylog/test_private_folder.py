"""Folders for what must not stay: gone at the end, and what a killed owner left, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from halton_meter.live.keylog.private_folder import (
    KEYS,
    RECORDING,
    private_folder,
    remove_left_over,
)

_OWNER = """
import sys, time
from halton_meter.live.keylog.private_folder import RECORDING, private_folder
with private_folder(RECORDING) as folder:
    (folder / "recorded.pcapng").write_text("a prompt")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_is_private_and_gone_at_the_end() -> None:
    with private_folder(KEYS) as folder:
        (folder / "keys.log").write_text("secrets")
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_a_killed_owner_left_is_removed_and_what_a_living_one_holds_is_not(
    tmp_path: Path,
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        later = time.time() + 1
        remove_left_over(tmp_path, later)
        assert (folder / "recorded.pcapng").exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait(30)
        remove_left_over(tmp_path, folder.stat().st_ctime - 1)
        assert folder.exists()  # too young: its owner may not have locked it yet
        remove_left_over(tmp_path, later)
        assert not folder.exists()
    finally:
        owner.kill()
        owner.communicate(timeout=30)


def test_what_others_may_have_made_is_left_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "mine", tmp_path / f"{KEYS}link"
    target.mkdir(0o700)
    link.symlink_to(target)
    open_to_all = tmp_path / f"{RECORDING}open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    file = tmp_path / f"{KEYS}file"
    file.write_text("")
    remove_left_over(tmp_path, time.time() + 1)
    assert sorted(os.listdir(tmp_path)) == sorted(
        each.name for each in (target, link, open_to_all, file)
    )
