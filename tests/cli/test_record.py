"""`record`: what is said of a recording; that it records: `tests/lab/test_key_log.py`."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter import accounts
from halton_meter.cli.record import _recorded_lines, record
from halton_meter.coverage import Coverage, Part
from halton_meter.live import kept_plaintext
from halton_meter.live.keylog import run
from halton_meter.live.result import Recorded, RunResult
from halton_meter.problem import Problem, Unavailable


def test_a_recording_that_ended_before_its_command_is_told_as_such(tmp_path: Path) -> None:
    result = RunResult()
    result.recorded = Recorded(1, 33, "No space left on device", without_beginning=1)
    result.outages.append((1, 2, "the process that captures packets ended"))
    file = tmp_path / "recorded.pcapng"
    assert _recorded_lines(result, file, "keylog") == [
        f"  recorded: 1 connection, 33 packets in {file}; it holds prompts and credentials",
        "  the recording is not whole: No space left on device",
        "  the recording is not whole: the process that captures packets ended",
        "  the recording is not whole: 1 connection without the beginning, as the keys came too "
        "late. Use: --via uprobes",
        f"  Use: halton-meter replay {file}",
    ]


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ((), "sudo halton-meter record 'my file' -- CMD"),
        (("--redact",), "sudo halton-meter record 'my file' --redact -- CMD"),
        (
            ("--via", "uprobes"),
            "sudo halton-meter record 'my file' --via uprobes -- CMD\n"
            "       or: halton-meter record 'my file' --via proxy -- CMD",
        ),
    ],
)
def test_who_may_not_is_told_this_call_with_sudo(
    options: tuple[str, ...], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_command: Any, _ports: Any, its_fix: str, _interface: Any) -> None:
        raise Unavailable([Problem("to capture packets needs root", its_fix)])

    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accounts, "is_root", lambda: False)
    monkeypatch.setattr(run, "start_sniffer", refused)
    done = CliRunner().invoke(record, [*options, "my file", "--", "true"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.endswith(f" root\n  fix: {fix}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("via", "other"), [("proxy", "keylog"), ("keylog", "uprobes"), ("uprobes", "keylog")]
)
def test_no_connection_is_no_matter_of_the_way_to_record(
    tmp_path: Path, via: str, other: str
) -> None:
    file = tmp_path / "recorded.pcapng"
    result = RunResult(connections=Coverage(is_known=True), recorded=Recorded(0, 0, None))
    nothing = f"  nothing was recorded, so there is no {file}"
    assert _recorded_lines(result, file, via) == [
        f"{nothing}: the command made no connection to a provider"
    ]
    assert result.connections is not None
    result.connections.add(Part("curl", "api.openai.com", None, "no_probes"), 1, None)
    assert _recorded_lines(result, file, via) == [
        nothing,
        f"  Use: sudo halton-meter record {file} --via {other} -- CMD",
    ]


def test_a_full_disk_at_the_end_leaves_no_part_of_a_file_and_the_summary_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(items: object, path: Path) -> tuple[int, int]:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = kept_plaintext.Kept([object()], None)  # type: ignore[list-item]
    monkeypatch.setattr(kept_plaintext, "read", lambda fd: kept)
    monkeypatch.setattr(kept_plaintext, "write", full)
    module = sys.modules["halton_meter.cli.record"]
    monkeypatch.setattr(module, "through_proxy", lambda *_, **__: RunResult())
    monkeypatch.setattr("halton_meter.privileges.settle", lambda needs_root: None)
    target = tmp_path / "out.pcapng"
    done = CliRunner().invoke(record, [str(target), "--via", "proxy", "--", "true"])
    assert done.exit_code == 1
    assert "0 requests, 0 tokens in, 0 out, $0.0000 list price" in done.stderr
    assert f"{target} cannot be written: No space left on device" in done.stderr
    assert "fix: df -h" in done.stderr
    assert not target.exists()
