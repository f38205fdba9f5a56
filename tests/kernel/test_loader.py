"""libbpf keeps a callback of ours for the whole process: it outlives what loaded the program."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the fault that this looks for ends it.
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
