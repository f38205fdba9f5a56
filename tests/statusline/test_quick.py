"""The status line as a process: quick, one line, exit code 0, whatever is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live.snapshot_writer import SnapshotWriter
from halton_meter.statusline import quick, snapshot
from halton_meter.statusline.snapshot import NAME, is_alive, start_of
from tests.live.test_snapshot import event

QUICK = [sys.executable, "-m", "halton_meter.statusline.quick"]
# What the ordinary commands need, and what the line has no time for.
HEAVY = (
    "click",
    "rich",
    "duckdb",
    "_duckdb",
    "orjson",
    "dataclasses",
    "typing",
    "decimal",
    "pathlib",
)


def run(
    home: Path | str, piped: bytes = b"", what: str = "statusline", **env: str
) -> subprocess.CompletedProcess[bytes]:
    environment = {"HALTON_METER_HOME": str(home), "PATH": os.environ["PATH"], "NO_COLOR": "1"}
    return subprocess.run(
        [*QUICK, what], input=piped, capture_output=True, env=environment | env, check=False
    )


def line_of(done: subprocess.CompletedProcess[bytes]) -> str:
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    return done.stdout.decode().removesuffix("\n")


def test_a_session_that_is_metered_now(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path)
    writer.add([event("e1", "0.25"), event("e2", "1", "s2")])
    writer.tick(time.monotonic() + 9)
    said = {"session_id": "s1", "cost": {"total_cost_usd": 0.25}}
    assert line_of(run(tmp_path, json.dumps(said).encode())) == "$0.25 session · $1.25 today"
    assert line_of(run(tmp_path, what="prompt")) == "$1.25"
    writer.end()
    assert line_of(run(tmp_path, json.dumps(said).encode())).startswith(
        "not metered: service is not running"
    )
    assert line_of(run(tmp_path, what="prompt")) == "not metered"


BROKEN = [b"", b"{", b"[1]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"session_id": 1e999}']


@pytest.mark.parametrize("piped", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("state", [None, *BROKEN[:5], b'{"version":1,"sessions":[],"day":"x"}'])
def test_broken_input_and_a_broken_snapshot_give_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piped: bytes, state: bytes | None
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    if state is not None:
        (tmp_path / NAME).write_bytes(state)
    line = quick.answer("statusline", piped, time.time())
    assert line.startswith("not metered: service is not running")
    assert "\n" not in line


def test_no_folder_a_snapshot_that_is_none_and_a_pipe_that_says_nothing(tmp_path: Path) -> None:
    assert line_of(run(tmp_path / "none")).startswith("not metered")
    os.mkfifo(tmp_path / NAME)
    assert line_of(run(tmp_path)).startswith("not metered")
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).symlink_to("/etc/passwd")
    assert line_of(run(tmp_path)).startswith("not metered")
    read, write = os.pipe()  # a client that opens its pipe and says nothing
    environment = {"HALTON_METER_HOME": str(tmp_path)}
    done = subprocess.run(
        [*QUICK, "statusline"],
        stdin=read,
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 1)
    os.close(write)


def test_a_reader_that_is_gone_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*QUICK, "statusline"],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
        env={"HALTON_METER_HOME": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_bug_of_ours_gives_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("boom")

    monkeypatch.setattr(quick, "answer", fail)
    monkeypatch.setattr(quick, "piped", lambda: b"")
    quick.main("statusline")
    assert capfd.readouterr().out == f"{quick.TRY}\n"


@pytest.mark.parametrize("what", ["statusline", "prompt"])
def test_the_entry_answers_before_anything_heavy_is_imported(tmp_path: Path, what: str) -> None:
    """As the console script calls it, and without what pytest has imported."""
    code = (
        f"import sys; before = set(sys.modules); sys.argv = ['halton-meter', {what!r}]\n"
        "from halton_meter import entry\n"
        "entry.main()\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={
            "HALTON_METER_HOME": str(tmp_path),
            "PYTHONPATH": str(Path(quick.__file__).parents[2]),
        },
        text=True,
        check=True,
    )
    first, imported = done.stdout.splitlines()
    assert first.startswith("not metered") or (what == "prompt" and first == "")
    modules = imported.split()
    assert "halton_meter.statusline.line" in modules
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_options_and_sudo_go_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for name in quick.CALLERS:
        monkeypatch.delenv(name, raising=False)
    assert quick.is_quick(["statusline"])
    assert quick.is_quick(["prompt"])
    assert not quick.is_quick(["statusline", "--help"])
    assert not quick.is_quick(["statusline", "install"])
    monkeypatch.setenv("SUDO_UID", "1000")
    assert not quick.is_quick(["statusline"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # it has become that user already
    assert quick.is_quick(["statusline"])


def test_who_meters_is_known_by_process_and_start(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    start = start_of(child.pid)
    assert is_alive({"writers": {str(child.pid): start}})
    assert not is_alive({"writers": {str(child.pid): f"{start}1"}})  # the number was given again
    child.kill()
    child.wait()
    assert not is_alive({"writers": {str(child.pid): start}})
    assert not is_alive({"writers": {"x": "", "-1": "", "0": "", "9" * 99: ""}})
    assert not is_alive({"writers": 3})


def test_the_folder_is_that_of_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halton_meter.accounts import home_folder

    for named in (str(tmp_path), "~/other", "relative/folder", ""):
        monkeypatch.setenv("HALTON_METER_HOME", named)
        assert snapshot.folder() == str(home_folder())
    monkeypatch.delenv("HALTON_METER_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert snapshot.folder() == str(home_folder())
