"""What a command leaves running behind its run, and what of it nobody saw being forked: daemons.

Processes are told by their environment, which names what the run alone told them: the port of its
proxy, or the file for its TLS keys. Whoever has that is of the run, whatever became of its parents.
Nothing else of an environment is kept. Linux only; without root.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterator

WAIT_S_MAX = 2.0
_LOOK_EVERY_S = 0.05
_PROCESSES_MAX = 32_768
_ENVIRONMENT_BYTES_MAX = 1 << 20


def told_proxy(port: int) -> bytes:
    """What stands in the environment of who uses the proxy on this port."""
    return f"=http://127.0.0.1:{port}\0".encode()


def wait_for(port: int) -> list[str]:
    """Wait until no process uses the proxy on this port; the names of those that still do then."""
    until = time.monotonic() + WAIT_S_MAX
    names: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):
        while (names := names_of(told_proxy(port))) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
    return names


def names_of(told: bytes) -> list[str]:
    """The names of the processes that have this in their environment, as of now."""
    names = []
    for pid in who_has(told):
        with contextlib.suppress(OSError):
            names.append(os.path.basename(os.readlink(f"/proc/{pid}/exe")))
    return sorted(names)


def who_has(told: bytes, beside: Collection[int] = ()) -> Iterator[int]:
    """The processes that have this in their environment, without those that are known."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()][:_PROCESSES_MAX]
    except OSError:  # not Linux
        return
    yield from (pid for pid in pids if pid not in beside and told in environment_of(pid))


def environment_of(pid: int) -> bytes:
    """A process's environment as it began; empty where it has ended, or is another user's."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        return file.read(_ENVIRONMENT_BYTES_MAX)
    return b""
