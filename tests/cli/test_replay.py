"""`halton-meter replay` as a person or a script calls it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter.cli import main
from halton_meter.store import Store
from tests.support.made import made
from tests.support.quick import first
from tests.support.recorder.packets import pcap, write
from tests.support.recorder.relay import record
from tests.support.recorder.scenarios import every
from tests.support.waiting import wait_until

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pcaps"
PLAIN = FIXTURES / "anthropic_message.pcapng"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(folder))
    return folder


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def events(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_json_is_one_contract_object_a_line() -> None:
    result = call(PLAIN, "--json")
    assert result.exit_code == 0
    (event,) = events(result)
    assert event["provider"] == "anthropic"
    assert event["source"] == "pcap"
    assert event["list_usd"] == "0.002655"
    assert event["pid"] is None


def test_the_table_ends_in_a_sum() -> None:
    result = call(PLAIN)
    assert result.exit_code == 0
    assert "claude-sonnet-4-5-20250929" in result.stdout
    assert "1 request in 1 file: $0.002655 list price" in result.stdout


def test_quiet_prints_the_sum_only() -> None:
    result = call(PLAIN, "--quiet")
    assert result.stdout == "1 request in 1 file: $0.002655 list price\n"


def test_gaps_and_losses_are_shown() -> None:
    result = call(FIXTURES / "anthropic_stream_hole.pcapng")
    assert "\n  1 request incomplete (bytes lost)\n" in result.stdout
    assert "\n  892 TCP bytes missing (record with a larger buffer: " in result.stdout
    assert "resync" not in result.stdout


def test_what_shares_an_id_and_what_was_stored_before_is_said() -> None:
    capture = FIXTURES / "anthropic_one_id_thrice.pcapng"
    shared = "  2 requests share another's response id, each counted\n"
    total = "3 requests in 1 file: $0.018675 list price\n"
    assert call(capture, "--quiet", "--store").stdout == total + shared
    before = "  3 requests are in the store already: counted once\n"
    assert call(capture, "--quiet", "--store").stdout == total + before + shared


OTHERS = 3  # segments of other processes hold so many requests


@pytest.mark.parametrize("beside", ["left behind", "still written", "left behind, the same"])
def test_what_was_stored_before_is_counted_whatever_others_have_in_the_journal(
    home: Path, beside: str
) -> None:
    capture = FIXTURES / "anthropic_one_id_thrice.pcapng"
    if beside != "left behind, the same":
        call(capture, "--quiet", "--store")
    other = Store(home)
    if beside == "left behind, the same":
        call(capture, "--quiet", "--store")
        with other.reading() as reader:
            other.append([*reader.events()])
        (home / "meter.duckdb").unlink()
    else:
        other.append(made(f"other-{number}") for number in range(OTHERS))
    if beside != "still written":
        other.close()
    again = call(capture, "--quiet", "--store")
    other.close()
    assert "\n  3 requests are in the store already: counted once\n" in again.stdout


def test_what_only_the_store_takes_for_one_is_not_said_to_have_been_there(home: Path) -> None:
    done = call(FIXTURES, "--quiet", "--store").stdout
    printed = int(done.split(" requests in ")[0])
    stored = len(CliRunner().invoke(main, ["events", "--json"]).stdout.splitlines())
    assert "already" not in done
    assert printed == stored + 1
    assert "\n  1 request is the same as another of these: stored once\n" in done
    again = call(FIXTURES, "--quiet", "--store").stdout
    assert f"\n  {stored} requests are in the store already: counted once\n" in again


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("one.pcapng", "deep/two.pcapng", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PLAIN, tmp_path / name)
    # The same exchange in two files is one event.
    assert len(events(call(tmp_path, "--json"))) == 1
    assert "in 2 files" in call(tmp_path).stdout
    assert "in 1 file" in call(f"{tmp_path}/o*.pcapng").stdout


def test_a_file_that_is_no_capture_fails_and_the_others_are_read(tmp_path: Path) -> None:
    text = write(tmp_path / "notes.txt", b"nothing")
    result = call(text, PLAIN, "--json")
    assert result.exit_code == 1
    assert len(events(result)) == 1
    assert result.stderr == (
        f"halton-meter: {text} does not start like a pcap or pcapng file\n"
        "  fix: see what it is: file FILE\n"
    )


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    result = call(tmp_path / "nothing.pcap")
    assert result.exit_code == 1
    assert "no such file" in result.stderr
    result = call(tmp_path)
    assert result.exit_code == 1
    assert "no captures (.pcap, .pcapng, .cap) in this folder" in result.stderr


def test_wrong_usage_is_2() -> None:
    assert call().exit_code == 2
    assert call(PLAIN, "--keys", "/nonexistent/keys.log").exit_code == 2


def test_without_keys_it_names_the_host_and_the_command(tmp_path: Path) -> None:
    talk = next(s for s in every() if s.name == "anthropic_message").talks[0]
    given = record(talk.host, talk.steps)
    capture = write(tmp_path / "no keys.pcap", pcap(given.packets))
    keys = write(tmp_path / "keys.log", given.secrets.encode())
    result = call(capture)
    assert result.exit_code == 1
    assert "1 encrypted connection without keys, to api.anthropic.com\n" in result.stderr
    assert f"halton-meter replay '{capture}' --keys sslkeys.log" in result.stderr
    assert len(events(call(capture, "--keys", keys, "--json"))) == 1


def test_keys_of_another_run_are_told_from_none(tmp_path: Path) -> None:
    talk = next(s for s in every() if s.name == "anthropic_message").talks[0]
    given, other = record(talk.host, talk.steps), record(talk.host, talk.steps)
    capture = write(tmp_path / "capture.pcap", pcap(given.packets))
    keys = write(tmp_path / "keys.log", other.secrets.encode())
    result = call(capture, "--keys", keys)
    assert result.exit_code == 1
    assert "1 connection seen: 1 without keys" in result.stdout
    assert "the keys given belong to 1 other handshake\n" in result.stderr


def test_packets_of_a_link_layer_that_is_not_read_are_an_error(tmp_path: Path) -> None:
    talk = next(s for s in every() if s.name == "anthropic_message").talks[0]
    data = bytearray(pcap(record(talk.host, talk.steps).packets))
    data[20] = 105
    result = call(write(tmp_path / "wifi.pcap", bytes(data)))
    assert result.exit_code == 1
    assert "packets of link type 105 not read" in result.stderr
    assert "tcpdump -i any -w capture.pcap" in result.stderr


@pytest.mark.parametrize(
    ("start", "command"), [(b"\x28\xb5\x2f\xfd", "zstd -d"), (b"\xfd7zXZ\0", "xz -dk")]
)
def test_a_compressed_capture_is_told_how_to_be_unpacked(
    start: bytes, command: str, tmp_path: Path
) -> None:
    capture = write(tmp_path / "a capture", start + bytes(40))
    result = call(capture)
    assert result.exit_code == 1
    assert f"unpack it first: {command} '{capture}'" in result.stderr


def test_what_gave_no_event_is_said() -> None:
    result = call(FIXTURES / "other_host_gives_nothing.pcapng")
    assert result.exit_code == 0
    assert "1 connection seen: 1 to hosts of no known provider" in result.stdout


def test_stored_events_can_be_listed_and_twice_is_once(home: Path) -> None:
    for _ in range(2):
        assert call(PLAIN, "--store", "--project", "harbour").exit_code == 0
    listed = CliRunner().invoke(main, ["events", "--since", "2020-01-01", "--json"])
    (event,) = events(listed)
    assert (event["project"], event["list_usd"]) == ("harbour", "0.002655")


def test_events_that_no_disk_takes_are_an_error_and_not_said_to_wait(home: Path) -> None:
    home.mkdir(parents=True)
    (home / "journal").write_text("in the way")
    result = call(PLAIN, "--store")
    assert result.exit_code == 1
    assert "1 request in 1 file" in result.stdout
    why = "not everything could be stored: something else has a folder's name"
    assert f"halton-meter: {why}" in result.stderr
    assert "run the same command again" in result.stderr
    assert "not in the database yet" not in result.stderr
    (home / "journal").unlink()
    assert call(PLAIN, "--store").exit_code == 0
    assert len(events(CliRunner().invoke(main, ["events", "--json"]))) == 1


@pytest.mark.parametrize("damage", first(["cut off", "a folder", "empty", "zeros"], 2))
def test_a_damaged_database_is_left_as_it_is_and_events_wait(home: Path, damage: str) -> None:
    assert call(PLAIN, "--store").exit_code == 0
    path = home / "meter.duckdb"
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        raw = {"empty": b"", "zeros": bytes(5000), "cut off": path.read_bytes()[:5000]}
        path.write_bytes(raw[damage])
    done = call(FIXTURES / "openai_chat_gzip.pcapng", "--store", "--quiet")
    assert (done.exit_code, "1 request in 1 file" in done.stdout) == (1, True)
    assert done.stderr.startswith(f"halton-meter: {path} is damaged: ")
    assert done.stderr.endswith(
        "Nothing was changed; new events wait in the journal. "
        f"Keep the file and start a new one: mv {path} {path}.damaged\n"
    )
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert [each.name for each in home.glob("meter.duckdb*")] == ["meter.duckdb"]
    path.rename(f"{path}.damaged")
    listed = CliRunner().invoke(main, ["events", "--json"]).stdout.splitlines()
    assert [json.loads(line)["provider"] for line in listed] == ["openai"]


def test_nothing_is_stored_unless_asked(home: Path) -> None:
    assert call(PLAIN).exit_code == 0
    assert not home.exists()


def test_without_tshark_it_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    result = call(PLAIN)
    assert result.exit_code == 1
    assert "sudo apt install tshark" in result.stderr


def test_replaying_again_counts_its_losses_once(home: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.pcapng"
    shutil.copy(FIXTURES / "anthropic_stream_hole.pcapng", moved)
    call(FIXTURES / "anthropic_stream_hole.pcapng", "--store")
    once = report_of(home)
    call(moved, "--store")
    assert once["coverage"]["losses"]
    assert report_of(home)["coverage"]["losses"] == once["coverage"]["losses"]


def report_of(home: Path) -> dict[str, dict[str, object]]:
    result = CliRunner().invoke(main, ["report", "--json", "--since", "2020-01-01"])
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, object]] = json.loads(result.stdout)
    return found


def first_blocks(path: Path, share: float) -> bytes:
    """So much of a pcapng file's blocks: a capture that was ended in mid-conversation."""
    data = path.read_bytes()
    ends = [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + int.from_bytes(data[ends[-1] + 4 : ends[-1] + 8], "little"))
    return data[: ends[int(len(ends) * share)]]


