"""The files that processes in scope run: each looked into once, and probed where it speaks TLS.

Root searches no file here: it opens regular files (`file.py`), hands their descriptors to a process
without privileges (`searches.py`), and has what that process finds, or what is remembered
(`known_files.py`), probed (`probes.py`) after a check of its own (`placement.py`). The table of
files is bounded: each owner's files that nobody ran for longest go first, and what found no room is
counted (`over_limit`). Time is bounded, too: attaching stops when a turn is over, owners take turns
(`turns.py`), and a thread removes probes (`closing.py`). This file decides nothing about processes
or scope.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from capture.functions.finder_protocol import (
    INSPECT,
    LINKER,
    NO_ANSWER,
    SEARCH,
    STRUCTURE_FILE_BYTES_MIN,
    library_from_json,
)
from capture.functions.library import Library
from capture.functions.stacks import INSTEAD, STACKS
from capture.helper.files.file import File, identity_of, open_regular, written
from capture.helper.files.known_files import KnownFiles
from capture.helper.files.name_locations import NameLocations
from capture.helper.files.owners import owner_of
from capture.helper.files.probed_library import libraries_in
from capture.helper.files.probes import Probes, are_refused, is_as_it_was, probes_in
from capture.helper.files.searches import FileId, Finder, Job, Searches, SearchPriority
from capture.helper.files.turns import WAIT_S, Turns
from capture.helper.handover import Hold

FILES_MAX = 20_000
"""Files without TLS that are remembered as such, some 150 bytes each."""
LIBRARIES_MAX = 2000
"""Files with TLS, or that wait to be looked into."""
AHEAD_MAX = 1000
"""Once so many files were looked at, those that nobody runs are only remembered."""
USED_S = 2.0
"""How old the list of files that processes map may be when room is made."""
TURN_S = 0.02
"""Of attaching, before processes are looked at again. One file is attached to in one go."""
SETTLED_NS = 100_000_000
"""How long ago a file was last written to, for what was found in it to be remembered."""
AGAIN_S, AGAIN_S_MAX = 60.0, 3600.0
"""After a search without an answer the file is searched again, when it is met; each time later."""
LINKER_PREFIX = "ld-"  # ld-linux-x86-64.so.2, ld-2.31.so, ld-musl-x86_64.so.1


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
        self._known = known
        self._finishing = False
        self._searches = Searches(epoll, finder)
        self._turns = Turns(self._probes_of)
        self._turn_s = 0.0  # spent on attaching since the last turn began
        # The least recently used first, in both.
        self.files: dict[FileId, File] = {}
        self._without: dict[tuple[int, int], int] = {}  # device and inode: the change time
        self.used: Callable[[], set[FileId]] = set  # what processes map, as far as we know
        self.before_attaching: Callable[[FileId], None] = lambda identity: None
        self._used: set[tuple[int, int]] = set()
        self._used_at = float("-inf")
        self._by_inode: dict[tuple[int, int], set[FileId]] = {}
        self.over_limit = self.forgotten = 0
        self._attached: set[FileId] = set()  # since somebody asked
        self.probes = Probes(
            programs, names, hold or Hold(), lambda owner: self._evict(owner, probed=True)
        )
        for identity, file in self.probes.adopt():
            self._keep(identity, file)

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
            identity = identity_of(found)
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
        identity = identity_of(found)
        if self._is_done_with(identity, priority) or not stat.S_ISREG(found.st_mode):
            return identity
        kept = self._keep_probes(identity, fd)
        if kept and kept.written == written(found):
            return identity
        if kept is None:
            self._forget_other_content(identity)
        file = self.files.get(identity) or File(path, owner_of(found.st_uid))
        if identity not in self.files and self._known.is_without(fd):
            self._keep_without(identity)
            return identity
        library = self._known.recall(fd)
        if library is None or are_refused(fd, library):
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
            file.priority, file.failure, file.again_at = job.priority, None, None
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
        if searched is None and self.asks_again(identity[:2]):
            return priority is SearchPriority.AHEAD
        return searched is None or searched <= priority or searched is SearchPriority.LIBRARY

    def knows(self, identity: FileId) -> bool:
        """Whether the file was looked into, or will be."""
        return identity in self.files or self._without.get(identity[:2]) == identity[2]

    def knows_inode(self, inode: tuple[int, int]) -> bool:
        """The same by device and inode, whatever was written to it since."""
        return inode in self._by_inode or inode in self._without

    def is_known_without(self, path: str) -> bool:
        """Whether a search, perhaps an earlier run's, found no TLS in a file."""
        try:
            fd = open_regular(path)
        except OSError:
            return False
        try:
            return self._known.is_without(fd)
        finally:
            os.close(fd)

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
            if not is_as_it_was(file, fd) or identity_of(os.fstat(fd)) != identity:
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
        self.probes.rename(identity, file)

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
        self.probes.detach(file)
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

    def _take_library(self, job: Job, file: File, library: Library) -> bool:
        """What is in a file; True unless it has to wait for its turn to be attached to."""
        file.priority = None
        if file.probes:
            if library == file.library:
                file.written = written(os.fstat(job.fd))
                self.probes.have_held(job.identity, file)
                return True
            self.probes.detach(file)
        file.library, file.libraries = library, libraries_in(library)
        if not library.probes or self._finishing:
            return True
        file.waits = True
        if self._is_time() and not self._turns.waits(file.owner) and self._may(job):
            self._attach_in_turn(job, file)
            return True
        if not self._turns.affords(file.owner, probes_in(library), job.priority):
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
        if not self.probes.attach(job.identity, file, job.fd):
            self.over_limit += 1
        if file.probes:
            self._attached.add(job.identity)
        self._turn_s += time.monotonic() - began

    def _is_time(self) -> bool:
        return self._turn_s < TURN_S

    def _may(self, job: Job) -> bool:
        """Whether a file may be attached to now: not while probes of it are on their way out."""
        if self.probes.must_wait(job.identity[:2], job.owner):
            return False
        return self._turns.affords(job.owner, self._probes_of(job) or 0, job.priority)

    def _probes_of(self, job: Job) -> int | None:
        """How many probes a file waits for; None when it does not wait any more."""
        file = self.files.get(job.identity)
        if file is None or not file.waits or file.library is None:
            return None
        return probes_in(file.library)

    def take_attached(self) -> set[FileId]:
        """The files that got their probes since the last call, whatever they were found by."""
        attached, self._attached = self._attached & self.files.keys(), set()
        return attached

    def drop_unused(self) -> None:
        """Detach from files that nobody in scope maps and that no path leads to any more."""
        used = {identity[:2] for identity in self.used()}
        for identity, file in list(self.files.items()):
            if identity[:2] in used or file.searching:
                continue
            try:
                if identity_of(os.stat(file.path)) == identity:
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
        self.probes.close()

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
        if text is None or text == NO_ANSWER:
            if file.priority is job.priority:
                _not_answered(file)
            return True
        file.unanswered = 0
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

    def asks_again(self, inode: tuple[int, int]) -> bool:
        """Whether a search in the file ended without an answer, long enough ago to try another."""
        files = (self.files[each] for each in self._by_inode.get(inode, ()))
        now = time.monotonic()
        return any(file.again_at is not None and file.again_at <= now for file in files)

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


def _not_answered(file: File) -> None:
    """Its search was killed, had no memory, or took too long on a busy machine."""
    file.priority = None
    file.failure = f"the search in it ended without an answer; {INSTEAD}"
    file.again_at = time.monotonic() + min(AGAIN_S * 2**file.unanswered, AGAIN_S_MAX)
    file.unanswered += 1


def _is_settled(job: Job) -> bool:
    """Whether what was read is what the file holds now: nobody wrote to it meanwhile.

    The clock of change times may stand still for some milliseconds.
    """
    found = os.fstat(job.fd)
    return identity_of(found) == job.identity and time.time_ns() - found.st_ctime_ns > SETTLED_NS
