"""The files that processes in scope run: each looked into once, and probed where it speaks TLS.

Root searches no file here: it opens regular files, hands their descriptors to a process without
privileges (`searches.py`), and attaches what that process finds, or what is remembered
(`known_files.py`), only after a check of its own (`placement.py`). The table of files is bounded:
each owner's files that nobody ran for longest go first, and what found no room is counted
(`over_limit`). Time is bounded, too: attaching stops when a turn is over, owners take turns
(`turns.py`), and a thread removes probes (`closing.py`). This file decides nothing about processes
or scope.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capture.functions.elf import ElfError
from capture.functions.finder_protocol import (
    INSPECT,
    LINKER,
    SEARCH,
    STRUCTURE_FILE_BYTES_MIN,
    library_from_json,
)
from capture.functions.library import Library
from capture.functions.stacks import INSTEAD, STACKS
from capture.helper.files import attaching
from capture.helper.files.closing import Closer
from capture.helper.files.cookies import UNPROVED, Unfit, cookies
from capture.helper.files.known_files import KnownFiles, code_digest
from capture.helper.files.name_locations import NAMING, NUMBERS_MAX, NameLocations
from capture.helper.files.owners import owner_of
from capture.helper.files.placement import refusal
from capture.helper.files.probed_library import (
    ProbedLibrary,
    libraries_from_json,
    libraries_in,
    libraries_json,
)
from capture.helper.files.searches import FileId, Finder, Job, Searches, SearchPriority
from capture.helper.files.turns import WAIT_S, Turns
from capture.helper.handover import Hold

__all__ = ["Attachments", "File", "FileId", "SearchPriority", "open_regular"]

FILES_MAX = 20_000
"""Files without TLS that are remembered as such, some 150 bytes each."""
LIBRARIES_MAX = 2000
"""Files with TLS, or that wait to be looked into."""
PROBES_OF_OWNER_MAX, PROBES_OF_ROOT_MAX, PROBES_ALL_MAX = 1024, 4096, 16_384
"""A probe is a descriptor, a library has a dozen, a Go program some twenty. The system's files and
those of most containers are root's."""
DESCRIPTORS_MAX = 32_768
AHEAD_MAX = 1000
"""Once so many files were looked at, those that nobody runs are only remembered."""
USED_S = 2.0
"""How old the list of files that processes map may be when room is made."""
TURN_S = 0.02
"""Of attaching, before processes are looked at again. One file is attached to in one go."""
CLOSE_S = 30.0
"""How long `close` waits for probes to be gone."""
SETTLED_NS = 100_000_000
"""How long ago a file was last written to, for what was found in it to be remembered."""
OVERLAY = 0x794C7630
"""statfs(2): there a change of a file's mode may have the same number lead to another inode."""
LINKER_PREFIX = "ld-"  # ld-linux-x86-64.so.2, ld-2.31.so, ld-musl-x86_64.so.1
_libc = ctypes.CDLL(None, use_errno=True)
NO_INSTRUCTION = "the check by root refused the offsets found"


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