def test_an_exchange_seen_cut_off_and_then_whole_is_one_line(tmp_path: Path, home: Path) -> None:
    whole = FIXTURES / "anthropic_stream_http2.pcapng"
    cut = tmp_path / "a.pcapng"
    for part in range(95, 30, -5):
        cut.write_bytes(first_blocks(whole, part / 100))
        alone = call(cut, "--json")
        if '"outcome":"complete"' not in alone.stdout and '"response_id":"' in alone.stdout:
            break
    lesser = events(alone)
    after = tmp_path / "b.pcapng"
    shutil.copy(whole, after)
    assert events(call(cut, after, "--json", "--store")) == events(call(whole, "--json"))
    assert lesser[0]["id"] in {event["id"] for event in events(call(whole, "--json"))}
    stored = CliRunner().invoke(main, ["events", "--json"])
    assert "aborted" not in stored.stdout


def test_a_dash_is_standard_input(tmp_path: Path) -> None:
    raw = (PLAIN).read_bytes()
    done = CliRunner().invoke(main, ["replay", "-", "--json"], input=raw)
    assert done.exit_code == 0, done.output
    assert done.stdout == call(PLAIN, "--json").stdout
    done = CliRunner().invoke(main, ["replay", "-"], input=b"no capture")
    assert done.exit_code == 1
    assert "halton-meter: standard input does not start like" in done.stderr
    assert CliRunner().invoke(main, ["replay", "-", "-"], input=raw).exit_code == 2


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (gzip.compress(b"no capture", mtime=0), "does not start like a pcap or pcapng file"),
        (b"\x28\xb5\x2f\xfd more", "is compressed with zstd; unpack it first: zstd -d FILE"),
    ],
    ids=["empty", "gzip", "zstd"],
)
def test_what_is_no_capture_is_told_of_standard_input(raw: bytes, said: str) -> None:
    done = CliRunner().invoke(main, ["replay", "-"], input=raw)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(f"halton-meter: standard input {said}\n  fix: ")
    packed = CliRunner().invoke(
        main, ["replay", "-", "--json"], input=gzip.compress(PLAIN.read_bytes())
    )
    assert packed.stdout == call(PLAIN, "--json").stdout


def test_what_has_no_end_and_is_no_capture_is_not_copied(tmp_path: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        done = piped(tmp_path, zeros)
        _, said = done.communicate(timeout=60)
    assert (done.returncode, list(tmp_path.glob("tmp/*"))) == (1, [])
    assert "standard input does not start like a pcap or pcapng file" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_of_standard_input_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = piped(tmp_path, subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write((PLAIN.read_bytes() * 200).decode("latin-1"))
    process.stdin.flush()
    wait_until(lambda: list(tmp_path.glob("tmp/*/standard input")), "the copy")
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    process.stdin.close()
    assert list(tmp_path.glob("tmp/*")) == []


def piped(tmp_path: Path, stdin: Any) -> subprocess.Popen[str]:
    """`replay -` as a process of its own, with a folder of its own for temporary files."""
    (tmp_path / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "halton_meter", "replay", "-"],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="latin-1",
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )
