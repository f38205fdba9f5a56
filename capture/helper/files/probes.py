"""The probes in files: attached after root's own check, counted by owner, held beyond our end.

The supervisor holds the descriptors of a file's probes, so that a helper after us takes them over.
A library's number is in the cookies of its probes: by it the kernel says what it has learned of its
names, and that its functions were not what they were taken for. This file decides nothing about
which files are probed, and when: `attachments.py` does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from capture.functions.elf import ElfError
from capture.functions.library import Library
from capture.functions.stacks import INSTEAD
from capture.helper.files import attaching
from capture.helper.files.closing import Closer
from capture.helper.files.cookies import UNPROVED, Unfit, cookies
from capture.helper.files.file import File, identity_of, is_overlay, written
from capture.helper.files.known_files import code_digest
from capture.helper.files.name_locations import NAMING, NUMBERS_MAX, NameLocations
from capture.helper.files.placement import refusal
from capture.helper.files.probed_library import (
    ProbedLibrary,
    libraries_from_json,
    libraries_json,
)
from capture.helper.files.searches import FileId
from capture.helper.handover import Hold

PROBES_OF_OWNER_MAX, PROBES_OF_ROOT_MAX, PROBES_ALL_MAX = 1024, 4096, 16_384
"""A probe is a descriptor, a library has a dozen, a Go program some twenty. The system's files and
those of most containers are root's."""
DESCRIPTORS_MAX = 32_768
CLOSE_S = 30.0
"""How long `close` waits for probes to be gone."""
NO_INSTRUCTION = "the check by root refused the offsets found"


