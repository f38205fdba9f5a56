"""Asks a finder's process about files, for who is no helper: a question at a time, and no more.

What looks into a file is that process (`finder/process.py`): it is confined, and nobody where we
are root. Nothing of an answer is believed but its shape (`finder_protocol.py`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from capture.functions.finder_protocol import (
    INSPECT,
    LAST,
    QUICK,
    SEARCH,
    library_from_json,
)
from capture.functions.library import Library

ANSWER_BYTES_MAX = 1 << 20
ANSWER_S_MAX = 60.0
FINDER = "capture.functions.finder.process"


class Question(NamedTuple):
    """A file, by a name that opens it. `thoroughly`: also by its code, where it has no symbols."""

    name: str
    thoroughly: bool


def libraries_in(
    command: Sequence[str], questions: Iterable[Question]
) -> Iterator[tuple[str, Library]]:
    """The files among these that have TLS in them; `command` runs the module FINDER."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        try:
            for question in questions:
                if (library := _asked(ours, question)) is not None:
                    yield question.name, library
        finally:
            process.kill()
            process.wait()


def _asked(control: socket.socket, question: Question) -> Library | None:
    try:
        fd = os.open(question.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _answer(control, QUICK, INSPECT, fd)
        if found is None and question.thoroughly:
            found = _answer(control, SEARCH, SEARCH, fd)
        return found
    finally:
        os.close(fd)


def _answer(control: socket.socket, lane: bytes, kind: bytes, fd: int) -> Library | None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(ANSWER_S_MAX)
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(control, [lane], [theirs.fileno()])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            ours.recv(64)  # the child's pid
            socket.send_fds(ours, [kind], [fd])
            text = ours.recv(ANSWER_BYTES_MAX)
            if text and text != LAST:
                return library_from_json(text.decode("utf-8", "replace"))
    return None
