"""What all commands share: how they fail, and figures, names and tables as text."""

from __future__ import annotations

import errno
import json
import os
import sys
from decimal import Decimal
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from halton_meter.cli import main, output
from halton_meter.problem import Problem, Unavailable
from halton_meter.settings.config import ConfigError
from halton_meter.store import Store
from tests.support.made import NOON_NS, made

# --- failing --------------------------------------------------------------------------------------


def failing(*problems: Problem, as_json: bool = False) -> click.testing.Result:
    command = click.command()(lambda: output.fail(*problems, as_json=as_json))
    return CliRunner().invoke(command)


def test_a_failure_says_what_happened_and_the_fix() -> None:
    done = failing(Problem("port 8788 is taken", "halton-meter status"))
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "halton-meter: port 8788 is taken\n  fix: halton-meter status\n"


def test_a_script_gets_the_same_as_json() -> None:
    done = failing(Problem("no home", "mkdir home"), as_json=True)
    assert json.loads(done.stdout) == {"error": "no home", "fix": "mkdir home"}
    assert done.stderr == "halton-meter: no home\n  fix: mkdir home\n"


def test_several_ways_stand_below_one_another() -> None:
    done = failing(Problem("no root", "sudo x\nor: y"))
    assert done.stderr == "halton-meter: no root\n  fix: sudo x\n       or: y\n"


def test_a_problem_cannot_write_on_the_terminal() -> None:
    assert "\x1b" not in failing(Problem("a\x1b[2J", "b\x1b[2J")).stderr


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["report", "--colour"], "No such option", "halton-meter report --help"),
        (["reprot"], "No such command 'reprot'.", "halton-meter --help"),
        (
            ["pricing", "list", "--soon"],
            "No such option",
            "halton-meter pricing list --help",
        ),
    ],
)
def test_wrong_usage_has_the_same_form(arguments: list[str], what: str, fix: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("halton-meter: ")
    assert what in done.stderr
    assert done.stderr.endswith(f"\n  fix: {fix}\n")


def test_a_group_without_a_command_prints_its_help() -> None:
    assert "Commands:" in CliRunner().invoke(main, []).output
    assert "Examples:" in CliRunner().invoke(main, ["pricing"]).output


# --- figures as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0"),
        (9999, "9,999"),
        (12_345, "12.35k"),
        (999_949, "999.9k"),
        (999_999, "1M"),
        (4_560_000, "4.56M"),
        (10**13, "10T"),
    ],
)
def test_counts(count: int | None, text: str) -> None:
    assert output.count_text(count) == text


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (None, "unpriced"),
        ("0", "$0.00"),
        ("0.001", "<$0.01"),
        ("0.005", "<$0.01"),
        ("0.015", "$0.02"),
        ("1234567.891", "$1,234,567.89"),
        ("-3.456", "-$3.46"),
    ],
)
def test_money(amount: str | None, text: str) -> None:
    assert output.money_text(None if amount is None else Decimal(amount)) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "    "), (1.0, "████"), (0.5, "██  "), (1e-9, "▏   "), (7.0, "████")]
)
def test_bars(share: float, text: str) -> None:
    assert output.bar(share, 4) == text


def test_sparklines_tell_unknown_and_nothing_from_little() -> None:
    values = [None, Decimal(0), Decimal("0.01"), Decimal(4), Decimal(8)]
    assert output.sparkline(values) == "··▁▅█"
    assert output.sparkline([None, None]) == "··"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "-"),
        (340.4, "340 ms"),
        (3210.0, "3.2 s"),
        (125_000.0, "2 min 05 s"),
        (3 * 3_600_000 + 300_000.0, "3 h 05 min"),
        (51 * 3_600_000.0, "2 d 03 h"),
    ],
)
def test_durations(milliseconds: float | None, text: str) -> None:
    assert output.duration_text(milliseconds) == text


def test_a_name_cannot_move_the_cursor_nor_fill_the_screen() -> None:
    assert output.shown("a\x1b[31m\nb") == "a?[31m?b"
    assert output.shown("x" * 100, 10) == "x" * 9 + "…"
    assert output.shown(None) == "-"


def test_a_command_for_sudo_is_one_that_sudo_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "stopped\n  start the service: sudo halton-meter start"
    ours = tmp_path / "a folder" / "halton-meter"
    system = tmp_path / "system"
    system.mkdir()
    monkeypatch.setattr("halton_meter.cli.output.SUDO_FOLDERS", (str(system),))
    monkeypatch.setattr("sys.argv", [str(ours), "status"])
    assert output.as_typed(said) == f"stopped\n  start the service: sudo '{ours}' start"
    assert output.as_typed("sudo -u ann halton-meter doctor") == f"sudo -u ann '{ours}' doctor"
    assert output.as_typed("halton-meter report") == "halton-meter report"
    (system / "halton-meter").touch()
    assert output.as_typed(said) == said
    monkeypatch.setattr("sys.argv", ["-m"])
    (system / "halton-meter").unlink()
    assert output.as_typed(said) == said


@pytest.mark.parametrize(
    "command",
    [
        ["inspect"],
        ["replay"],
        ["export", "sqlite"],
        ["run", "--via", "proxy", "--json-summary", "NAME", "--", "touch", "ran"],
        ["record", "NAME", "--via", "proxy", "--", "touch", "ran"],
    ],
)
def test_a_name_that_the_system_refuses_is_told_before_anything_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    name = "n" * 300
    words = [name if word == "NAME" else word for word in command]
    words += [] if "NAME" in command else [name]
    done = CliRunner().invoke(main, words)
    assert done.exit_code in (1, 2), done.output
    assert name in done.stderr
    assert "File name too long" in done.stderr
    assert "fix: " in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        (PermissionError(13, "Permission denied", "/a b/c"), "/a b/c: Permission denied", "'/a b'"),
        (OSError(28, "No space left on device", b"/a/c"), "/a/c: No space left on device", "df -h"),
        (ConfigError("no such user", "id"), "no such user", "id"),
        (Unavailable([Problem("no BTF", "use the proxy")]), "no BTF", "use the proxy"),
    ],
)
def test_what_no_command_caught_is_a_problem(error: Exception, what: str, fix: str) -> None:
    (problem,) = output.problems_of(error)
    assert problem.what == what
    assert fix in problem.fix


