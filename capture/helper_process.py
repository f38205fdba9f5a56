"""Root's helper as a process: whom it may serve, how it is started, and that it has ended.

The other end of its socket is `uprobes.py`'s. Nothing here reads what the helper sends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from capture import protocol
from capture.helper.handover import Keeper
from capture.processes import proc

KNOWN_FILES_DIRECTORY = "/var/cache/halton-meter/tls"
STOP_S_MAX, KILLED_S_MAX = 10.0, 10.0  # how long to wait for a helper to end

# Python's own BLAKE2 serves; through _hashlib the helper would map libcrypto, 4 MB of it resident.
_HELPER = "import sys; sys.modules['_hashlib'] = None; from capture.helper.main import main; main()"
_children: list[subprocess.Popen[bytes]] = []  # reaped by Popen: they do not become zombies


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose plaintext may be copied; the kernel enforces it. The default is nobody's.

    A process is in scope when `everyone` is set, or its uid is in `uids`, or it is one of `roots`
    or descends from one; and, where `cgroup` (a path under /sys/fs/cgroup) is given, when it is
    in that cgroup as well. Processes in `excluded`, and their descendants, never are: name the
    proxy there, so that nothing is seen twice. With `owner`, processes of the trees that have
    become another user's are out. `reader` is the user who reads the plaintext: only that user's
    processes may be paused before their requests.
    """

    uids: frozenset[int] = frozenset()
    roots: tuple[int, ...] = ()
    everyone: bool = False
    cgroup: str | None = None
    excluded: tuple[int, ...] = ()
    owner: int | None = None
    reader: int | None = None


def spawn_helper(
    scope: Scope,
    hosts: Iterable[str],
    *,
    loader: str = "auto",
    files: Iterable[str] | None = None,
    restricted: bool = True,
    ring_bytes: int | None = None,
    spool_bytes: int | None = None,
    request_bytes_max: int | None = None,
    cache_directory: str | None = KNOWN_FILES_DIRECTORY,
    programs: Iterable[str] = (),
    keeper: Keeper | None = None,
    at_once: bool = True,
) -> socket.socket:
    """Start the helper (we must be root) and return the socket to it, for `UprobeSource(link=…)`.

    A root supervisor calls this, then starts the unprivileged daemon with the socket inherited.
    Scope and hosts are fixed here: when `restricted`, the other end of the socket cannot change
    them. `files` are attached to at once, before any process maps them (None: the system's libssl).
    `ring_bytes` is a power of two. `cache_directory` keeps what was found in programs without
    symbols; it must be root's alone. `programs` are what a root may execute: the first answer comes
    when they were searched. Unless `at_once`, a file's probes are attached one by one, as on
    kernels before 6.6. With `keeper`, which holds what this helper makes, it carries on
    where one before it died, and ends with the keeper; else it ends with the socket.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    configuration = {
        "scope": {
            "uids": sorted(scope.uids),
            "roots": list(scope.roots),
            "everyone": scope.everyone,
            "cgroup": scope.cgroup,
            "excluded": list(scope.excluded),
            "owner": scope.owner,
            "reader": scope.reader,
        },
        "hosts": list(hosts),
        "loader": loader,
        "files": None if files is None else list(files),
        "restricted": restricted,
        "ring_bytes": ring_bytes,
        "spool_bytes": spool_bytes,
        "request_bytes_max": request_bytes_max,
        "cache_directory": cache_directory,
        "programs": [os.path.abspath(program) for program in programs],
        "at_once": at_once,
    }
    argv = [sys.executable, "-I", "-c", _HELPER, "--fd", str(theirs.fileno())]
    far = None if keeper is None else keeper.open_channel()
    with theirs, far or contextlib.nullcontext():
        helper = subprocess.Popen(
            argv if far is None else [*argv, "--channel", str(far.fileno())],
            pass_fds=[theirs.fileno()] if far is None else [theirs.fileno(), far.fileno()],
            stdin=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # a Ctrl-C meant for the command must not end the capture
        )
    _children.append(helper)
    if keeper is None:
        ours.sendall(protocol.encode_command(configuration))
    else:
        with contextlib.suppress(OSError):  # it died at once: its link and its channel show that
            keeper.hand_over(configuration)
    return ours


def link_to(keeper: Keeper) -> socket.socket:
    """Another reader's socket to the helper that runs already. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        keeper.connect(theirs)
    return ours


def let_paused_go_on(keeper: Keeper) -> None:
    """The helper has died: nobody waits for it before a request any longer."""
    from capture.helper.pausing import let_all_go

    pausing, paused = keeper.descriptor("map:pausing"), keeper.descriptor("map:paused")
    if pausing is not None and paused is not None:
        with contextlib.suppress(OSError):
            let_all_go(pausing, paused)


def still_running(keeper: Keeper) -> list[str]:
    """The programs of the trees' processes that have not ended; the kernel still follows them."""
    from capture.helper.process_tree import living

    tree = keeper.descriptor("map:tree")
    if tree is None:
        return []
    with contextlib.suppress(OSError):
        return sorted(filter(None, map(proc.name_of, living(tree))))
    return []


def newest_helper() -> subprocess.Popen[bytes]:
    """The process of the last `spawn_helper`."""
    return _children[-1]


def end_helper(helper: subprocess.Popen[bytes]) -> None:
    """Wait for a helper that was told to end; kill it after `STOP_S_MAX`.

    A killed one is there until its last probe is gone; nobody waits for more than `KILLED_S_MAX`.
    """
    if _has_ended(helper, STOP_S_MAX):
        _children.remove(helper)
        return
    helper.kill()
    if _has_ended(helper, KILLED_S_MAX):
        _children.remove(helper)


def _has_ended(helper: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        helper.wait(seconds)
        return True
    return False