class Probes:
    """`evict` forgets a probed file of an owner that nobody runs; False: there is none."""

    def __init__(
        self,
        programs: Mapping[str, int],
        names: NameLocations,
        hold: Hold,
        evict: Callable[[int], bool],
    ) -> None:
        self._programs = programs
        self._names = names
        self._hold = hold
        self._evict = evict
        self._has_cookies = True
        self._closer = Closer()
        self._count: Counter[int] = Counter()  # by owner
        self._by_number: dict[int, tuple[File, ProbedLibrary]] = {}

    # --- what outlives us -----------------------------------------------------------------------

    def adopt(self) -> Iterator[tuple[FileId, File]]:
        """Take over the files that a helper before us has attached to."""
        for name, held in self._hold.take_all("file:"):
            libraries = libraries_from_json(held.about["libraries"], held.fds)
            if not libraries:
                held.close()  # it died while it attached: attached anew when it is looked at
                self._hold.drop(name)
                continue
            owner, library = int(held.about["owner"]), _together(libraries)
            file = File(held.about["path"], owner, library, libraries, held_as=name)
            file.code = str(held.about.get("code", ""))
            file.written = tuple(held.about.get("written", (0, 0)))
            file.attached = sum(len(probed.library.probes) for probed in libraries if probed.probes)
            self._count[owner] += file.attached
            for probed in libraries:
                if probed.number:
                    self._by_number[probed.number] = file, probed
                    self._names.adopt(probed.number)
            yield _held_identity(name), file

    def have_held(self, identity: FileId, file: File) -> None:
        """Have the supervisor hold a file's probes, as they are now."""
        file.held_as = f"file:{identity[0]}:{identity[1]}:{identity[2]}"
        about = {
            "path": file.path,
            "owner": file.owner,
            "libraries": libraries_json(file.libraries),
        }
        about |= {"code": file.code, "written": file.written}
        self._hold.keep(file.held_as, about, file.probes)

    def rename(self, identity: FileId, file: File) -> None:
        """Have them held by the file's new identity."""
        held_as = file.held_as
        self.have_held(identity, file)
        if held_as:
            self._hold.drop(held_as)

    # --- attaching ------------------------------------------------------------------------------

    def attach(self, identity: FileId, file: File, fd: int) -> bool:
        """Attach to a file, if instructions begin at its offsets (`placement.py`).

        Its `failure`, and those of its libraries, say why not. False: there was no room.
        """
        assert file.library is not None
        with contextlib.suppress(OSError, ElfError):
            file.code, file.written = code_digest(fd, file.library), written(os.fstat(fd))
        file.failure = None
        if not self._makes_room(file.owner, probes_in(file.library)):
            file.failure = f"its owner's files have as many probes as one owner may have; {INSTEAD}"
            return False
        for probed in file.libraries:
            if probed.library.probes:
                probed.failure = self._attach_library(file, probed, fd)
        if file.probes and identity_of(os.fstat(fd)) != identity and not is_as_it_was(file, fd):
            file.failure = "the file changed while it was being probed"
            self.detach(file)
        elif file.probes:
            self.have_held(identity, file)
        return True

    def _attach_library(self, file: File, probed: ProbedLibrary, fd: int) -> str | None:
        """Attach to one library of a file; why not."""
        reason = refusal(fd, probed.library)
        if reason:
            return f"{NO_INSTRUCTION}: {reason}; {INSTEAD}"
        cookie = self._cookie(file, probed, fd)
        if probed.library.unproved and not cookie:
            return f"more than {NUMBERS_MAX - 1:,} files are probed already"
        try:
            error = self._attach_probes(file, probed, fd, cookie)
            if (
                error
                and error.errno == errno.EINVAL
                and not probed.library.unproved
                and probed.number
            ):
                # A kernel without cookies: names are then known by requests alone.
                self._has_cookies = False
                error = self._attach_probes(file, probed, fd, 0)
        except Unfit as unfit:
            self._release(probed)
            return f"what its probes need cannot be told to them ({unfit}); {INSTEAD}"
        if error:
            self._release(probed)
            return f"cannot attach: {error.strerror}"
        return None

    def _makes_room(self, owner: int, count: int) -> bool:
        """Whether so many probes more are within limits, once files that nobody runs are left."""
        most = PROBES_OF_OWNER_MAX if owner else PROBES_OF_ROOT_MAX
        while self._count[owner] + count > most:
            if not self._evict(owner):
                return False
        while self._count.total() + count > PROBES_ALL_MAX:
            if not self._evict(max(self._count, key=lambda each: self._count[each])):
                return False
        return True

    def _cookie(self, file: File, probed: ProbedLibrary, fd: int) -> int:
        """The cookie of a library's probes: Go's offsets, or its number, and if it is proved."""
        library = probed.library
        names = any(probe.program in NAMING for probe in library.probes)
        if not library.unproved and not (names and self._has_cookies):
            return library.cookie
        probed.number = self._names.number(fd, library)
        if not probed.number:
            return 0
        self._by_number[probed.number] = file, probed
        return probed.number | (UNPROVED if library.unproved else 0)

    def _attach_probes(
        self, file: File, probed: ProbedLibrary, fd: int, cookie: int
    ) -> OSError | None:
        """All of them, or none. Raises Unfit."""
        probes = list(cookies(probed.library, cookie, platform.machine()))
        try:
            probed.probes = attaching.attach(self._programs, f"/proc/self/fd/{fd}", probes)
        except OSError as error:
            return error
        file.attached += len(probes)
        self._count[file.owner] += len(probes)
        return None

    # --- what the kernel tells ------------------------------------------------------------------

    def not_http(self, number: int) -> None:
        """Remove the probes of the library whose bytes were not HTTP."""
        self._give_up(number, "the functions found passed bytes that are not HTTP")

    def records_missed(self, number: int) -> None:
        """Remove the probes of a rustls of which records passed elsewhere."""
        self._give_up(number, "records passed beside the functions found")

    def _give_up(self, number: int, reason: str) -> None:
        file, probed = self._by_number.get(number, (None, None))
        if file is None or probed is None:
            return
        self._remove(file, [probed])
        probed.not_http = True
        probed.give_up(reason)
        file.library = _together(file.libraries)

    def learned(self, number: int, offset: int) -> None:
        """The kernel knows where a file's library keeps names, or (0) that it was wrong."""
        self._names.learned(number, offset)

    # --- removing -------------------------------------------------------------------------------

    def detach(self, file: File) -> None:
        """Remove the file's probes."""
        self._remove(file, file.libraries)

    def _remove(self, file: File, libraries: Sequence[ProbedLibrary]) -> None:
        """Remove those of some of its libraries."""
        held_as, file.held_as = file.held_as, ""
        if held_as:
            self._hold.drop(held_as)
        for probed in libraries:
            if probed.probes:
                self._closer.close(file.owner, file.inode, probed.probes)
                self._count[file.owner] -= len(probed.library.probes)
                file.attached -= len(probed.library.probes)
                probed.probes = []
            self._release(probed)
        if file.probes and held_as:
            self.have_held(_held_identity(held_as), file)

    def _release(self, probed: ProbedLibrary) -> None:
        """Give the library's number back."""
        if probed.number:
            del self._by_number[probed.number]
            self._names.release(probed.number)
            probed.number = 0

    def must_wait(self, inode: tuple[int, int], owner: int) -> bool:
        """Whether probes are on their way out: those of this file, or of others more than may."""
        return self._closer.removing(inode) or (owner != 0 and self._closer.full)

    def close(self) -> None:
        """Return when those that are on their way out are gone, or after CLOSE_S."""
        self._closer.wait(CLOSE_S)


def is_as_it_was(file: File, fd: int) -> bool:
    """Whether the functions are what they were when the file was attached to, and checked."""
    if not file.library or not file.code or is_overlay(fd):
        return False
    with contextlib.suppress(OSError, ElfError):
        return code_digest(fd, file.library) == file.code and not are_refused(fd, file.library)
    return False


def are_refused(fd: int, library: Library) -> bool:
    """Whether root's check refuses what was found, in any library of the file."""
    return any(refusal(fd, each) for each in (library, *library.others))


def probes_in(library: Library) -> int:
    """How many probes a file gets."""
    return sum(len(each.probes) for each in (library, *library.others))


def allow_descriptors(count: int) -> None:
    """Have room for a descriptor for each probe and for each file that waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _held_identity(name: str) -> FileId:
    """The file that the supervisor holds the probes of by this name."""
    device, inode, changed_ns = map(int, name[5:].split(":"))
    return device, inode, changed_ns


def _together(libraries: Sequence[ProbedLibrary]) -> Library:
    """The inverse of `libraries_in`."""
    first, *others = (probed.library for probed in libraries)
    return replace(first, others=tuple(others))
