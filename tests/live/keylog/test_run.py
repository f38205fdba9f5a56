"""A run by packets whose parts fail: nothing that was not metered passes for nothing spent."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from capture import live_capture
from capture.live_capture import LiveCapture
from halton_meter.cli.run import summary_lines
from halton_meter.live.keylog.run import meter_command


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody at the other end captures, so nothing of it is waited for."""
    monkeypatch.setattr(live_capture, "REST_S_MAX", 0.2)


def run(home: Path, link: socket.socket, *command: str, **own: str) -> tuple[int, list[str]]:
    result = meter_command(command, home, {"PATH": os.environ["PATH"], **own}, {}, link)
    return result.exit_code, summary_lines(result)


def test_the_end_of_the_sniffer_is_an_outage(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    its.close()
    code, said = run(tmp_path, ours, "sh", "-c", "sleep 0.3; exit 3")
    assert code == 3
    assert said[0] == "no request was metered; what the command spent is not known"
    assert any("the process that captures packets ended" in line for line in said)


def test_a_fault_of_ours_is_an_outage(tmp_path: Path) -> None:
    def broken(self: LiveCapture) -> list[object]:
        self.read = list  # type: ignore[method-assign]
        raise ValueError("a secret of the traffic")

    ours, its = socket.socketpair()
    before = LiveCapture.read
    try:
        LiveCapture.read = broken  # type: ignore[assignment]
        code, said = run(tmp_path, ours, "sh", "-c", "exit 4")
    finally:
        LiveCapture.read = before  # type: ignore[method-assign]
        its.close()
    assert code == 4
    assert any("metering failed: ValueError" in line for line in said)
    assert "secret" not in "".join(said)


def test_a_data_folder_that_cannot_be_made_keeps_no_command_from_running() -> None:
    ours, its = socket.socketpair()
    code, _said = run(Path("/proc/no-such-folder"), ours, "sh", "-c", "exit 5")
    its.close()
    assert code == 5


@pytest.mark.parametrize("own", [{}, {"SSLKEYLOGFILE": "/dev/null"}])
def test_what_still_runs_at_the_end_is_named(tmp_path: Path, own: dict[str, str]) -> None:
    ours, its = socket.socketpair()
    pid_file = tmp_path / "pid"
    script = f"(setsid sleep 60 & echo $! >{pid_file}) & wait; exit 3"
    code, said = run(tmp_path, ours, "sh", "-c", script, **own)
    its.close()
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert code == 3
    assert said[0] == "no request was metered; what the command spent is not known"
    assert "  1 process of the command still runs and is no longer metered: sleep. " in "\n".join(
        said
    )


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    ours, its = socket.socketpair()
    code, said = run(tmp_path, ours, "no-such-command")
    its.close()
    assert code == 127
    assert not any("coverage" in line for line in said)