class Attachments:
    """See the file's head. `ready` registers finders with the caller's epoll."""

    def __init__(
        self,
        programs: Mapping[str, int],
        known: KnownFiles,
        names: NameLocations,
        epoll: select.epoll | None = None,
        hold: Hold | None = None,
        finder: Finder | None = None,
    ) -> None:
        self._programs = programs
        self._known = known
        self._names = names
        self._has_cookies = True
        self._finishing = False
        self._searches = Searches(epoll, finder)
        self._turns = Turns(self._probes_of)
        self._closer = Closer()
        self._turn_s = 0.0  # spent on attaching since the last turn began
        # The least recently used first, in both.
        self.files: dict[FileId, File] = {}
        self._without: dict[tuple[int, int], int] = {}  # device and inode: the change time
        self._probes: Counter[int] = Counter()  # by owner
        self._by_number: dict[int, tuple[File, ProbedLibrary]] = {}
        self.used: Callable[[], set[FileId]] = set  # what processes map, as far as we know
        self.before_attaching: Callable[[FileId], None] = lambda identity: None
        self._used: set[tuple[int, int]] = set()
        self._used_at = float("-inf")
        self._by_inode: dict[tuple[int, int], set[FileId]] = {}
        self.over_limit = self.forgotten = 0
        self._attached: set[FileId] = set()  # since somebody asked
        self._hold = hold or Hold()
        self._adopt()

    # --- what outlives us -----------------------------------------------------------------------

    def _adopt(self) -> None:
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
            self._keep(_held_identity(name), file)
            self._probes[owner] += file.attached
            for probed in libraries:
                if probed.number:
                    self._by_number[probed.number] = file, probed
                    self._names.adopt(probed.number)

    def _have_held(self, identity: FileId, file: File) -> None:
        file.held_as = f"file:{identity[0]}:{identity[1]}:{identity[2]}"
        about = {
            "path": file.path,
            "owner": file.owner,
            "libraries": libraries_json(file.libraries),
        }
        about |= {"code": file.code, "written": file.written}
        self._hold.keep(file.held_as, about, file.probes)

    # --- looking --------------------------------------------------------------------------------

    def look_at(
        self, link: str, path: str, priority: SearchPriority | None = None
    ) -> FileId | None:
        """The file's identity, once looked at; None when it cannot be opened."""
        if priority is None:
            priority = (
                SearchPriority.LIBRARY
                if ".so" in os.path.basename(path)
                else SearchPriority.PROGRAM
            )
        try:
            found = os.stat(link)
            identity = _identity(found)
            if self._is_done_with(identity, priority):
                return identity
            fd = open_regular(link)
        except OSError:
            return None
        try:
            return self.look_into(fd, path, priority)
        finally:
            os.close(fd)

    def look_into(
        self, fd: int, path: str, priority: SearchPriority = SearchPriority.PROGRAM
    ) -> FileId:
        """The same for an open file, which stays the caller's. Attaches if it is known by now.

        With AHEAD it is attached before its first run: in a process that runs already the kernel
        may take 150 ms for the first probe, and a short program has ended by then.
        """
        found = os.fstat(fd)
        identity = _identity(found)
        if self._is_done_with(identity, priority) or not stat.S_ISREG(found.st_mode):
            return identity
        kept = self._keep_probes(identity, fd)
        if kept and kept.written == _written(found):
            return identity
        if kept is None:
            self._forget_other_content(identity)
        file = self.files.get(identity) or File(path, owner_of(found.st_uid))
        if identity not in self.files and self._known.is_without(fd):
            self._keep_without(identity)
            return identity
        library = self._known.recall(fd)
        if library is None or _are_refused(fd, library):
            kind = INSPECT
            if os.path.basename(path).startswith(LINKER_PREFIX):
                kind = LINKER
            self._ask(Job(identity, fd, file.owner, kind, priority), file)
        elif priority is not SearchPriority.AHEAD or self._is_worth_it(library):
            self._keep(identity, file)
            # A search on its way is not waited for.
            self._take_library(Job(identity, fd, file.owner, INSPECT, priority), file, library)
        return identity

    def _ask(self, job: Job, file: File) -> None:
        """Have the file looked into, by a descriptor of the search's own."""
        job.fd = os.dup(job.fd)
        if self._searches.ask(job):
            self._keep(job.identity, file)
            file.priority = job.priority
        else:
            os.close(job.fd)
            self.over_limit += 1
            if file.probes:  # kept until now, of what the file held before
                self._forget(job.identity)

    def _is_worth_it(self, library: Library) -> bool:
        """Whether to attach to what nobody runs yet."""
        return STACKS[library.stack].ahead and len(self.files) < AHEAD_MAX

    def _is_done_with(self, identity: FileId, priority: SearchPriority) -> bool:
        if self._without.get(identity[:2]) == identity[2]:
            self._without[identity[:2]] = self._without.pop(identity[:2])
            return True
        file = self.files.get(identity)
        if file is None:
            return False
        self.files[identity] = self.files.pop(identity)
        if file.waits:
            self._turns.raise_priority(file.owner, identity, priority)
        searched = file.priority
        return searched is None or searched <= priority or searched is SearchPriority.LIBRARY

    def knows(self, identity: FileId) -> bool:
        """Whether the file was looked into, or will be."""
        return identity in self.files or self._without.get(identity[:2]) == identity[2]

    def knows_inode(self, inode: tuple[int, int]) -> bool:
        """The same by device and inode, whatever was written to it since."""
        return inode in self._by_inode or inode in self._without

    def _forget_other_content(self, identity: FileId) -> None:
        """The file was written to: probes of what it held before would be anywhere in it."""
        self._without.pop(identity[:2], None)
        for other in list(self._by_inode.get(identity[:2], ())):
            if other != identity:
                self._forget(other)

    def _keep_probes(self, identity: FileId, fd: int) -> File | None:
        """The file with that identity from now on, if another change time is all there is to it.

        Anyone can change his file's mode as often as he likes; to remove and attach probes each
        time takes a second. While there are probes the kernel keeps the inode: its number is no
        other's. What else was written is searched for again, where anything was.
        """
        for before in self._by_inode.get(identity[:2], ()):
            file = self.files[before]
            if before == identity or not (file.probes and file.code and file.library):
                continue
            if not _is_as_it_was(file, fd) or _identity(os.fstat(fd)) != identity:
                return None
            self._rename(before, identity, file)
            return file
        return None

    def _rename(self, before: FileId, identity: FileId, file: File) -> None:
        """The same file and probes, by another change time."""
        self._without.pop(identity[:2], None)
        self.files[identity] = self.files.pop(before)
        same = self._by_inode[identity[:2]]
        same.discard(before)
        same.add(identity)
        held_as = file.held_as
        self._have_held(identity, file)
        if held_as:
            self._hold.drop(held_as)

    # --- what is known of files -----------------------------------------------------------------

    def _keep(self, identity: FileId, file: File) -> None:
        """Remember a file that has TLS in it, or may."""
        if identity not in self.files:
            if len(self.files) >= LIBRARIES_MAX and self._evict():
                self.over_limit += 1
            self._by_inode.setdefault(identity[:2], set()).add(identity)
        file.inode = identity[:2]
        self.files[identity] = file

    def _keep_without(self, identity: FileId) -> None:
        """Remember that there is no TLS in a file."""
        self._forget(identity)
        if len(self._without) >= FILES_MAX:
            self._without.pop(next(iter(self._without)))
            self.forgotten += 1
        self._without[identity[:2]] = identity[2]

    def _forget(self, identity: FileId) -> None:
        file = self.files.pop(identity, None)
        if file is None:
            return
        file.waits = False
        self.detach(file)
        same = self._by_inode[identity[:2]]
        same.discard(identity)
        if not same:
            del self._by_inode[identity[:2]]

    def _evict(self, owner: int | None = None, *, probed: bool = False) -> bool:
        """Forget the file that nobody ran for longest, of an owner's or of who has most."""
        if owner is None:
            counts = Counter(file.owner for file in self.files.values())
            owner = max(counts, key=lambda each: counts[each], default=0)
        if time.monotonic() - self._used_at > USED_S:
            self._used = {identity[:2] for identity in self.used()}
            self._used_at = time.monotonic()
        for identity, file in self.files.items():
            if file.owner != owner or identity[:2] in self._used or file.searching:
                continue
            if file.probes or not probed:
                self._forget(identity)
                return True
        return False

    # --- attaching ------------------------------------------------------------------------------

    def attach_linker(self, path: str) -> FileId | None:
        """Probe a dynamic linker: every library that it maps is then reported at once."""
        return self.look_at(path, path, SearchPriority.LIBRARY)

    def is_probed_linker(self, linker: FileId) -> bool:
        """Whether this dynamic linker (a container's perhaps) is probed: its mappings are news."""
        file = self.files.get(linker)
        return bool(file and file.probes and file.is_linker)

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
        self._remove_probes(file, [probed])
        probed.not_http = True
        probed.give_up(reason)
        file.library = _together(file.libraries)

    def learned(self, number: int, offset: int) -> None:
        """The kernel knows where a file's library keeps names, or (0) that it was wrong."""
        self._names.learned(number, offset)

    def _take_library(self, job: Job, file: File, library: Library) -> bool:
        """What is in a file; True unless it has to wait for its turn to be attached to."""
        file.priority = None
        if file.probes:
            if library == file.library:
                file.written = _written(os.fstat(job.fd))
                self._have_held(job.identity, file)
                return True
            self.detach(file)
        file.library, file.libraries = library, libraries_in(library)
        if not library.probes or self._finishing:
            return True
        file.waits = True
        if self._is_time() and not self._turns.waits(file.owner) and self._may(job):
            self._attach_in_turn(job, file)
            return True
        if not self._turns.affords(file.owner, _probes_in(library), job.priority):
            self.over_limit += 1
        waiting = replace(job, fd=os.dup(job.fd))
        if not self._turns.put(waiting):
            os.close(waiting.fd)
            self.over_limit += 1
            self._forget(job.identity)  # it is looked at again when it is met again
        return False

    def _attach_in_turn(self, job: Job, file: File) -> None:
        began = time.monotonic()
        self._turns.spend(file.owner, self._probes_of(job) or 0)
        file.waits = False
        if job.priority is not SearchPriority.AHEAD and not file.is_linker:
            self.before_attaching(job.identity)
        self._attach(job.identity, file, job.fd)
        self._turn_s += time.monotonic() - began

    def _is_time(self) -> bool:
        return self._turn_s < TURN_S

    def _may(self, job: Job) -> bool:
        """Whether a file may be attached to now: not while probes of it are on their way out."""
        if self._closer.removing(job.identity[:2]) or (job.owner and self._closer.full):
            return False
        return self._turns.affords(job.owner, self._probes_of(job) or 0, job.priority)

    def _probes_of(self, job: Job) -> int | None:
        """How many probes a file waits for; None when it does not wait any more."""
        file = self.files.get(job.identity)
        if file is None or not file.waits or file.library is None:
            return None
        return _probes_in(file.library)

    def _attach(self, identity: FileId, file: File, fd: int) -> None:
        """Attach to a file, if instructions begin at its offsets (`placement.py`)."""
        assert file.library is not None
        with contextlib.suppress(OSError, ElfError):
            file.code, file.written = code_digest(fd, file.library), _written(os.fstat(fd))
        file.failure = None
        if not self._makes_room(file.owner, _probes_in(file.library)):
            self.over_limit += 1
            file.failure = f"its owner's files have as many probes as one owner may have; {INSTEAD}"
            return
        for probed in file.libraries:
            if probed.library.probes:
                probed.failure = self._attach_library(file, probed, fd)
        if file.probes and _identity(os.fstat(fd)) != identity and not _is_as_it_was(file, fd):
            file.failure = "the file changed while it was being probed"
            self.detach(file)
        elif file.probes:
            self._have_held(identity, file)
            self._attached.add(identity)

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

    def take_attached(self) -> set[FileId]:
        """The files that got their probes since the last call, whatever they were found by."""
        attached, self._attached = self._attached & self.files.keys(), set()
        return attached

    def _makes_room(self, owner: int, count: int) -> bool:
        """Whether so many probes more are within limits, once files that nobody runs are left."""
        most = PROBES_OF_OWNER_MAX if owner else PROBES_OF_ROOT_MAX
        while self._probes[owner] + count > most:
            if not self._evict(owner, probed=True):
                return False
        while self._probes.total() + count > PROBES_ALL_MAX:
            if not self._evict(max(self._probes, key=lambda each: self._probes[each]), probed=True):
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
        self._probes[file.owner] += len(probes)
        return None

    def detach(self, file: File) -> None:
        """Remove the file's probes."""
        self._remove_probes(file, file.libraries)

    def _remove_probes(self, file: File, libraries: Sequence[ProbedLibrary]) -> None:
        """Remove those of some of its libraries."""
        held_as, file.held_as = file.held_as, ""
        if held_as:
            self._hold.drop(held_as)
        for probed in libraries:
            if probed.probes:
                self._closer.close(file.owner, file.inode, probed.probes)
                self._probes[file.owner] -= len(probed.library.probes)
                file.attached -= len(probed.library.probes)
                probed.probes = []
            self._release(probed)
        if file.probes and held_as:
            self._have_held(_held_identity(held_as), file)

    def _release(self, probed: ProbedLibrary) -> None:
        """Give the library's number back."""
        if probed.number:
            del self._by_number[probed.number]
            self._names.release(probed.number)
            probed.number = 0

    def drop_unused(self) -> None:
        """Detach from files that nobody in scope maps and that no path leads to any more."""
        used = {identity[:2] for identity in self.used()}
        for identity, file in list(self.files.items()):
            if identity[:2] in used or file.searching:
                continue
            try:
                if _identity(os.stat(file.path)) == identity:
                    continue
            except OSError:
                pass
            self._forget(identity)

    # --- searching ------------------------------------------------------------------------------

    @property
    def searching(self) -> bool:
        """True while files are being looked into or attached to, or wait for it."""
        return self._searches.busy or len(self._turns) > 0

    def due(self, now: float) -> float:
        """When to call `search` though nothing is readable."""
        due = self._searches.due(now)
        if len(self._turns):
            return now if self._turns.has_ready(self._may) else min(due, now + WAIT_S)
        return due

    def search(self) -> list[FileId]:
        """Begin and collect searches, and attach for a turn; what was found out since last time."""
        self._turn_s = 0.0
        found: list[FileId] = []
        for job in self._turns.ready(self._may):
            try:
                if (file := self.files.get(job.identity)) is not None:
                    self._attach_in_turn(job, file)
                    found.append(job.identity)
            finally:
                os.close(job.fd)
            if not self._is_time():
                break
        for job, text in self._searches.answers():
            try:
                if self._take(job, text):
                    found.append(job.identity)
            finally:
                os.close(job.fd)
        return found

    @property
    def quick_busy(self) -> bool:
        """True while files' symbols are looked at, or they attached to: it takes milliseconds."""
        return self._searches.quick_busy or self._turns.has_ready(self._may)

    def wait(self, seconds: float) -> None:
        """Until there may be something to `search`, no longer than that."""
        if len(self._turns):
            seconds = 0.0 if self._turns.has_ready(self._may) else min(seconds, WAIT_S)
        self._searches.wait(seconds)

    def close(self) -> None:
        """Remove all probes, and look into nothing any more."""
        for identity in list(self.files):
            self._forget(identity)
        self._turns.close()
        self._searches.close()
        self._closer.wait(CLOSE_S)

    def search_now(self, paths: Iterable[str], seconds: float) -> None:
        """Look at programs that wait to be run, and return when they are attached to, or not TLS.

        What is late is attached to late, and counted so.
        """
        deadline = time.monotonic() + seconds
        looked_at = (self.look_at(path, os.path.realpath(path)) for path in paths)
        asked = [identity for identity in looked_at if identity is not None]
        for identity in reversed(asked):
            self.hurry(identity)
        while (left := deadline - time.monotonic()) > 0 and any(map(self.is_searching, asked)):
            self.search()
            self.wait(min(left, 0.05))
        for identity in asked:
            self.calm(identity)

    def hurry(self, identity: FileId) -> None:
        """A process waits for this file's search: it comes before others of its owner's."""
        self._searches.hurry(identity)

    def calm(self, identity: FileId) -> None:
        """No process waits for it any more."""
        self._searches.calm(identity)

    def is_searching(self, identity: FileId) -> bool:
        """Whether a file is looked into, or waits for it or to be attached to."""
        file = self.files.get(identity)
        return file is not None and file.searching

    def finish(self, seconds: float) -> None:
        """Attach to nothing any more, but remember what searches under way find.

        Of files that a process ran: what nobody runs is searched for when there is a reason again.
        """
        self._finishing = True
        for identity, file in list(self.files.items()):
            if not file.searching:
                self._forget(identity)
        self._turns.close()
        self._searches.drop_ahead()
        deadline = time.monotonic() + seconds
        while self._searches.busy and (left := deadline - time.monotonic()) > 0:
            self.search()
            self.wait(min(left, 0.2))

    def _take(self, job: Job, text: str | None) -> bool:
        """Use an answer; False while the file is searched further."""
        file = self.files.get(job.identity)
        if file is None or file.priority is None:
            return False  # searched twice, once in the background; or written to meanwhile
        if text is None:
            if file.priority is job.priority:
                file.priority = None
                file.failure = f"the search in it ended without an answer; {INSTEAD}"
            return True
        library = None
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            library = library_from_json(text)
        if library is None:
            return self._nothing_found(job, file)
        if job.kind == SEARCH and _is_settled(job):
            self._known.remember(job.fd, library)
        if (
            file.priority is SearchPriority.AHEAD
            and library.probes
            and not self._is_worth_it(library)
        ):
            self._forget(job.identity)  # looked at again, and attached, when it is run
            return False
        return self._take_library(job, file, library)

    def _nothing_found(self, job: Job, file: File) -> bool:
        if file.priority is not job.priority:
            return False  # another search is on its way, for who cannot wait
        size = os.fstat(job.fd).st_size
        if job.kind != SEARCH and size >= STRUCTURE_FILE_BYTES_MIN:
            further = replace(job, kind=SEARCH)
            file.priority = None
            self._ask(further, file)
            if file.priority is None:  # too many wait: it is looked at again when it is met again
                self._forget(job.identity)
            return False
        if job.kind == SEARCH and _is_settled(job):
            self._known.remember_without(job.fd)
        self._keep_without(job.identity)
        return True


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


