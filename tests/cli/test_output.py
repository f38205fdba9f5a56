"""What all commands share: how they fail, and figures, names and tables as text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from halton_meter.cli import main, output
from halton_meter.problem import Problem

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
    assert output.as_typed("halton-meter report") == "halton-meter report"
    (system / "halton-meter").touch()
    assert output.as_typed(said) == said
    monkeypatch.setattr("sys.argv", ["-m"])
    (system / "halton-meter").unlink()
    assert output.as_typed(said) == said
