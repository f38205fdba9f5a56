"""Files that a user names on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main


@pytest.mark.parametrize(
    "command",
    [
        ("replay", ""),
        ("replay", "capture.pcapng", ""),
        ("replay", "capture.pcapng", "--keys", ""),
        ("inspect", ""),
        ("redact", "", "out.pcapng"),
        ("export", "csv", ""),
        ("metrics", "--output", ""),
        ("config", "check", ""),
        ("pricing", "explain", ""),
        ("pricing", "refresh", "--file", ""),
        ("man", "--install", "--folder", ""),
        ("run", "--json-summary", "", "--", "true"),
        ("record", "--via", "proxy", "", "--", "true"),
    ],
)
def test_an_empty_name_is_wrong_usage(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("halton-meter: Invalid value for ")
    assert ": an empty name names no file\n  fix: halton-meter " in done.stderr
    assert not any(each.name != "home" for each in tmp_path.iterdir())
