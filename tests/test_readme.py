"""The README's commands exist, and what it shows of a report is what the demo prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]


def halton_lines() -> list[list[str]]:
    return [
        shlex.split(line.removeprefix("sudo "))[1:]
        for line in shell_lines()
        if "halton-meter" in line
    ]


def sample_report() -> list[str]:
    """The lines of the report that the README shows; … stands for those left out."""
    block = README.partition("```\n$ halton-meter report")[2].partition("```")[0]
    lines = ["$ halton-meter report" + block.splitlines()[0], *block.splitlines()[1:]]
    assert len(lines) > 5
    return [line for line in lines if line not in ("", "…")]


def halton_meter(arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "halton_meter", *arguments],
        env={**os.environ, "HALTON_METER_HOME": str(home)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def test_the_readme_says_how_the_command_comes_onto_the_path() -> None:
    install = next(line for line in shell_lines() if "install ." in line)
    first = next(line for line in shell_lines() if "halton-meter" in line)
    assert shell_lines().index(install) < shell_lines().index(first)
    assert ".venv/bin/halton-meter" in README


def test_the_make_targets_named_in_the_readme_exist() -> None:
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("arguments", halton_lines(), ids=" ".join)
def test_every_command_in_the_readme_is_documented_by_its_help(
    arguments: list[str], tmp_path: Path
) -> None:
    words = [arguments[0]]
    if arguments[0] in ("pricing", "export"):
        words.append(arguments[1])
    result = halton_meter([*words, "--help"], tmp_path)
    assert result.returncode == 0, result.stderr
    options = [word for word in arguments if word.startswith("--") and word != "--"]
    assert all(option in result.stdout for option in options)


def test_the_demo_meters_the_fixtures_and_shows_a_priced_report(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "tools/demo.py", "--home", str(tmp_path / "demo"), "--recorded-only"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = result.stdout.split("What it cost")[1].splitlines()
    home, command = result.stdout.splitlines()[-1].removeprefix("For scripts: ").split(" ", 1)
    environment = {**os.environ, **dict([home.split("=", 1)]), "PATH": "/nowhere"}
    told = subprocess.run(
        shlex.split(command), env=environment, capture_output=True, text=True, check=False
    )
    assert '"totals"' in told.stdout, told.stderr
    assert [line for line in sample_report() if line not in report] == [], result.stdout
