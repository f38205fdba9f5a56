"""A process that looks into files can do nothing else, whatever a file makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capture.functions import finder_protocol
from capture.helper.files import searches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")

ATTEMPTS = {
    "open a file": "os.open('/etc/passwd', os.O_RDONLY)",
    "look a name up": "os.stat('/etc/passwd')",
    "write a file": "os.open('/tmp/x', os.O_WRONLY | os.O_CREAT)",
    "start a process": "os.fork()",
    "run a program": "os.execv('/bin/true', ['true'])",
    "make a socket": "socket.socket()",
    "signal another": "os.kill(os.getppid(), 0)",
    "become another": "os.setuid(0)",
    "map code": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "map a file": "mmap.mmap(0, 1, mmap.MAP_PRIVATE, mmap.PROT_READ)",
    "trace another": "refused(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))",
}
START = """
import ctypes, mmap, os, socket, sys
from capture.functions.finder.confinement import confine
def refused(result):
    if result < 0:
        raise PermissionError
ctypes.CDLL(None).ptrace
if not confine(cpu_seconds=10, memory_bytes=1 << 30):
    print("no seccomp")
    sys.exit()
data = os.pread(0, 100, 0)
os.fstat(0)
assert len(bytearray(30 << 20)) == 30 << 20
try:
    ATTEMPT
except PermissionError:
    print("refused", len(data))
"""


@pytest.mark.parametrize("what", ATTEMPTS)
def test_only_reading_and_answering_are_left(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", START.replace("ATTEMPT", ATTEMPTS[what])],
            stdin=file,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    if done.stdout == "no seccomp\n":
        pytest.skip("this kernel has no seccomp")
    assert done.stdout == "refused 100\n", done.stderr


def test_the_finder_answers_from_within() -> None:
    """Its children are confined before the first file: by nobody's id and by a filter."""
    own = searches.Searches()
    fd = os.open(sys.executable, os.O_RDONLY)
    job = searches.Job((0, 0, 0), fd, 0, finder_protocol.INSPECT, searches.SearchPriority.PROGRAM)
    assert own.ask(job)
    answered: list[str | None] = []
    try:
        while not answered:
            answered += [text for _, text in own.answers()]
            own.wait(1)
        (child,) = own._children
        status = Path(f"/proc/{child.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] in ("2", "0")
        if os.geteuid() == 0:
            assert set(fields["Uid"].split()) == {"65534"}
            assert set(fields["Gid"].split()) == {"65534"}
            assert fields["CapEff"].strip("0") == ""
            assert os.stat(f"/proc/{child.pid}/environ").st_uid == 0  # undumpable: nobody's no more
            assert Path(f"/proc/{child.pid}/oom_score_adj").read_text() == "1000\n"
            assert os.getpriority(os.PRIO_PROCESS, child.pid) >= 0
    finally:
        own.close()
        os.close(fd)
