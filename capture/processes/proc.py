"""Reads /proc into `model.Process`, quickly: a process may be gone a few milliseconds later.

Only HALTON_PROJECT is ever looked at in an environment. Anything that cannot be read is None or
empty; `read_process` returns None only when there is no such process any more.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from capture.processes.arguments import without_secrets
from capture.processes.roots import Ancestor, name_of_root, root_of
from capture.processes.sockets import established
from halton_meter.model import Process

PARENTS_MAX = 16
ARGV_BYTES_MAX = 32 * 1024
ENVIRONMENT_BYTES_MAX = 1024 * 1024
PROJECT_CHARS_MAX = 200

_CONTAINER = re.compile(r"(?:docker|libpod|crio|cri-containerd|containerd)[-/:]([0-9a-f]{12,64})")
_BARE_CONTAINER = re.compile(r"/(?:docker|kubepods|lxc)[^\n]*?/([0-9a-f]{64})")


HTTPS_PORT = 443


def _read(path: str, limit: int = 65536) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, limit)
    except OSError:
        return None
    finally:
        os.close(fd)


def _link(path: str) -> str | None:
    try:
        return os.readlink(path).removesuffix(" (deleted)")
    except OSError:
        return None


@lru_cache(maxsize=1)
def _boot_ns() -> int:
    """When the machine started. Taken once: the same process must get the same start time."""
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@lru_cache(maxsize=1)
def _boot_id() -> str:
    """A name for the time since the machine was started, which no other start has."""
    return (_read("/proc/sys/kernel/random/boot_id") or b"").decode("ascii", "replace").strip()


@lru_cache(maxsize=256)
def user_name(uid: int) -> str | None:
    """The account of that number, if it has a name."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def working_directory(pid: int) -> str | None:
    """Where a process is; None when it is gone."""
    return _link(f"/proc/{pid}/cwd")


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Command name, parent and start (clock ticks since boot). The name may hold anything."""
    raw = _read(f"/proc/{pid}/stat")
    if not raw:
        return None
    head, _, tail = raw.rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    return head.partition(b"(")[2].decode("utf-8", "replace"), int(fields[1]), int(fields[19])


def started_ticks(pid: int) -> int | None:
    """The start time: a later process of the same pid has another."""
    stat = _stat(pid)
    return stat[2] if stat else None


def parents_of(pid: int) -> tuple[tuple[int, str], ...]:
    """The process itself and those above it, as (pid, executable's name)."""
    found: list[tuple[int, str]] = []
    while pid > 0 and len(found) < PARENTS_MAX:
        stat = _stat(pid)
        if stat is None:
            break
        exe = _link(f"/proc/{pid}/exe")
        found.append((pid, os.path.basename(exe) if exe else stat[0]))
        pid = stat[1]
    return tuple(found)


def _arguments(pid: int) -> list[str]:
    raw = _read(f"/proc/{pid}/cmdline", ARGV_BYTES_MAX) or b""
    return [part.decode("utf-8", "replace") for part in raw.split(b"\0")[:-1]]


def _ancestor(pid: int) -> Ancestor | None:
    stat = _stat(pid)
    if stat is None:
        return None
    return Ancestor(pid, stat[2], stat[1], _link(f"/proc/{pid}/exe"), _arguments(pid))


def root_name(process: Ancestor) -> str:
    """The name of the root of a process's tree; `start` is in clock ticks since boot."""
    root = root_of(process, _ancestor)
    return name_of_root(root.pid, root.start, _boot_id())


def container_of(cgroup: str) -> str | None:
    """The container's id (12 characters) in the text of /proc/PID/cgroup, or None."""
    match = _CONTAINER.search(cgroup) or _BARE_CONTAINER.search(cgroup)
    return match.group(1)[:12] if match else None


def project_in(environment: bytes) -> str | None:
    """HALTON_PROJECT in the bytes of /proc/PID/environ, or None."""
    for variable in environment.split(b"\0"):
        if variable.startswith(b"HALTON_PROJECT="):
            return variable[15:].decode("utf-8", "replace")[:PROJECT_CHARS_MAX] or None
    return None


def read_process(pid: int) -> Process | None:
    """The process as it is now, or None when it is gone."""
    stat = _stat(pid)
    if stat is None:
        return None
    exe = _link(f"/proc/{pid}/exe")
    cwd = working_directory(pid)
    cgroup = _read(f"/proc/{pid}/cgroup") or b""
    environment = _read(f"/proc/{pid}/environ", ENVIRONMENT_BYTES_MAX) or b""
    # Last: who has arguments still had all of the above, a process that exits loses them first.
    argv = _arguments(pid)
    try:
        uid: int | None = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        uid = None
    return Process(
        pid=pid,
        started_ns=_boot_ns() + stat[2] * (1_000_000_000 // os.sysconf("SC_CLK_TCK")),
        exe=exe,
        argv=without_secrets(argv),
        cwd=cwd,
        uid=uid,
        user=user_name(uid) if uid is not None else None,
        parents=parents_of(stat[1]),
        container=container_of(cgroup.decode("ascii", "replace")),
        project_hint=project_in(environment),
        root=root_name(Ancestor(pid, stat[2], stat[1], exe, argv)),
    )


def all_pids() -> list[int]:
    """Every process, as of now."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def name_of(pid: int) -> str | None:
    """The name of a process's program; None when it is gone."""
    if (exe := _link(f"/proc/{pid}/exe")) is not None:
        return os.path.basename(exe)
    stat = _stat(pid)
    return stat[0] if stat else None


def tracer_of(pid: int) -> int | None:
    """The thread that has a process under ptrace, as debuggers do; 0: none, None: not known."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = (line for line in file if line.startswith(b"TracerPid:"))
            return int(next(lines).split()[1])
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def descendants(root: int) -> list[int]:
    """`root` and every process below it, as of now."""
    children: dict[int, list[int]] = {}
    for each in all_pids():
        if stat := _stat(each):
            children.setdefault(stat[1], []).append(each)
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, ())
    return found


def children_of(pid: int) -> Iterator[int]:
    """The processes that a process started, as of now."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                yield from map(int, file.read().split())
        except FileNotFoundError:
            if os.path.exists(f"/proc/{pid}/task/{thread}"):  # a kernel without these lists
                yield from descendants(pid)[1:]
                return
        except OSError:
            continue


def to_json(process: Process) -> dict[str, Any]:
    """For the socket."""
    return {name: getattr(process, name) for name in Process.__slots__}


def from_json(content: dict[str, Any]) -> Process:
    """The inverse of `to_json`. Raises KeyError or TypeError on what is not one."""
    return Process(
        **{
            **{name: content[name] for name in Process.__slots__ if name != "root"},
            "root": content.get("root"),  # a helper of the version before has none
            "argv": tuple(content["argv"]),
            "parents": tuple((int(pid), str(name)) for pid, name in content["parents"]),
        }
    )


def talks_tls(pid: int) -> bool:
    """Has the process an established connection to port 443? To which host, nothing here knows."""
    return any(port == HTTPS_PORT for _, port in established(pid))
