"""The files that processes in scope run: each looked at once, and probed where it speaks TLS.

By symbol at once; by memory (`known_files.py`) at once, too; else by structure, in another process
without privileges (`python -m capture.libraries`). Programs are searched before shared libraries,
and those before files that nobody runs yet. This file decides nothing about processes or scope.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

from capture import libraries, loader
from capture.elf import ElfError
from capture.keeper import Hold
from capture.known_files import KnownFiles
from capture.name_places import NAMING, PLACES_MAX, UNPROVED, NamePlaces

LINKERS_MAX = 64
FILES_MAX = 20_000
FINDER_BYTES_MAX = 1 << 20
AHEAD_MAX = 1000
"""Once so many files were looked at, those that nobody runs are only remembered."""

FileId = tuple[int, int, int]
"""Device, inode, change time: inode numbers are used again."""


class Haste(IntEnum):
    """Who waits for a search. Each kind has a finder of its own, so that none waits for another."""

    PROGRAM = 0
    LIBRARY = 1
    NOBODY = 2


# A client's first request may come half a second after its start; one search a program's life.
# At nobody's leisure nothing else is slowed.
_PRIORITIES = {Haste.PROGRAM: -5, Haste.LIBRARY: -5, Haste.NOBODY: 19}


@dataclass(slots=True)
class File:
    """A file that was looked at. `library` None: no TLS in it, unless it is still `searching`."""

    path: str
    library: libraries.Library | None = None
    probes: list[int] = field(default_factory=list)
    haste: Haste | None = None  # while it is searched
    failure: str | None = None
    doubted: bool = False  # what it passed was no HTTP
    place: int = 0  # its number, while it is attached to
    held_as: str = ""  # the supervisor's name for its probes

    @property
    def searching(self) -> bool:
        """True until the search by structure has answered."""
        return self.haste is not None


class _Finder:
    """One process that searches some files; their descriptors stay ours."""

    def __init__(self, files: list[tuple[FileId, int]], haste: Haste) -> None:
        self.haste = haste
        self.files = deque(files)
        self._text = b""
        self._read_bytes = 0
        fds = [fd for _, fd in files]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-m", "capture.libraries", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        with contextlib.suppress(OSError):
            # At once: at the helper's own priority, two of them would keep it from every process
            # that lives for milliseconds.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _PRIORITIES[haste])
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)

    def fileno(self) -> int:
        """Readable when an answer has come, or the end."""
        return self._stdout.fileno()

    def answers(self) -> list[tuple[FileId, int, str]]:
        """(file, descriptor, line) for each answer since the last call; each is handed out once."""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.fileno(), 1 << 16):
                self._read_bytes += len(more)
                self._text += more
                if self._read_bytes > FINDER_BYTES_MAX:
                    self._process.kill()
                    break
        *lines, self._text = self._text.split(b"\n")
        return [
            (*self.files.popleft(), line.decode("utf-8", "replace")) for line in lines if self.files
        ]

    @property
    def ended(self) -> bool:
        """True once the process is gone and its answers are read."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Give up what it did not answer."""
        self._stdout.close()
        for _, fd in self.files:
            os.close(fd)


