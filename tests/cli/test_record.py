"""`record`: what is said of a recording; that it records: `tests/lab/test_key_log.py`."""

from __future__ import annotations

from pathlib import Path

from halton_meter.cli.record import _recorded_lines
from halton_meter.live.result import Recorded, RunResult


def test_a_recording_that_ended_before_its_command_is_told_as_such(tmp_path: Path) -> None:
    result = RunResult()
    result.recorded = Recorded(1, 33, "No space left on device")
    result.outages.append((1, 2, "the process that captures packets ended"))
    file = tmp_path / "recorded.pcapng"
    assert _recorded_lines(result, file, "keylog") == [
        f"  recorded: 1 connection, 33 packets in {file}; it holds prompts and credentials",
        "  the recording is not whole: No space left on device",
        "  the recording is not whole: the process that captures packets ended",
        f"  Use: halton-meter replay {file}",
    ]
