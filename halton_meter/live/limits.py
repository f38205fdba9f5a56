"""Limits of our own processes, the same under systemd, under launchd and from a terminal.

The processes that a process starts inherit them.
"""

from __future__ import annotations

import contextlib
import resource

# Each probe takes a descriptor in the helper: some hundred files with a dozen probes each.
DESCRIPTORS_WANTED = 65_536


def limit_this_process() -> None:
    """Write no core files, which would hold prompts; allow as many descriptors as possible.

    Never call it in a process that becomes the user's command: the command keeps its own limits.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = DESCRIPTORS_WANTED
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
