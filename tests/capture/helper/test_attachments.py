"""What root opens on behalf of processes: regular files, and nothing else that has their name."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from capture.helper.files.file import open_regular


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        fd = open_regular(str(tmp_path / name))
        assert os.read(fd, 9) == b"text"
        os.close(fd)


def test_a_device_a_pipe_and_a_folder_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    gc.collect()  # else what earlier tests left is closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for name in ("pipe", "device", "."):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(str(tmp_path / name))
    assert len(os.listdir("/proc/self/fd")) == before
