"""The root helper as a process: from its first command to its end.

Started by `capture.helper_process.spawn_helper`, or by a supervisor with a channel on which it gets
what the helper before it had (`handover.py`): then it attaches nothing anew, and carries on where
that one was. Here are its configuration, what of it is bounded, and why it could not start; what it
does all the time is `loop.py`. Standard library only, as all of the helper: memory and start-up
time are why.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

from capture import bpf, loader, protocol
from capture.environment import check_environment
from capture.helper.files.probes import DESCRIPTORS_MAX, allow_descriptors
from capture.helper.files.searches import Finder
from capture.helper.handover import Hold
from capture.helper.kernel import keep, load_or_inherit
from capture.helper.loop import Helper
from capture.helper.mounts import offer_headers, own_mounts
from capture.helper.process_tree import ProcessTree
from capture.helper.promptness import NICE
from capture.helper.relay.spool import SPOOL_BYTES, Receipt, Spool
from capture.helper.scope import EnforcedScope, Refused
from halton_meter import untrusted

MEMORY_MORE_BYTES = 64 << 20

_PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


def bound_memory(more_bytes: int) -> None:
    """Let this process take so much more than it has: the last resort, after all other limits."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as f:
        now = int(f.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_DATA, (now + more_bytes, resource.RLIM_INFINITY))


def first_command(sock: socket.socket) -> dict[str, Any] | None:
    """The configuration of our own starter; nothing behind it is read."""
    line = bytearray()
    while not line.endswith(b"\n"):
        there = sock.recv(1 << 16, socket.MSG_PEEK)
        end = there.find(b"\n") + 1
        data = sock.recv(end or len(there))
        if not data or len(line) > protocol.COMMAND_BYTES_MAX:
            return None
        line += data
    return untrusted.parsed(bytes(line))


def serve(sock: socket.socket, hold: Hold | None = None) -> None:
    """Set up as the supervisor, or else the first command, configures; then serve readers."""
    hold = hold or Hold()
    command = hold.receive_all() if hold.fileno() >= 0 else first_command(sock)
    if command is None:
        return
    try:
        helper = _configured(sock, hold, command)
        helper.begin(command)
    except (loader.LoadFailed, OSError, Refused, KeyError, TypeError, ValueError) as error:
        sock.sendall(protocol.encode_message(protocol.PROBLEM, diagnosis(error)))
        return
    helper.connect(sock)
    bound_memory(MEMORY_MORE_BYTES)
    try:
        helper.run()
    finally:
        helper.end_pauses()
    helper.finish_searches()


def _configured(sock: socket.socket, hold: Hold, command: dict[str, Any]) -> Helper:
    """Load, and set the scope. Raises LoadFailed, OSError, Refused."""
    own_mounts()
    finder = Finder()
    finder.start(time.monotonic())  # meanwhile we load
    if command["loader"] == "bcc":
        offer_headers()
    ring_bytes = int(command.get("ring_bytes") or loader.RING_BYTES)
    at_once = command.get("at_once") is not False
    kernel = load_or_inherit(hold, command["loader"], ring_bytes, at_once=at_once)
    relay = _relay(hold, int(command.get("spool_bytes") or SPOOL_BYTES))
    scope = EnforcedScope(
        kernel.maps,
        ProcessTree(bpf.Map(kernel.maps["tree"], 4, 4), hold),
        command["scope"],
        restricted=bool(command.get("restricted")),
        request_bytes_max=command.get("request_bytes_max"),
    )
    scope.set_hosts(command["hosts"])
    if not kernel.inherited:
        keep(kernel, hold)
    cache = command.get("cache_directory")
    return Helper(sock, hold, kernel, relay, scope, finder, Path(cache) if cache else None)


def _relay(hold: Hold, spool_bytes: int) -> tuple[Spool, Receipt]:
    """The spool and its receipt: those of a helper before us, else new ones."""
    spool, receipt = hold.take("spool"), hold.take("receipt")
    if spool and receipt:
        return Spool(spool.fds[0]), Receipt(receipt.fds[0])
    made = Spool.new(spool_bytes), Receipt.new()
    hold.keep("spool", True, [made[0].fd])
    hold.keep("receipt", True, [made[1].fd])
    return made


def diagnosis(error: Exception) -> dict[str, Any]:
    """Why the set-up failed, and what is missing here, each with its fix."""
    missing = []
    if not isinstance(error, Refused):
        with contextlib.suppress(OSError, ValueError):
            missing = [[problem.what, problem.fix] for problem in check_environment()]
    return {"what": str(error), "missing": missing}


def main() -> None:
    """Entry point; see the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--channel", type=int)
    arguments = parser.parse_args()
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    allow_descriptors(DESCRIPTORS_MAX)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    channel = None if arguments.channel is None else socket.socket(fileno=arguments.channel)
    serve(socket.socket(fileno=arguments.fd), Hold(channel))


if __name__ == "__main__":
    main()
