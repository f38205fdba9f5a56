"""A command in the foreground: signals and exit codes are its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.waiting import WAIT_SECONDS_MAX

PARENT = """
import os, sys
from halton_meter.live.foreground import in_foreground
code, ran = in_foreground(["sh", "-c", sys.argv[1]], os.environ, lambda child: None)
print("code", code, "ran", ran, flush=True)
"""
WAITS = "trap 'exit 9' {}; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_what_is_sent_to_us_alone_goes_to_the_command_and_we_live_on(
    number: signal.Signals,
) -> None:
    script = WAITS.format(number.name.removeprefix("SIG"))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, script], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    os.kill(parent.pid, number)
    assert parent.communicate(timeout=WAIT_SECONDS_MAX)[0] == "code 9 ran True\n"


def test_what_comes_while_the_command_is_being_started_goes_to_it_too() -> None:
    early = (
        "import os, signal, subprocess\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *arguments, **options):\n"
        "        super().__init__(*arguments, stdout=subprocess.PIPE, **options)\n"
        "        self.stdout.readline()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "subprocess.Popen = Popen\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", early + PARENT, WAITS.format("TERM")],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS_MAX,
        check=True,
    )
    assert done.stdout == "code 9 ran True\n"


@pytest.mark.parametrize(
    ("command", "told"),
    [("exit 7", "code 7 ran True"), ("kill -KILL $$", "code 137 ran True")],
)
def test_its_exit_code_is_the_command_s(command: str, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, command], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{told}\n"
