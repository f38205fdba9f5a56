"""The process that owns a client's socket, on macOS: by lsof, ps and the kernel's argv.

lsof gives the pid of a connection's end and a process's working directory, ps its parents and user.
The arguments are read with sysctl(KERN_PROCARGS2), because ps joins them with spaces: then a
prompt, which must not be stored, looks like options. Of the environment it reads HALTON_PROJECT
only. The caller decides what of a command line may be stored (`redacted`). It takes some 100 ms, so
it is called in a thread.

The functions that parse output are pure, and tested on every system.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halton_meter.model import Process
from proxy_fallback.edge.client_socket import ClientSocket

COMMAND_S_MAX = 5.0
PARENTS_MAX = 16
ARGUMENTS_BYTES_MAX = 1 << 20
ARGUMENTS_MAX = 4096
PROJECT_CHARS_MAX = 200

_CTL_KERN, _KERN_PROCARGS2 = 1, 49
_PS = ("/bin/ps", "-axww", "-o", "pid=,ppid=,uid=,user=,lstart=,comm=")
_PS_LINE = re.compile(
    r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(\S+)\s+"
    r"(?:\w{3}\s+)?(\w{3})\s+(\d{1,2})\s+(\d\d:\d\d:\d\d)\s+(\d{4})\s+(.*\S)\s*"
)

Run = Callable[[Sequence[str]], str]
Arguments = Callable[[int], bytes]
Redacted = Callable[[Sequence[str]], tuple[str, ...]]
# A process as far as its tree is concerned: pid, start, parent, executable, arguments.
Told = tuple[int, int, int, str | None, Sequence[str]]
# The name of the root of a process's tree, by what another process is told to be.
Root = Callable[[Told, Callable[[int], Told | None]], str]


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of ps. `exe` is a path if the program was started by path."""

    pid: int
    parent: int
    uid: int
    user: str
    started_ns: int
    exe: str


def run(command: Sequence[str]) -> str:
    """A command's output in the C locale; "" when it fails or takes too long."""
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(command),
            env=environment,
            capture_output=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def kernel_arguments(pid: int) -> bytes:
    """The result of sysctl(KERN_PROCARGS2) for a process; b"" when that is not permitted."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        name = (ctypes.c_int * 3)(_CTL_KERN, _KERN_PROCARGS2, pid)
        size = ctypes.c_size_t(ARGUMENTS_BYTES_MAX)
        buffer = ctypes.create_string_buffer(ARGUMENTS_BYTES_MAX)
        if library.sysctl(name, 3, buffer, ctypes.byref(size), None, ctypes.c_size_t(0)):
            return b""
        return buffer.raw[: size.value]
    except (OSError, AttributeError):
        return b""


def pid_in_lsof(output: str, client: ClientSocket) -> int | None:
    """The pid in `lsof -F pn` that owns the client's socket."""
    host = f"[{client.address}]" if ":" in client.address else client.address
    pid: int | None = None
    for line in output.splitlines():
        if line.startswith("p") and line[1:].isdigit():
            pid = int(line[1:])
        elif line.startswith(f"n{host}:{client.port}->") and line.endswith(f":{client.far_port}"):
            return pid
    return None


def folder_in_lsof(output: str) -> str | None:
    """The path in `lsof -d cwd -F n`."""
    return next((line[1:] for line in output.splitlines() if line.startswith("n/")), None)


def processes_in_ps(output: str) -> dict[int, Listed]:
    """Every process of `ps -axo pid=,ppid=,uid=,user=,lstart=,comm=`, by pid."""
    found = {}
    for line in output.splitlines():
        match = _PS_LINE.fullmatch(line)
        if match is None:
            continue
        pid, parent, uid, user, month, day, clock, year, exe = match.groups()
        try:
            started = time.strptime(f"{month} {day} {clock} {year}", "%b %d %H:%M:%S %Y")
        except ValueError:
            continue
        started_ns = int(time.mktime(started)) * 1_000_000_000
        found[int(pid)] = Listed(int(pid), int(parent), int(uid), user, started_ns, exe)
    return found


def arguments_in(raw: bytes) -> tuple[str | None, tuple[str, ...], str | None]:
    """(executable, arguments, HALTON_PROJECT) in what KERN_PROCARGS2 gives.

    That is the number of arguments, the executable's path, NULs, the arguments, the environment.
    """
    if len(raw) < 5:
        return None, (), None
    count = int.from_bytes(raw[:4], "little")
    exe, _, rest = raw[4:].partition(b"\0")
    words = rest.lstrip(b"\0").split(b"\0")
    if not 0 <= count <= min(len(words), ARGUMENTS_MAX):
        return os.fsdecode(exe) or None, (), None
    project = None
    for variable in words[count:]:
        if not variable:
            break  # the environment ends here
        if variable.startswith(b"HALTON_PROJECT="):
            project = variable[15:].decode("utf-8", "replace")[:PROJECT_CHARS_MAX] or None
    arguments = tuple(word.decode("utf-8", "replace") for word in words[:count])
    return os.fsdecode(exe) or None, arguments, project


def _parents(processes: dict[int, Listed], pid: int) -> tuple[tuple[int, str], ...]:
    found: list[tuple[int, str]] = []
    while pid in processes and len(found) < PARENTS_MAX:
        each = processes[pid]
        found.append((pid, os.path.basename(each.exe)))
        pid = each.parent if each.parent != pid else 0
    return tuple(found)


def process_of(
    client: ClientSocket,
    redacted: Redacted,
    root: Root,
    run: Run = run,
    arguments: Arguments = kernel_arguments,
) -> Process | None:
    """The process behind a client's socket, or None."""
    connected = ("/usr/sbin/lsof", "-nP", f"-iTCP:{client.port}", "-sTCP:ESTABLISHED", "-Fpn")
    pid = pid_in_lsof(run(connected), client)
    if pid is None:
        return None
    processes = processes_in_ps(run(_PS))
    listed = processes.get(pid)
    if listed is None:
        return None

    def told(pid: int) -> Told | None:
        each = processes.get(pid)
        if each is None:
            return None
        return pid, each.started_ns, each.parent, each.exe, arguments_in(arguments(pid))[1]

    exe, argv, project = arguments_in(arguments(pid))
    folder = run(("/usr/sbin/lsof", "-a", "-p", str(pid), "-d", "cwd", "-Fn"))
    return Process(
        pid=pid,
        started_ns=listed.started_ns,
        exe=exe or listed.exe,
        argv=redacted(argv),
        cwd=folder_in_lsof(folder),
        uid=listed.uid,
        user=listed.user,
        parents=_parents(processes, listed.parent),
        project_hint=project,
        root=root((pid, listed.started_ns, listed.parent, listed.exe, argv), told),
    )
