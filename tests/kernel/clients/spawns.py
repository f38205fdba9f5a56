"""Starts a grandchild that does the talking, and outlives its parent: `sh -c '… &'`."""

import os
import subprocess
import sys

here = os.path.dirname(__file__)
command = f"{sys.executable} {here}/exchanges.py 1 2 10 2000 & wait"
subprocess.run(["/bin/sh", "-c", command], check=True)
