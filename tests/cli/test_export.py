"""`export`: files that other tools open, whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.contract import event_json
from halton_meter.model import PricedEvent, Tokens, Usage
from halton_meter.store import Reader, Store
from tests.support.made import HOUR_NS, NOON_NS, made
from tests.support.quick import first

FORMS = ["sqlite", "csv", "parquet", "jsonl"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def keep(home: Path, *events: PricedEvent) -> None:
    with Store(home) as store:
        store.append(events)
        store.count_loss("ring_full", 2, NOON_NS)
        store.flush()


def export(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", *arguments])


EVENTS = (
    made("a", "0.0249999999999999999999", project="web"),
    made(
        "b",
        None,
        project=None,
        at_ns=NOON_NS + HOUR_NS,
        error_class="rate_limit",
        http_status=429,
        parts=(Usage("m", Tokens(input=7, cache_write_5m=2, cache_write_1h=3)),),
    ),
    made("c", "1.005", project="api", at_ns=NOON_NS + 2 * HOUR_NS, conditions={"plan": "claude"}),
)


def test_sqlite_has_the_tables_that_others_query(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    target = tmp_path / "spend.sqlite"
    assert export("sqlite", str(target)).exit_code == 0
    connection = sqlite3.connect(target)
    connection.row_factory = sqlite3.Row
    a, b, c = connection.execute("SELECT * FROM requests ORDER BY id").fetchall()
    assert (a["cost_usd_minor_units"], a["cost_usd_micro_units"]) == (2, 25000)
    assert a["cost_usd"] == "0.0249999999999999999999"
    assert (b["cost_usd_minor_units"], b["cost_usd"]) == (None, None)
    assert (b["status"], b["error_class"], b["http_status"]) == ("error", "rate_limit", 429)
    assert (b["input_tokens"], b["cache_write_tokens"], b["cache_read_tokens"]) == (7, 5, None)
    assert (a["tokens_complete"], a["request_kind"], a["latency_ms"]) == (1, "chat", 2500)
    assert a["requested_at"] == "2026-03-10T12:00:00.000000Z"
    assert (a["mode"], c["mode"], b["project_id"]) == ("api", "plan", None)
    named = connection.execute(
        "SELECT requests.id, projects.name FROM requests JOIN projects "
        "ON projects.id = project_id ORDER BY 1"
    ).fetchall()
    assert [tuple(row) for row in named] == [("a", "web"), ("c", "api")]
    assert [tuple(row) for row in connection.execute("SELECT cause, count FROM losses")] == [
        ("ring_full", 2)
    ]
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_csv_keeps_money_exact_and_the_unknown_empty(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    target = tmp_path / "spend.csv"
    assert export("csv", str(target)).exit_code == 0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["list_usd"] for row in rows] == ["0.0249999999999999999999", "", "1.005"]
    assert rows[0]["started_at"] == "2026-03-10T12:00:00.000000Z"
    assert rows[1]["cache_read_tokens"] == ""


def test_parquet_opens_again_with_numbers_and_exact_text(home: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    keep(home, *EVENTS)
    target = tmp_path / "spend.parquet"
    assert export("parquet", str(target)).exit_code == 0
    found = duckdb.execute(
        f"SELECT sum(list_usd), max(list_usd_exact) FROM '{target}' WHERE id <> 'b'"
    ).fetchone()
    assert [str(value) for value in found] == ["1.029999999999", "1.005"]


def test_jsonl_is_what_events_prints(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    target = tmp_path / "spend.jsonl"
    assert export("jsonl", str(target)).exit_code == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert found == [json.loads(json.dumps(event_json(event))) for event in EVENTS]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_exists_is_replaced_only_when_told_to(
    home: Path, tmp_path: Path, form: str
) -> None:
    keep(home, *EVENTS)
    target = tmp_path / "old"
    target.write_text("precious")
    refused = export(form, str(target))
    assert (refused.exit_code, "--force" in refused.stderr) == (1, True)
    assert target.read_text() == "precious"
    assert export(form, str(target), "--force").exit_code == 0
    assert target.read_bytes() != b"precious"
    assert target.stat().st_mode & 0o077 == 0


def test_a_link_stays_one_and_its_file_is_replaced(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    link, file = tmp_path / "spend.csv", tmp_path / "elsewhere.csv"
    link.symlink_to(file)
    assert export("csv", str(link)).exit_code == 0
    assert (link.is_symlink(), len(file.read_text().splitlines())) == (True, 4)
    file.write_text("old")
    assert export("csv", str(link), "--force").exit_code == 0
    assert (link.is_symlink(), len(file.read_text().splitlines())) == (True, 4)


@pytest.mark.parametrize("form", FORMS)
def test_a_selection_is_exported(home: Path, tmp_path: Path, form: str) -> None:
    keep(home, *EVENTS)
    result = export(form, str(tmp_path / "x"), "--project", "web")
    assert result.stdout.startswith("1 request in ")


def test_a_failure_leaves_neither_the_file_nor_a_part_of_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(home, *EVENTS)
    folder = tmp_path / "out"
    folder.mkdir()

    def fail(_reader: Reader, path: Path, *_: object) -> int:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(__import__("halton_meter.cli.export", fromlist=["_"])._WRITERS, "csv", fail)
    result = export("csv", str(folder / "x.csv"))
    assert result.exit_code == 1
    assert f"the disk is full ({folder}). Free some space (df -h {folder})" in result.stderr
    assert list(folder.iterdir()) == []


def test_what_matches_nothing_says_so(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    done = export("jsonl", str(tmp_path / "none.jsonl"), "--flag", "nosuch")
    assert done.stdout.startswith(f"0 requests in {tmp_path / 'none.jsonl'}\nNo requests match.")
    assert "There is no flag 'nosuch'. Flags: aborted," in done.stdout
    piped = export("jsonl", "-", "--provider", "nosuch")
    assert (piped.exit_code, piped.stdout) == (0, "")
    assert "No requests match. All that are stored: halton-meter events" in piped.stderr


def test_nothing_stored_is_a_failure_that_says_why(home: Path, tmp_path: Path) -> None:
    result = export("csv", str(tmp_path / "x"))
    assert (result.exit_code, "Nothing metered yet" in result.stderr) == (1, True)


def test_an_unknown_form_is_wrong_usage(home: Path, tmp_path: Path) -> None:
    assert export("xml", str(tmp_path / "x")).exit_code == 2


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_folder_is_named_with_the_command_that_makes_it(
    home: Path, tmp_path: Path, form: str
) -> None:
    keep(home, *EVENTS)
    target = tmp_path / "no such" / "x"
    result = export(form, str(target))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    assert f"cannot write {target}: " in result.stderr
    assert f"mkdir -p '{target.parent}'" in result.stderr
    assert str(home) not in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("left_bytes", first([0, 4096]))
def test_a_full_disk_is_named_with_the_command_that_shows_it(
    home: Path, tmp_path: Path, form: str, left_bytes: int
) -> None:
    keep(home, *(made(f"e{n}", "1.5", endpoint=f"{n:x}" * 40) for n in range(3000)))
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        (folder / "ballast").write_bytes(bytes(65536 - left_bytes))
        result = export(form, str(folder / "x"))
        assert [file.name for file in folder.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert f"cannot write {folder / 'x'}: the disk is full ({folder})" in result.stderr
    assert f"df -h {folder}" in result.stderr


def test_what_is_no_file_is_not_replaced(home: Path) -> None:
    keep(home, *EVENTS)
    for more in ([], ["--force"]):
        result = export("csv", "/dev/full", *more)
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == 1
        assert "/dev/full" in result.stderr
    assert Path("/dev/full").is_char_device()


# --- through a pipe -------------------------------------------------------------------------------


def piped(home: Path, shell: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "HALTON_METER_HOME": str(home), "PY": sys.executable}
    text = shell.replace("HM", '"$PY" -m halton_meter export')
    return subprocess.run(
        ["bash", "-c", text], env=environment, cwd=home.parent, capture_output=True, check=False
    )


@pytest.mark.parametrize("form", [*FORMS, "json"])
def test_a_dash_is_standard_output(home: Path, tmp_path: Path, form: str) -> None:
    keep(home, *EVENTS)
    done = export(form, "-")
    assert done.exit_code == 0, done.output
    assert export(form, str(tmp_path / "file")).exit_code == 0
    heads = {"sqlite": b"SQLite format 3\0", "parquet": b"PAR1"}
    whole = (tmp_path / "file").read_bytes()
    if form in heads:
        assert done.stdout_bytes.startswith(heads[form])
    else:
        assert done.stdout_bytes == whole


def test_pipes_and_devices_are_written_into_and_files_appended_to(home: Path) -> None:
    keep(home, *EVENTS)
    done = piped(
        home,
        "mkfifo p; (wc -l <p) & HM csv p; wait $!; echo first >o; HM csv /dev/stdout >>o; wc -l <o;"
        "HM csv >(wc -l) | cat; HM jsonl /dev/fd/3 3>&1 >/dev/null | wc -l; HM csv /dev/null;"
        "HM jsonl - | head -c1; HM csv ./-; wc -l <./-",
    )
    assert done.stderr == b""
    words = done.stdout.decode().replace("{", " ").split()
    assert words == ["4", "5", "4", "3", "3", "requests", "in", "-", "4"]
    assert sorted(each.name for each in home.parent.iterdir()) == ["-", "home", "o", "p"]


def test_a_pipe_that_takes_nothing_is_one_line(home: Path) -> None:
    keep(home, *EVENTS)
    done = piped(home, "HM csv - >/dev/full; echo $?; HM csv /dev/full; echo $?")
    assert done.stdout == b"1\n1\n"
    assert b"cannot write to standard output: No space left on device" in done.stderr
    assert b"cannot write into /dev/full: No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_terminal_gets_no_bytes(home: Path) -> None:
    keep(home, *EVENTS)
    ours, theirs = os.openpty()
    try:
        done = export("sqlite", f"/dev/fd/{theirs}")
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.exit_code == 1
    assert done.stderr == (
        f"halton-meter: sqlite is not text, and /dev/fd/{theirs} is a terminal\n"
        "  fix: halton-meter export sqlite spend.sqlite\n"
    )


def test_the_folder_that_is_missing_is_the_one_behind_a_link(home: Path, tmp_path: Path) -> None:
    keep(home, *EVENTS)
    link = tmp_path / "link.csv"
    link.symlink_to(tmp_path / "gone" / "spend.csv")
    assert export("csv", str(link)).stderr == (
        f"halton-meter: cannot write {link}: there is no folder {tmp_path / 'gone'}\n"
        f"  fix: mkdir -p {tmp_path / 'gone'}\n"
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has /proc")
def test_a_folder_that_is_there_is_not_said_to_be_missing(home: Path) -> None:
    keep(home, *EVENTS)
    assert export("csv", "/proc/spend.csv").stderr == (
        "halton-meter: cannot write /proc/spend.csv: /proc takes no new files\n"
        "  fix: name a file in another folder\n"
    )
