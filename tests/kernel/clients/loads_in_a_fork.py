"""Loads TLS only in a child that never calls execve, then does as `waits.py` does."""

import os
import runpy
import sys
from pathlib import Path

assert "ssl" not in sys.modules
if pid := os.fork():
    os.waitpid(pid, 0)
    os._exit(0)
runpy.run_path(str(Path(__file__).with_name("waits.py")))
