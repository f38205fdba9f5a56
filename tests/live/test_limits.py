"""Limits of our own processes, and that a metered command keeps those it was given."""

from __future__ import annotations

import subprocess
import sys

import pytest

OURS = """
import resource, sys
from halton_meter.live.limits import limit_this_process
resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[1:3])))
limit_this_process()
child = "import resource as r; print(*r.getrlimit(r.RLIMIT_CORE), *r.getrlimit(r.RLIMIT_NOFILE))"
import subprocess
sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""

COMMAND = """
import os, resource
from halton_meter import accounts
from halton_meter.live.probes import service
from halton_meter.live.limits import limit_this_process
from halton_meter.live.result import RunResult
resource.setrlimit(resource.RLIMIT_NOFILE, (512, 1024))
class Started(BaseException): pass
class Supervisor:
    selector = tick = wait_s = None
    def __init__(self, plan, held): pass
    def start(self): limit_this_process()
    def finish(self): return RunResult()
def attend(held, *others): return held.reap()
service.Supervisor, service.attend = Supervisor, attend
from halton_meter.live.probes.supervisor import Plan
from pathlib import Path
plan = Plan(accounts.invoking_account(), Path("/"), None, (), service=False)
service.run_command(["sh", "-c", "ulimit -Sn; ulimit -Hn"], dict(os.environ), plan)
"""

SETTLED = """
import ctypes, re, resource
from halton_meter.live.probes import worker
worker._settle()
privileges = re.search(r"NoNewPrivs:\\t(.)", open("/proc/thread-self/status").read())[1]
get_dumpable = 3
print(ctypes.CDLL(None).prctl(get_dumpable), *resource.getrlimit(resource.RLIMIT_CORE), privileges)
"""


@pytest.mark.parametrize(
    ("before", "after"), [((256, 1024), (1024, 1024)), ((256, 256), (256,) * 2)]
)
def test_we_leave_no_core_files_and_may_hold_many_probes(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    command = [sys.executable, "-c", OURS, *map(str, before)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, told.split())) == (0, 0, *after)


@pytest.mark.skipif(sys.platform != "linux", reason="probes are for Linux")
def test_a_command_keeps_the_limits_that_it_was_given() -> None:
    command = [sys.executable, "-c", COMMAND]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["512", "1024"]


@pytest.mark.skipif(sys.platform != "linux", reason="probes are for Linux")
def test_nobody_looks_into_the_process_that_holds_plaintext() -> None:
    """Not dumpable, so no ptrace and no /proc/PID/mem; no core file; no way to more privileges."""
    command = [sys.executable, "-c", SETTLED]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.split() == ["0", "0", "0", "1"]
