"""Limits of our own processes, the same whoever starts them: systemd, launchd or a terminal.

What a process sets here, those that it starts inherit. It knows nothing of what they do.
"""

from __future__ import annotations

import contextlib
import resource

# Each probe is a descriptor of the helper's: some hundred files with a dozen probes each.
DESCRIPTORS_WANTED = 65_536


def limit_this_process() -> None:
    """Have no core files, which would hold prompts, and as many descriptors as may be.

    Never call it in a process that will run a person's own command: that keeps its limits.
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
