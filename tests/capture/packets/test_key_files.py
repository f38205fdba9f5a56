"""Key files that are written meanwhile: late, in pieces, replaced, many."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from capture.packets import key_files
from capture.packets.key_files import KeyFiles
from capture.packets.keylog import KeyLog


def line(number: int) -> str:
    return f"CLIENT_RANDOM {number:064x} {number:096x}\n"


def test_a_file_that_comes_late_and_grows(tmp_path: Path) -> None:
    keys, path = KeyLog(), tmp_path / "keys.log"
    files = KeyFiles([path], keys)
    assert files.poll() == 0
    path.write_text(line(1))
    assert files.poll() == 1
    assert files.poll() == 0
    with path.open("a") as file:
        file.write(line(2)[:50])
    assert files.poll() == 0
    with path.open("a") as file:
        file.write(line(2)[50:] + line(3))
    assert files.poll() == 2
    assert len(keys) == 3


def test_a_last_line_without_an_end_is_read_at_the_end(tmp_path: Path) -> None:
    keys, path = KeyLog(), tmp_path / "keys.log"
    path.write_text(line(1) + line(2).rstrip())
    files = KeyFiles([path], keys)
    assert (files.poll(), len(keys)) == (1, 1)
    files.poll_all()
    assert len(keys) == 2


@pytest.mark.parametrize("how", ["cut off", "replaced"])
def test_a_file_that_begins_anew_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    keys, path = KeyLog(), tmp_path / "keys.log"
    files = KeyFiles([path], keys)
    path.write_text(line(1) + line(2))
    files.poll()
    if how == "replaced":
        other = tmp_path / "other"
        other.write_text(line(3) + line(4))
        os.replace(other, path)
    else:
        path.write_text(line(3))
    files.poll()
    assert bytes.fromhex(f"{3:064x}") in keys
    assert bytes.fromhex(f"{1:064x}") in keys


def test_a_file_that_was_cut_off_and_has_grown_past_its_old_size_is_read_anew(
    tmp_path: Path,
) -> None:
    keys, path = KeyLog(), tmp_path / "keys.log"
    files = KeyFiles([path], keys)
    path.write_text(line(1))
    files.poll()
    path.write_text(line(2) + line(3))
    assert files.poll() == 2
    with path.open("a") as file:
        file.write(line(4))
    assert files.poll() == 1
    assert len(keys) == 4


def test_of_a_file_that_is_long_already_the_end_is_read_and_all_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_files, "OLD_BYTES_MAX", 10_000)
    monkeypatch.setattr(key_files, "READ_BYTES_MAX", 4_000)
    keys, path = KeyLog(), tmp_path / "keys.log"
    size = len(line(0))
    path.write_text("".join(line(number) for number in range(1_000)))
    files = KeyFiles([path], keys)
    assert files.poll_all() == 10_000 // size
    assert bytes.fromhex(f"{999:064x}") in keys
    with path.open("a") as file:
        file.writelines(line(number) for number in range(1_000, 1_060))
    assert sum(files.poll() for _ in range(4)) == 60
    path.write_text("".join(line(number) for number in range(2_000, 3_000)))  # rotated
    assert files.poll_all() >= 10_000 // size
    assert bytes.fromhex(f"{2_999:064x}") in keys


def test_a_hole_of_gigabytes_is_stepped_over(tmp_path: Path) -> None:
    keys, path = KeyLog(), tmp_path / "keys.log"
    files = KeyFiles([path], keys)
    path.write_text(line(1))
    files.poll()
    for number in (2, 3):
        os.truncate(path, number << 40)
        assert files.poll() == 0
        with path.open("a") as file:
            file.write("\n" + line(number))
        assert files.poll() == 1


def test_what_cannot_be_read_is_told_as_long_as_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "link"
    path.symlink_to(path)
    files = KeyFiles([path], KeyLog())
    files.poll()
    assert files.troubles == {path: "Too many levels of symbolic links"}
    path.unlink()
    path.write_text(line(1))
    assert files.poll() == 1
    assert files.troubles == {}
    monkeypatch.setattr(key_files, "FILES_MAX", 2)
    for number in range(3):
        (tmp_path / f"{number}.log").write_text(line(number))
    crowded = KeyFiles([tmp_path], KeyLog())
    assert crowded.poll() == 2
    assert crowded.troubles == {tmp_path: "of 4 files, 2 are read"}


def test_a_folder_of_files_one_a_process(tmp_path: Path) -> None:
    keys, files = KeyLog(), None
    files = KeyFiles([tmp_path / "keys"], keys)
    assert files.poll() == 0
    (tmp_path / "keys").mkdir()
    for number in range(5):
        (tmp_path / "keys" / f"{number}.log").write_text(line(number))
    assert files.poll() == 5
    assert len(keys) == 5


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    (tmp_path / "folder").mkdir()
    (tmp_path / "noise").write_bytes(os.urandom(100_000))
    files = KeyFiles([tmp_path, tmp_path / "pipe", Path("/dev/zero")], KeyLog())
    assert files.poll() == 0
    said = "it is no regular file"
    assert files.troubles == {tmp_path / "pipe": said, Path("/dev/zero"): said}


def test_files_that_are_gone_are_forgotten_and_their_secrets_are_not(tmp_path: Path) -> None:
    keys = KeyLog()
    files = KeyFiles([tmp_path], keys)
    for number in range(20):
        path = tmp_path / f"{number}.log"
        path.write_text(line(number))
        assert files.poll() == 1
        path.unlink()
    assert files.poll() == 0
    assert files._files == {}
    assert len(keys) == 20


def test_who_looks_often_looks_for_a_tenth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    looks: list[float] = []

    def listdir(path: Path) -> list[str]:
        nonlocal now
        looks.append(now)
        now += 0.002  # what a look at a large folder takes
        return []

    monkeypatch.setattr("capture.packets.key_files.time.monotonic", lambda: now)
    monkeypatch.setattr("capture.packets.key_files.os.listdir", listdir)
    files = KeyFiles([tmp_path], KeyLog())
    while now < 101.0:
        files.poll(rested=True)
        now += 0.0005
    assert 40 <= len(looks) <= 50  # of 0.02 s each


def test_the_newest_handshakes_are_kept_where_old_ones_may_be_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("capture.packets.keylog.SECRETS_MAX", 10)
    keys = KeyLog(forgets=True)
    keys.add("".join(map(line, range(25))).encode())
    assert [int.from_bytes(random) for random in keys.handshakes()] == list(range(15, 25))
    assert keys.refused == 0


def test_in_our_folder_what_was_read_becomes_a_hole_and_links_are_not_followed(
    tmp_path: Path,
) -> None:
    ours, elsewhere = tmp_path / "keys", tmp_path / "elsewhere.log"
    ours.mkdir()
    elsewhere.write_text(line(9) * 100)
    (ours / "link.log").symlink_to(elsewhere)
    path = ours / "tls.log"
    keys = KeyLog()
    files = KeyFiles([ours], keys, ours)
    for number in range(200):
        with path.open("a") as file:
            file.write(line(number + 10))
        assert files.poll() == 1
    assert path.read_bytes().strip(b"\0") == b""
    assert path.stat().st_blocks * 512 <= 4096 < path.stat().st_size
    assert elsewhere.read_text() == line(9) * 100
    # Whoever comes next goes on behind the hole.
    with path.open("a") as file:
        file.write(line(999))
    again = KeyLog()
    assert KeyFiles([ours], again, ours).poll() == 1
    assert bytes.fromhex(f"{999:064x}") in again
