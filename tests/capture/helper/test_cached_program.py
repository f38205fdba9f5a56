"""The compiled BPF program: root loads none from the cache that somebody else may have written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capture import loader

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has such a cache")
OTHER_UID = 64_001


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    monkeypatch.setattr(loader, "CACHE_DIRECTORY", folder)
    monkeypatch.setattr(loader, "BUILT_OBJECT", tmp_path / "not built")
    return folder


def test_what_root_compiled_is_used(cache: Path) -> None:
    loader._cached_object().write_bytes(b"program")
    assert loader.find_object() == loader._cached_object()


@pytest.mark.parametrize("how", ["owner", "mode", "link"])
def test_a_program_that_others_may_have_written_is_not(cache: Path, how: str) -> None:
    cached = loader._cached_object()
    if how == "link":
        (cache / "elsewhere").write_bytes(b"program")
        cached.symlink_to(cache / "elsewhere")
    else:
        cached.write_bytes(b"program")
        os.chown(cached, OTHER_UID if how == "owner" else 0, 0)
        cached.chmod(0o666 if how == "mode" else 0o644)
    assert loader.built_object() is None


@pytest.mark.parametrize("how", ["owner", "mode", "link"])
def test_nothing_is_read_from_or_compiled_into_a_folder_of_others(cache: Path, how: str) -> None:
    loader._cached_object().write_bytes(b"program")
    if how == "owner":
        os.chown(cache, OTHER_UID, OTHER_UID)
    elif how == "mode":
        cache.chmod(0o777)
    else:
        cache.rename(cache.with_name("elsewhere"))
        cache.symlink_to(cache.with_name("elsewhere"))
    assert loader.built_object() is None
    before = sorted(cache.iterdir())
    with pytest.raises(loader.LoadFailed, match="not root's alone"):
        loader.find_object()
    assert sorted(cache.iterdir()) == before
