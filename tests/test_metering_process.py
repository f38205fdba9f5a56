"""What the metering process leaves to others of its own user: nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

LOOK = """
import ctypes, json, resource
from halton_meter import metering
metering._settle()
libc = ctypes.CDLL(None)
print(json.dumps([libc.prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), libc.prctl(39, 0, 0, 0, 0)]))
"""


def test_it_cannot_be_looked_into_and_leaves_no_core() -> None:
    """Not dumpable: no ptrace, no /proc/PID/mem or /fd for others; no core; no new privileges."""
    command = [sys.executable, "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    dumpable, core, no_new_privileges = json.loads(done.stdout)
    assert (dumpable, core, no_new_privileges) == (0, [0, 0], 1)