class Attachments:
    """See the file's head. `ready` registers finders with the caller's epoll."""

    def __init__(
        self,
        programs: Mapping[str, int],
        known: KnownFiles,
        names: NamePlaces,
        epoll: select.epoll | None = None,
        hold: Hold | None = None,
    ) -> None:
        self._programs = programs
        self._known = known
        self._names = names
        self._has_cookies = True
        self._epoll = epoll
        self.files: dict[FileId, File] = {}
        self._waiting: dict[Haste, deque[tuple[FileId, int]]] = {haste: deque() for haste in Haste}
        self._finders: dict[Haste, _Finder] = {}
        self._places: dict[int, File] = {}
        # By device and inode: the probe that hears a dynamic linker, None where there can be none.
        self.linkers: dict[tuple[int, int], int | None] = {}
        self._hold = hold or Hold()
        self._adopt()

    # --- what outlives us -----------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the files that a helper before us has attached to."""
        for name, held in self._hold.take_all("file:"):
            library = libraries.library_from_json(held.about["library"])
            if library is None or len(held.fds) != len(library.probes):
                held.close()  # it died while it attached: attached anew when it is looked at
                self._hold.drop(name)
                continue
            place = int(held.about["place"])
            file = File(held.about["path"], library, held.fds, place=place, held_as=name)
            device, inode, changed_ns = map(int, name[5:].split(":"))
            self.files[device, inode, changed_ns] = file
            if place:
                self._places[place] = file
                self._names.adopt(place)
        for name, held in self._hold.take_all("linker:"):
            device, inode = map(int, name[7:].split(":"))
            self.linkers[device, inode] = held.fds[0]

    def _keep(self, file: File, fd: int) -> None:
        assert file.library is not None
        device, inode, changed_ns = _identity(os.fstat(fd))
        file.held_as = f"file:{device}:{inode}:{changed_ns}"
        library = libraries.library_json(file.library)
        about = {"path": file.path, "library": library, "place": file.place}
        self._hold.keep(file.held_as, about, file.probes)

    # --- looking --------------------------------------------------------------------------------

    def look_at(self, link: str, path: str) -> FileId | None:
        """The file's identity, once looked at; None when it cannot be opened."""
        try:
            found = os.stat(link)
            identity = _identity(found)
            if self._is_done_with(identity):
                return identity
            fd = open_regular(link)
        except OSError:
            return None
        haste = Haste.LIBRARY if ".so" in os.path.basename(path) else Haste.PROGRAM
        try:
            return self.look_into(fd, path, haste)
        finally:
            os.close(fd)

    def look_into(self, fd: int, path: str, haste: Haste = Haste.PROGRAM) -> FileId:
        """The same for an open file, which stays the caller's. Attaches if it is known by now.

        With `Haste.NOBODY` it is attached ahead of its first run: in a process that runs already
        the kernel may take 150 ms for the first probe, and a short program is over by then.
        """
        found = os.fstat(fd)
        identity = _identity(found)
        if self._is_done_with(identity, haste) or not stat.S_ISREG(found.st_mode):
            return identity
        file = self.files.get(identity) or File(path)
        with contextlib.suppress(ElfError, OSError, ValueError, struct.error):
            library = libraries.inspect(fd) or self._known.recall(fd)
            if haste is Haste.NOBODY and library and not self._is_worth_it(library):
                return identity
            self.files[identity] = file
            if library:
                file.library, file.haste = library, None  # a search on its way is not waited for
                self._attach(file, fd)
            elif found.st_size >= libraries.STRUCTURE_FILE_BYTES_MIN:
                self._waiting[haste].append((identity, os.dup(fd)))
                file.haste = haste
        self.files.setdefault(identity, file)
        return identity

    def _is_worth_it(self, library: libraries.Library) -> bool:
        """Whether to attach to what nobody runs yet: Go has many programs, of many probes each."""
        return library.stack != "Go crypto/tls" and len(self.files) < AHEAD_MAX

    def _is_done_with(self, identity: FileId, haste: Haste = Haste.PROGRAM) -> bool:
        file = self.files.get(identity)
        if file is None:
            return len(self.files) >= FILES_MAX
        return file.haste is None or file.haste <= haste or file.haste is Haste.LIBRARY

    # --- attaching ------------------------------------------------------------------------------

    def attach_linker(self, path: str) -> bool:
        """Hear of every library that this dynamic linker maps; False when it cannot be."""
        try:
            fd = open_regular(path)
        except OSError:
            return False
        found = os.fstat(fd)
        identity = found.st_dev, found.st_ino
        try:
            hook = libraries.find_linker_hook(fd)
            if hook is not None and identity not in self.linkers:
                program, at = self._programs[hook.program], f"/proc/self/fd/{fd}"
                link = loader.attach_uprobe(program, at, hook.offset, at_return=False)
                self.linkers[identity] = link
                self._hold.keep(f"linker:{identity[0]}:{identity[1]}", True, [link])
        except (ElfError, OSError):
            pass
        finally:
            os.close(fd)
        return self.linkers.setdefault(identity, None) is not None

    def hears(self, linker: libraries.FileMapping) -> bool:
        """Whether we hear this dynamic linker, a container's perhaps: from now on if we can."""
        identity = linker.device, linker.inode
        if identity in self.linkers or len(self.linkers) >= LINKERS_MAX:
            return self.linkers.get(identity) is not None
        return self.attach_linker(linker.link)

    def doubt(self, place: int) -> str | None:
        """Remove the probes of the file whose bytes were no HTTP; say which file it was."""
        file = self._places.get(place)
        if file is None or file.library is None:
            return None
        self.detach(file)
        file.doubted = True
        reason = "what its functions passed was not HTTP: they were not recognised"
        file.library = replace(file.library, probes=(), reason=f"{reason}; {libraries.INSTEAD}")
        return file.path

    def learned(self, place: int, offset: int) -> None:
        """The kernel knows where a file's library keeps names, or (0) that it was wrong."""
        self._names.learned(place, offset)

    def _attach(self, file: File, fd: int) -> None:
        assert file.library is not None
        cookie = self._cookie(file, fd)
        if file.library.unproved and not cookie:
            file.failure = f"more than {PLACES_MAX} programs at once"
            return
        error = self._attach_probes(file, fd, cookie)
        if error and error.errno == errno.EINVAL and not file.library.unproved and file.place:
            # A kernel without cookies: names are then known by requests alone.
            self._has_cookies = False
            error = self._attach_probes(file, fd, 0)
        if error:
            file.failure = f"cannot attach: {error.strerror}"
            self.detach(file)
        elif file.probes:
            self._keep(file, fd)

    def _cookie(self, file: File, fd: int) -> int:
        """What the probes are told: Go's offsets, or the file's number and whether it is proved."""
        library = file.library
        assert library is not None
        names = any(probe.program in NAMING for probe in library.probes)
        if not library.unproved and not (names and self._has_cookies):
            return library.cookie
        file.place = self._names.number(fd, library)
        if not file.place:
            return 0
        self._places[file.place] = file
        return file.place | (UNPROVED if library.unproved else 0)

    def _attach_probes(self, file: File, fd: int, cookie: int) -> OSError | None:
        """All of them, or none."""
        assert file.library is not None
        for program, offset, at_return in file.library.probes:
            try:
                probe = loader.attach_uprobe(
                    self._programs[program],
                    f"/proc/self/fd/{fd}",
                    offset,
                    at_return=at_return,
                    cookie=cookie,
                )
            except OSError as error:
                self._remove_probes(file)
                return error
            file.probes.append(probe)
        return None

    def detach(self, file: File) -> None:
        """Remove the file's probes."""
        self._remove_probes(file)
        if file.place:
            del self._places[file.place]
            self._names.release(file.place)
            file.place = 0

    def _remove_probes(self, file: File) -> None:
        for probe in file.probes:
            os.close(probe)
        file.probes = []
        if file.held_as:
            self._hold.drop(file.held_as)
            file.held_as = ""

    def drop_unused(self, used: Iterable[FileId]) -> None:
        """Detach from files that nobody in scope maps and that no path leads to any more."""
        used = set(used)
        for identity, file in list(self.files.items()):
            if identity in used or file.searching:
                continue
            try:
                found = os.stat(file.path)
                if (found.st_dev, found.st_ino) == identity[:2]:
                    continue
            except OSError:
                pass
            self.detach(file)
            del self.files[identity]

    # --- searching ------------------------------------------------------------------------------

    @property
    def searching(self) -> bool:
        """True while files without symbols are being looked at, or wait for it."""
        return bool(self._finders) or any(self._waiting.values())

    def search(self) -> list[FileId]:
        """Start and collect searches; the files found out about since the last call."""
        found: list[FileId] = []
        for haste, finder in list(self._finders.items()):
            ended = finder.ended
            for identity, fd, line in finder.answers():
                self._take(identity, fd, line, haste)
                os.close(fd)
                found.append(identity)
            if ended:
                self._end(finder)
        for haste, waiting in self._waiting.items():
            if waiting and haste not in self._finders:
                count = min(len(waiting), libraries.FILES_A_SEARCH_MAX)
                finder = _Finder([waiting.popleft() for _ in range(count)], haste)
                self._finders[haste] = finder
                if self._epoll:
                    self._epoll.register(finder.fileno(), select.EPOLLIN)
        return found

    def search_now(self, path: str, seconds: float) -> None:
        """Look at a program that waits to be run, and return when it is attached, or not TLS."""
        deadline = time.monotonic() + seconds
        identity = self.look_at(path, os.path.realpath(path))
        while identity in self.files and self.files[identity].searching:
            self.search()
            finders = list(self._finders.values())
            left = deadline - time.monotonic()
            if left <= 0:
                return  # it is attached late then, and counted so
            # Readable at its end as well, which comes before it can be waited for.
            select.select(finders, [], [], min(left, 0.05))

    def _take(self, identity: FileId, fd: int, line: str, haste: Haste) -> None:
        file = self.files.get(identity)
        if file is None or file.haste is None:
            return  # searched twice, once in no haste
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            library = libraries.library_from_json(line)
            if library and library.probes:
                self._known.remember(fd, library)
                if file.haste is Haste.NOBODY and not self._is_worth_it(library):
                    del self.files[identity]  # looked at again, and attached, when it is run
                    return
                file.library = library
                self._attach(file, fd)
            elif library:
                file.library = library
            elif file.haste is not haste:
                return  # the other search is still on its way
        file.haste = None

    def _end(self, finder: _Finder) -> None:
        """Its end came early at the first file that it did not answer; the others wait again."""
        for number, (identity, fd) in enumerate(finder.files):
            file = self.files.get(identity)
            if file is None or file.haste is not finder.haste:
                continue
            if number:
                self._waiting[finder.haste].append((identity, os.dup(fd)))
            else:
                file.haste = None
                file.failure = f"the search in it ended without an answer; {libraries.INSTEAD}"
        if self._epoll:
            self._epoll.unregister(finder.fileno())
        finder.close()
        del self._finders[finder.haste]


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


def _identity(found: os.stat_result) -> FileId:
    return found.st_dev, found.st_ino, found.st_ctime_ns
