"""What a command of `run --via proxy` leaves running, which would lose the run's own proxy.

Processes are told by their environment, which names the run's port: whoever has it uses that proxy,
whatever became of its parents. Nothing else of an environment is kept. Linux only; without root.
"""

from __future__ import annotations

import contextlib
import os
import time

WAIT_S_MAX = 2.0
_LOOK_EVERY_S = 0.05
_PROCESSES_MAX = 32_768
_ENVIRONMENT_BYTES_MAX = 1 << 20


def wait_for(port: int) -> list[str]:
    """Wait until no process uses the proxy on this port; the names of those that still do then."""
    until = time.monotonic() + WAIT_S_MAX
    names: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        while (names := users_of(port)) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
    return names


def users_of(port: int) -> list[str]:
    """The names of the processes that were told to use the proxy on this port, as of now."""
    told = f"=http://127.0.0.1:{port}\0".encode()
    names = []
    try:
        pids = [name for name in os.listdir("/proc") if name.isdigit()][:_PROCESSES_MAX]
    except OSError:  # not Linux
        return []
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if told in file.read(_ENVIRONMENT_BYTES_MAX):
                names.append(os.path.basename(os.readlink(f"/proc/{pid}/exe")))
    return sorted(names)
