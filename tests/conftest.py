"""For all tests: this process stays who it is."""

from __future__ import annotations

import os

# `sudo make test`: a command that a test calls in this process would become the person for good.
for _name in ("SUDO_UID", "PKEXEC_UID", "DOAS_USER"):
    os.environ.pop(_name, None)
