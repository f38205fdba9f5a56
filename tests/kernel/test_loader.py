"""What loads the kernel program: nothing of it is left out that the kernel has room for."""

from __future__ import annotations

import subprocess
import sys

import pytest

# libbpf keeps a callback of ours for the whole process: it outlives what loaded the program. In a
# process of its own: the fault that this looks for ends it.
PRINTS_LATER = """
import gc
from capture import loader
loaded = loader.load("libbpf")
del loaded
gc.collect()
assert not loader.libbpf_library().bpf_object__open_file(b"/nonexistent", None)
print("alive")
"""


def test_what_libbpf_prints_once_the_program_is_gone_harms_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_LATER], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


# The verifier gives up on a program that is too long; those that follow sockets may be missing.
LOADS_ALL = """
import sys
from capture import loader
from capture.helper.mounts import offer_headers
offer_headers()
found = {way: set(loader.load(way, at_once=False).programs) for way in ("libbpf", "bcc")}
print(sorted(found["libbpf"] - found["bcc"] - set(loader.BY_TYPES)))
"""


@pytest.mark.slow
def test_bcc_loads_all_that_libbpf_loads() -> None:
    python = [sys.executable, "-c", LOADS_ALL]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *python],
        capture_output=True,
        text=True,
        check=False,
    )
    if "bcc is not installed" in done.stderr:
        pytest.skip("bcc is not installed")
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
