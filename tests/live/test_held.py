"""A run whose command is stopped: what it says, what a signal does, and its terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from halton_meter.live.held import HeldCommand
from halton_meter.live.probes.watched_run import end_alone
from tests.support.waiting import wait_until

REACHED = {
    "limit_reached": "run-7",
    "text": "this run has spent $2.01 of its limit of $2.00",
    "holds": "stop",
    "limit_usd": "2",
    "spent_usd": "2.01",
    "at_least": False,
    "in_flight": 1,
    "in_flight_usd": "0.1",
}


def test_it_says_why_and_how_to_go_on(capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    held = HeldCommand(asked.append)
    assert not held.take({"totals": {}})
    assert held.take(REACHED)
    assert capfd.readouterr().err == (
        "halton-meter: this run has spent $2.01 of its limit of $2.00; the command is stopped\n"
        "  go on: halton-meter budget resume run-7   (in another terminal)\n"
        "  end it: Ctrl-C\n"
    )
    assert held.take({"limit_lifted": "run-7"})
    assert asked == ["continue"]
    assert not held.on_signal(signal.SIGINT)  # it is the command's again
    held.take(REACHED)
    assert not held.on_signal(signal.SIGUSR1)
    assert held.on_signal(signal.SIGINT)
    assert asked == ["continue", "end"]
    assert held.last is not None
    assert held.last["times"] == 2


def test_what_the_next_worker_says_again_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    held = HeldCommand()
    held.take(REACHED)
    capfd.readouterr()
    assert held.take(REACHED | {"in_flight": 0})
    assert capfd.readouterr().err == ""
    held.take(REACHED | {"spent_usd": "2.05"})  # somebody had continued it
    assert "the command is stopped" in capfd.readouterr().err
    held.take({"limit_lifted": "run-7"})
    held.take(REACHED)
    assert held.last is not None
    assert held.last["times"] == 3


def test_what_is_ended_waits_for_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    held = HeldCommand()
    held.take(REACHED | {"holds": "end"})
    assert capfd.readouterr().err.endswith("the command is ended\n")
    assert not held.on_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd and /proc")
def test_who_holds_it_may_die_and_ctrl_c_ends_it_still(
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    held = HeldCommand(asked.append)
    held.take(REACHED)
    capfd.readouterr()
    command = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True)
    stat = Path(f"/proc/{command.pid}/stat")
    os.kill(command.pid, signal.SIGSTOP)
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the stop")
    held.ask = lambda what: end_alone(command.pid)
    held.lost("2")
    assert capfd.readouterr().err == (
        "halton-meter: the service is gone; the command stays stopped\n"
        "  go on: halton-meter budget resume run-7   (in another terminal)\n"
        "  end it: Ctrl-C\n"
    )
    assert held.on_signal(signal.SIGINT)
    assert command.wait(30) == -signal.SIGTERM
    assert asked == []


def test_a_limit_that_nobody_holds_any_more_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    held = HeldCommand()
    held.lost("2.50")
    assert capfd.readouterr().err == (
        "halton-meter: the service is gone; until it is back the limit of $2.50 does not hold\n"
    )
    held.found("2.50")
    assert capfd.readouterr().err == (
        "halton-meter: the service is back; the limit of $2.50 holds\n"
    )
    held.lost(None)
    held.found(None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "message",
    [
        {"limit_reached": 5},
        {"limit_reached": "x\x1b[2J\n", "text": "\x1b]0;evil\x07", "in_flight": -1},
        {"limit_reached": "run-7", "text": None, "limit_usd": [], "holds": {}},
    ],
)
def test_whatever_a_worker_says_moves_no_cursor(
    message: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    HeldCommand().take(message)
    assert "\x1b" not in capfd.readouterr().err


TAKES = """
import sys, termios, tty
from halton_meter.live.terminal import Terminal
terminal = Terminal()
tty.setraw(0)
def step(name):
    sys.stdout.write(name + "\\r\\n"); sys.stdout.flush()
    sys.stdin.buffer.raw.read(1)
step("raw")
terminal.take()
step("taken")
terminal.give_back()
step("given")
"""


def test_a_terminal_is_made_plain_and_given_back(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", TAKES],
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.set_blocking(leader, False)
    said = b""

    def reached(word: bytes) -> bool:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(leader, 4096)
        return word in said

    plain = termios.ECHO | termios.ICANON | termios.ISIG
    found = []
    for word in (b"raw", b"taken", b"given"):
        wait_until(lambda word=word: reached(word), word.decode())
        found.append(termios.tcgetattr(follower)[3] & plain)
        os.write(leader, b"\n")
    assert found == [0, plain, 0]
    assert process.wait(30) == 0
    assert b"\x1b[?25h" in said  # the cursor is shown
    os.close(leader)
    os.close(follower)


def test_without_a_terminal_nothing_is_done() -> None:
    script = (
        "from halton_meter.live.terminal import Terminal\n"
        "t = Terminal(); t.take(); t.give_back(); t.restore()"
    )
    done = subprocess.run(
        ["setsid", "--wait", sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
