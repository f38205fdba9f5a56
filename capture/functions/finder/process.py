"""The finder: the process that looks into files, and that can do nothing else.

Started once by the helper (`searches.py`), it has all modules, is nobody, reads no file itself and
waits. When asked it forks a child, in 3 ms, and hands it a socket; the child confines itself
(`confinement.py`), sends its pid, and answers one file after the other: a descriptor and a question
come in, a line of JSON goes out (`finder_protocol.py`). A child looks at files of one owner only,
and at one file only where a disassembler reads it: a file that takes over its reader changes no
other file's answer.
That an answer is true of its file is root's to check (`placement.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from capture.functions.elf import ElfError
from capture.functions.finder import confinement, search, symbols
from capture.functions.finder_protocol import (
    IDLE,
    LAST,
    LINKER,
    NO_ANSWER,
    NOTHING,
    QUICK,
    SEARCH,
    library_json,
)
from capture.functions.library import Library
from capture.functions.stacks import STACKS
from capture.unprivileged import end_with_parent, give_up_privileges

INSPECT_SECONDS_MAX = 1.0
"""Of CPU, for one file by symbol: 10 ms for Node, 0.2 s for a debug build of Chromium."""
SEARCH_SECONDS_MAX = 30.0
"""Of CPU, for one file by structure; 2.5 for the largest known."""
QUICK_SECONDS_MAX = 20
"""Of CPU, for a child that looks at many files."""
QUICK_BYTES_MAX = 256 << 20
SEARCH_BYTES_MAX = 2 << 30
"""Of address space."""
NICE_IDLE = 19
_DISASSEMBLER = ("capstone", "capstone.x86", "capstone.arm64")


def answer(kind: bytes, fd: int) -> str:
    """What was found, as JSON: "null" for nothing; NO_ANSWER where it could not be searched."""
    seconds = SEARCH_SECONDS_MAX if kind == SEARCH else INSPECT_SECONDS_MAX
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return library_json(_look(kind, fd))
    except (ElfError, ValueError, struct.error, search.SearchTooLong):
        return NOTHING
    except (OSError, ImportError, MemoryError):  # of this machine now, not of the file
        return NO_ANSWER if kind == SEARCH else NOTHING
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _look(kind: bytes, fd: int) -> Library | None:
    if kind == SEARCH:
        return search.find_by_structure(fd)
    found = symbols.inspect(fd)
    if found is None and kind == LINKER:
        return symbols.find_linker_hook(fd)
    return search.recognise(fd) if found is None else found


def serve(link: socket.socket, lane: bytes) -> None:
    """Answer what comes over the socket until it ends; confined before the first file."""
    if lane == IDLE:
        os.setpriority(os.PRIO_PROCESS, 0, NICE_IDLE)
    signal.signal(signal.SIGPROF, _give_up)
    many = lane == QUICK
    confinement.confine(
        cpu_seconds=QUICK_SECONDS_MAX * 2 if many else int(SEARCH_SECONDS_MAX + 5),
        memory_bytes=QUICK_BYTES_MAX if many else SEARCH_BYTES_MAX,
    )
    link.send(str(os.getpid()).encode())
    while True:
        kind, descriptors, _, _ = socket.recv_fds(link, 16, 1)
        if not kind or not descriptors:
            return
        text = answer(kind, descriptors[0])
        os.close(descriptors[0])
        link.send(text.encode())
        if not many or time.process_time() > QUICK_SECONDS_MAX:
            link.send(LAST)
            link.recv(1)  # its end: until then the kernel's count of our CPU time can be read
            return


def _give_up(*_: object) -> None:
    raise search.SearchTooLong("it took too long")


def prepare() -> None:
    """Import what children need: a child opens no file by its name any more."""
    finders = (row.finder for row in STACKS.values() if row.finder is not None)
    for name in (*finders, *_DISASSEMBLER):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main(control: socket.socket) -> None:
    """Fork a child for each socket that comes with a kind of child, until the control ends."""
    prepare()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # the helper's own is higher than anybody's
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError, ValueError):  # the helper's own are for the helper
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    give_up_privileges()
    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        lane, descriptors, _, _ = socket.recv_fds(control, 16, 1)
        if not lane or not descriptors:
            return
        try:
            child = os.fork()
        except OSError:  # no more processes: the helper sees the socket end
            child = -1
        if child:
            os.close(descriptors[0])
            continue
        control.close()
        end_with_parent()
        with socket.socket(fileno=descriptors[0]) as link, contextlib.suppress(OSError):
            serve(link, lane)
        os._exit(0)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