def _held_identity(name: str) -> FileId:
    """The file that the supervisor holds the probes of by this name."""
    device, inode, changed_ns = map(int, name[5:].split(":"))
    return device, inode, changed_ns


def _identity(found: os.stat_result) -> FileId:
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _written(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _is_settled(job: Job) -> bool:
    """Whether what was read is what the file holds now: nobody wrote to it meanwhile.

    The clock of change times may stand still for some milliseconds.
    """
    found = os.fstat(job.fd)
    return _identity(found) == job.identity and time.time_ns() - found.st_ctime_ns > SETTLED_NS


def _is_as_it_was(file: File, fd: int) -> bool:
    """Whether the functions are what they were when the file was attached to, and checked."""
    if not file.library or not file.code or _is_overlay(fd):
        return False
    with contextlib.suppress(OSError, ElfError):
        return code_digest(fd, file.library) == file.code and not _are_refused(fd, file.library)
    return False


def _are_refused(fd: int, library: Library) -> bool:
    """Whether root's check refuses what was found, in any library of the file."""
    return any(refusal(fd, each) for each in (library, *library.others))


def _probes_in(library: Library) -> int:
    """How many probes a file gets."""
    return sum(len(each.probes) for each in (library, *library.others))


def _together(libraries: Sequence[ProbedLibrary]) -> Library:
    """The inverse of `libraries_in`."""
    first, *others = (probed.library for probed in libraries)
    return replace(first, others=tuple(others))


def _is_overlay(fd: int) -> bool:
    """Whether a file lies in a container's layers."""
    about = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, about):
        return True  # unknown: the file is attached to anew
    return int.from_bytes(about.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) == OVERLAY


def allow_descriptors(count: int) -> None:
    """Have room for a descriptor for each probe and for each file that waits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
