"""Output to any terminal: what it lacks is replaced; what refuses ends the command in a line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main, streams
from halton_meter.cli.output import json_line
from halton_meter.store import Store
from tests.support.made import made
from tests.support.quick import first

ENCODINGS = (
    *("latin-1", "cp1252", "ascii", "iso8859-15", "cp437", "koi8-r", "gbk", "shift_jis"),
    *("euc-jp", "utf-8", "utf-16", "cp037"),
)
NAME = "naïve 日本 \udcff 🐍"
_DRAWN = ["report", "--by", "project"]
COMMANDS = (
    ["--help"],
    ["replay", "--help"],
    _DRAWN,
    ["report", "--csv", "--by", "project"],
    ["report", "--json", "--by", "project"],
    ["events"],
    ["events", "--json"],
    ["status"],
    ["pricing", "status"],
    ["pricing", "explain", "--text", "e1"],
    ["retag", "--from", "naïve 日本 ? 🐍", "--to", "größe"],
    ["retag", "--from", "a", "--to", "a"],
    ["größe"],
)
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    with Store(tmp_path) as store:
        store.append([made("e1", project="naïve 日本 ? 🐍", model="m", at_ns=10**18)])
        store.flush()
    return tmp_path


@pytest.mark.parametrize("encoding", first(ENCODINGS, 4))
def test_every_command_writes_in_every_encoding(
    home: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    errors = "strict" if ENCODINGS.index(encoding) % 2 else "backslashreplace"
    for command in COMMANDS:
        out = io.TextIOWrapper(io.BytesIO(), encoding, errors)
        err = io.TextIOWrapper(io.BytesIO(), encoding, errors)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as ended:
            main(command, prog_name="halton-meter")
        assert ended.value.code in (0, 1, 2), command
        for stream in (out, err):
            stream.flush()
            raw = stream.buffer
            assert isinstance(raw, io.BytesIO)
            text = raw.getvalue().decode(encoding)
            assert "\ufffd" not in text
            if "--json" in command and text:
                assert "naïve 日本 ? 🐍" in str(json.loads(text))
            if encoding == "ascii" and command == ["report"] and stream is out:
                assert "####" in text
                assert "na?ve ??" in text


def test_a_chart_keeps_its_shades_and_a_bound_its_sign_in_ascii() -> None:
    streams.prepare()
    raw = "█▓▒░▪ ≥$1 ≠".encode("ascii", streams.ERRORS)
    assert raw == b"#=+:. >=$1 !="


def test_half_a_character_is_no_failure() -> None:
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    out.reconfigure(errors=streams.ERRORS)
    out.write(NAME)
    out.flush()
    assert json.loads(json_line({"a": NAME})) == {"a": NAME}


def test_json_moves_no_cursor() -> None:
    hostile = "\x9b2J\x7f\u202e\u200b\ufeff\x1b[2J日"
    line = json_line({"a": hostile})
    assert json.loads(line) == {"a": hostile}
    assert line.isprintable()


def run(home: Path, shell: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HALTON_METER_HOME": str(home), "HM": sys.executable}
    text = shell.replace("HM", '"$HM" -m halton_meter')
    return subprocess.run(
        ["bash", "-c", text], env=environment, capture_output=True, text=True, check=False
    )


@needs_dev_full
def test_a_full_disk_behind_standard_output_is_one_line(home: Path) -> None:
    for command in ("report", "events --json", "--help"):
        done = run(home, f"HM {command} >/dev/full")
        assert done.returncode == 1, done
        assert done.stderr.splitlines()[0] == (
            "halton-meter: cannot write to standard output: No space left on device"
        )
        assert "Traceback" not in done.stderr


@needs_dev_full
def test_what_standard_error_refuses_is_dropped(home: Path) -> None:
    done = run(home, "HM retag --from a --to a 2>/dev/full; echo $?; HM report 2>&-; echo $?")
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "2"
    assert done.stdout.splitlines()[-1] == "0"


def test_closed_output_and_a_reader_that_leaves_are_no_failure(home: Path) -> None:
    done = run(home, "HM events --json >&-; echo $?; HM pricing list | true; echo ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr) == ("0\n0\n", "")


def test_a_name_of_bytes_that_are_no_text_is_one_for_every_command(home: Path) -> None:
    typed = os.fsdecode(b"a\xffb")
    for command in (
        ["report", "--project", typed],
        ["events", "--model", typed, "--json"],
        ["retag", "--from", "naïve 日本 ? 🐍", "--to", typed, "--apply"],
        ["retag", "--from", typed, "--to", "b"],
        ["export", "csv", "-", "--project", typed],
        ["reprice", "--model", typed, "--dry-run"],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, (command, done.output)
    assert (
        "1 request would move from project 'a\ufffdb'"
        in CliRunner().invoke(main, ["retag", "--from", typed, "--to", "b"]).output
    )


def test_ctrl_c_is_no_answer_and_needs_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 would mean "over" to a script that asks `budget check`."""
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halton_meter.cli.budget.configured", interrupted)
    done = CliRunner().invoke(main, ["budget", "check"])
    assert (done.exit_code, done.output) == (130, "")


def test_ctrl_c_while_the_program_is_still_imported_is_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'click': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted()); sys.argv = ['halton-meter', 'report']\n"
        "from halton_meter.entry import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
