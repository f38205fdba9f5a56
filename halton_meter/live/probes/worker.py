"""The unprivileged half of live metering as a process: it takes its job and leaves all privilege.

`supervisor.py` starts `python -m halton_meter.live.probes.worker LINK` as the user. LINK is the
inherited descriptor of the socket to the root helper. Standard input is a socket: a line of JSON
(`job.Job`) first, a new link when the helper was replaced; at its end the worker ends. Its messages
go to standard output, one line of JSON each. Everything that parses captured plaintext runs in
here; what it does is the loop's (`metering.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
from pathlib import Path

from halton_meter.live.limits import limit_this_process
from halton_meter.live.pipeline import Pipeline, prepare_home
from halton_meter.live.probes.holding import Holding
from halton_meter.live.probes.job import JOB_BYTES_MAX, Job, send
from halton_meter.live.probes.metering import Metering
from halton_meter.problem import Unavailable

# Exit codes beside that of a loop that was asked to end: no probes; another service runs.
UNAVAILABLE, REFUSED = 10, 12


def _is_only_one(home: Path) -> bool:
    """Take the service's locks: False when another holds one. They are freed with the process.

    The folder itself is locked as well as a file in it: the file cannot be made on a full disk,
    and a network's file system locks no folders. What can do neither is no reason not to meter.
    """
    for path, flags in ((home, os.O_DIRECTORY), (home / "daemon.lock", os.O_RDWR | os.O_CREAT)):
        with contextlib.suppress(OSError):
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
    return True


_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def _settle() -> None:
    """Leave nothing of the terminal's or the supervisor's signal handling, nor a way up.

    It holds plaintext, and a link to root: no other process of the user's may look into it or
    take it over (ptrace, /proc/PID/mem, /proc/PID/fd), and no core is written.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o077)
    limit_this_process()
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _first_line(fd: int) -> bytes:
    """One line, and not a byte of what follows it: that is for the loop."""
    line = bytearray()
    while (byte := os.read(fd, 1)) not in (b"", b"\n") and len(line) < JOB_BYTES_MAX:
        line += byte
    return bytes(line)


def main(link_fd: int) -> int:
    """Run one metering process; see the file's head."""
    _settle()
    job = Job(**json.loads(_first_line(sys.stdin.fileno())))
    return start(job, socket.socket(fileno=link_fd))


def start(job: Job, link: socket.socket) -> int:
    """Attach to the helper behind `link` and meter."""
    from capture.helper_process import Scope
    from capture.uprobes import UprobeSource
    from halton_meter.providers.registry import Registry
    from halton_meter.store import Store

    home = Path(job.home)
    with contextlib.suppress(OSError):  # the store reports a disk that refuses everything
        prepare_home(home)
    if job.service and not _is_only_one(home):
        send({"refused": f"another halton-meter service already writes to {home}"})
        return REFUSED
    source = UprobeSource(Registry(job.extra_hosts).hosts(), Scope(), link=link, resumable=True)
    # The pipeline is imported while the helper attaches.
    holding = Holding(home, is_run=not job.service)
    pipeline = Pipeline(home, job.extra_hosts, holding.on_request, holding.on_answer)
    holding.preview, holding.at_most = pipeline.meter.preview, pipeline.meter.at_most
    try:
        source.start()
    except Unavailable as error:
        send({"unavailable": [[problem.what, problem.fix] for problem in error.problems]})
        return UNAVAILABLE
    store = Store(home, puts_aside=True)
    meter, trouble = pipeline.meter, pipeline.price_error
    return Metering(job, source, meter, store, trouble, pipeline, holding).run()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
