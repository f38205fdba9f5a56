"""One file that processes run, and what tells it from others: nothing is searched or probed here.

Its identity is device, inode and change time. Root opens regular files only, whoever owns the path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from dataclasses import dataclass, field

from capture.functions.library import Library
from capture.helper.files.probed_library import ProbedLibrary
from capture.helper.files.searches import FileId, SearchPriority

OVERLAY = 0x794C7630
"""statfs(2): there a change of a file's mode may have the same number lead to another inode."""
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class File:
    """A file that has TLS in it, or may: `library` is None while it is `searching`."""

    path: str
    owner: int = 0
    library: Library | None = None  # the first of those that were found, with the others
    libraries: list[ProbedLibrary] = field(default_factory=list)
    attached: int = 0  # how many probes it has
    inode: tuple[int, int] = (0, 0)
    priority: SearchPriority | None = None  # while it is searched
    failure: str | None = None  # why nothing of it is probed
    unanswered: int = 0  # searches in it that ended without an answer, one after the other
    again_at: float | None = None  # when it may be searched again after one of those
    held_as: str = ""  # the supervisor's name for its probes
    waits: bool = False  # it is to be attached to, in its turn
    code: str = ""  # a digest of the functions that are probed, as they were then
    written: tuple[int, int] = (0, 0)  # its size and when it was written to, then

    @property
    def probes(self) -> list[int]:
        """Descriptors of all its probes."""
        return [probe for probed in self.libraries for probe in probed.probes]

    @property
    def searching(self) -> bool:
        """True until the search by structure has answered, and its turn to be attached has come."""
        return self.priority is not None or self.waits

    @property
    def is_linker(self) -> bool:
        """Whether it has no TLS, but reports the libraries that it maps."""
        return self.library is not None and self.library.is_linker


def open_regular(path: str) -> int:
    """A descriptor to read a regular file by. Raises OSError for what is none.

    Whoever owns the path may put a device there at any moment, and root's mere opening of some
    has effects: what is opened for reading is the very file that was found to be regular.
    """
    held = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(held).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(held)


def identity_of(found: os.stat_result) -> FileId:
    """Which file it is; another change time is another identity."""
    return found.st_dev, found.st_ino, found.st_ctime_ns


def written(found: os.stat_result) -> tuple[int, int]:
    """Its size, and when it was written to last."""
    return found.st_size, found.st_mtime_ns


def is_overlay(fd: int) -> bool:
    """Whether a file lies in a container's layers."""
    about = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, about):
        return True  # unknown: the file is attached to anew
    return int.from_bytes(about.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) == OVERLAY