@pytest.mark.parametrize("error", [ValueError("x"), OSError(5, "EIO"), OSError(9, "x", 3)])
def test_a_fault_of_ours_is_none(error: Exception) -> None:
    assert output.problems_of(error) == ()


@pytest.mark.parametrize(
    ("amount", "unpriced", "cell", "words"),
    [
        ("1.25", 0, "$1.25", "$1.25 list price"),
        ("1.25", 4, "$1.25+", "at least $1.25 list price (4 requests unpriced)"),
        ("0", 1, "$0.00+", "at least $0.00 list price (1 request unpriced)"),
        (None, 2, "unpriced", "list price not known (2 requests unpriced)"),
        (None, 0, "unpriced", "list price not known"),
    ],
)
def test_a_sum_from_which_unpriced_requests_are_missing_says_so(
    amount: str | None, unpriced: int, cell: str, words: str
) -> None:
    usd = None if amount is None else Decimal(amount)
    assert output.sum_text(usd, unpriced) == cell
    assert output.sum_words(usd, unpriced, output.money_text(usd)) == words


@pytest.mark.parametrize(
    ("number", "otherwise", "fix"),
    [
        (errno.ENOSPC, None, "df -h '/a b'"),
        (errno.EDQUOT, "name another file", "df -h '/a b'"),
        (errno.EACCES, None, "ls -ld '/a b'"),
        (errno.EACCES, "name another file", "name another file"),
    ],
)
def test_a_full_disk_is_not_a_question_of_rights(
    number: int, otherwise: str | None, fix: str
) -> None:
    assert output.look_at(OSError(number, "x"), "/a b", otherwise) == fix


@pytest.mark.parametrize(
    "command",
    [
        ("pricing", "set", "m", "--rate", "input=1"),
        ("metrics", "--output", "{}/metrics.prom"),
        ("man", "--install", "--folder", "{}/man"),
        ("statusline", "install"),
    ],
)
def test_what_a_full_disk_refuses_names_the_disk(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "claude"))
    with Store(tmp_path / "home") as store:
        store.append([made()])
        store.flush()
    # What every writer calls: of a module, what is imported meanwhile would keep the stand-in.
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "write_text", full)
    done = CliRunner().invoke(main, [word.format(tmp_path) for word in command])
    assert done.exit_code == 1, done.output
    assert "No space left on device" in done.stderr
    assert "fix: df -h " in done.stderr


def test_a_span_within_a_minute_has_seconds() -> None:
    minute, second = 60 * 10**9, 10**9
    at_ns = NOON_NS
    assert output.span_text(at_ns, at_ns + 2 * minute)[10:].count(":") == 2
    first, last = output.span_text(at_ns, at_ns + 5 * second).split(" to ")
    assert (first[-3:], last[-3:]) == (":00", ":05")
    assert output.span_text(at_ns, at_ns) == first


def test_a_lower_bound_is_an_amount_and_no_upper_bound() -> None:
    tiny = Decimal("0.000001234")
    assert output.money_text(tiny) == "<$0.01"
    assert output.money_text(tiny, at_least=True) == "$0.000001"
    assert output.sum_text(tiny, 1) == "$0.000001+"
    assert output.sum_text(tiny, 0) == "<$0.01"
    assert output.money_text(Decimal("0.0049"), at_least=True) == "$0.004"
    assert output.sum_text(Decimal("-0.0049"), 1) == "-$0.005+"


def test_columns_stand_under_each_other_also_behind_wide_letters_and_accents() -> None:
    accented = "cafe\u0301"
    rows = [("日本語", "1"), (accented, "2"), ("abc", "3")]
    text = output.aligned(["NAME", "N"], rows, {"N"})
    assert text.split("\n") == ["NAME    N", "日本語  1", f"{accented}    2", "abc     3"]
    assert output.shown("日本語プロジェクト", 8) == "日本語…"
    assert output.shown("日本語プロジェクト", 18) == "日本語プロジェクト"
    assert output.aligned_line(["日本", "x"], [(6, False), (3, True)]) == "日本      x"


@pytest.mark.parametrize(
    ("cells", "is_terminal", "heading"),
    [
        (30, True, "NAME  IN  SHARE  PRICE"),
        (22, True, "NAME  IN  SHARE  PRICE"),
        (21, True, "NAME  IN  PRICE"),
        (14, True, "NAME  PRICE"),
        (5, True, "NAME  PRICE"),
        (5, False, "NAME  IN  SHARE  PRICE"),
    ],
)
def test_a_narrow_terminal_has_fewer_columns_and_no_wrapped_table(
    monkeypatch: pytest.MonkeyPatch, cells: int, is_terminal: bool, heading: str
) -> None:
    monkeypatch.setattr(output, "columns", lambda: cells)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    header, rows = ["NAME", "IN", "SHARE", "PRICE"], [["a", "5", "###", "$1"]]
    drawn = output.fitted(header, rows, {"IN", "PRICE"}, ("SHARE", "absent", "IN"))
    assert drawn.splitlines()[0] == heading
    assert drawn.endswith("$1")
