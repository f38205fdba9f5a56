"""Remembers who processes are: once a process exits, only what is recorded here is available.

/proc has most of it (`processes/proc.py`), but only while a process lives, and a `curl` may exit
before the helper gets a turn. Then what the kernel copied at the exec (`on_exec` in probe.bpf.c) is
used: arguments, program, user, parent, HALTON_PROJECT. The kernel does not copy the working
directory: it is read first of all after the news of an exec, and is unknown if that was too late.

A pid has a life for each program that it ran, and for each process that had its number; the kernel
may give that again within a second. A connection belongs to the life in whose time it was made, and
never to one of another process: its OPEN has the time when its process was forked. Where no life
is known for that time, the answer is None, not the nearest one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from capture.helper.files.file import open_regular
from capture.processes.arguments import REDACTED, without_secrets
from capture.processes.proc import (
    PARENTS_MAX,
    parents_of,
    project_in,
    read_process,
    root_name,
    started_ticks,
    user_name,
    working_directory,
)
from capture.processes.roots import Ancestor
from capture.protocol import NOT_KNOWN, Birth, Record
from halton_meter.model import Process

IDENTITY_S = 1.0
IDENTITIES_MAX = 4096
ARGUMENT_BYTES_MAX = 4 << 20  # of all that is remembered: one process may have 32 KB of them
LIVES_MAX = 8192  # of all pids
# How long a life is kept that another has followed: its connections lie in the ring, until then.
LIFE_KEPT_NS = 30_000_000_000
ENDED_KEPT_S = 5.0
LIVES_OF_ONE_MAX = 64  # in that time: a shell that becomes `env` that becomes the client, and so on
HEAD_BYTES = 256  # of a program: the kernel reads as much of its first line
_NEVER = float("-inf")


@dataclass(slots=True)
class _Life:
    """One program of a process, from `since_ns` (0: from before we looked) to the next one's.

    `executed` is the kernel's record; None where no exec was recorded.
    """

    since_ns: int = 0
    executed: Record | None = None
    cwd: str | None = None
    process: Process | None = None
    read_at: float = _NEVER  # when /proc was read, by the monotonic clock

    def is_of(self, born_ns: int) -> bool:
        """Whether it is of the process that was forked then."""
        # /proc has the start of a process in ticks: off by one at most.
        slack_ns = 0 if self.executed else 2 * _tick_ns()
        return self.since_ns >= born_ns - slack_ns

    @property
    def argument_bytes(self) -> int:
        recorded = len(self.executed.data) if self.executed else 0
        return recorded + sum(map(len, self.process.argv if self.process else ()))


class Identities:
    """Bounded in number; the pid with the oldest news is forgotten first.

    `has_news` answers whether an exec of a process waits in the ring: what /proc then has of it is
    the new program's.
    """

    def __init__(self, has_news: Callable[[int], bool] = lambda pid: False) -> None:
        self._has_news = has_news
        self._lives: OrderedDict[int, list[_Life]] = OrderedDict()
        self._count = 0
        self._added_bytes = 0  # since it was last counted what all have
        self._ended: deque[tuple[float, int, int]] = deque(maxlen=LIVES_MAX)

    def executed(self, record: Record, cwd: str | None = None) -> None:
        """A process runs another program now, in that directory if it is known."""
        self._add(record.tgid, _Life(record.at_ns, record, cwd))
        self._added(len(record.data))

    def of(
        self, pid: int, *, fresh: bool = False, at_ns: int | None = None, birth: Birth = NOT_KNOWN
    ) -> Process | None:
        """Who it is, or was at that (monotonic) time; None when that is not known.

        `birth` is of the process that had the number then. Where it has ended and ran no program
        of its own, it is what its parent was. Read anew when what is known is older than
        IDENTITY_S, or for `fresh`.
        """
        life = self._life_now(pid) if at_ns is None else self._life_at(pid, at_ns, birth.at_ns)
        if life is None:
            return self._as_forked(pid, birth)
        lives = self._lives.get(pid)
        if lives is None or life is lives[-1]:
            self._read(pid, life, fresh, at_ns)
        if life.process is None and life.executed is not None:
            life.process = self._as_executed(life, lives or [])
        elif life.process is None or not (life.process.exe or life.process.argv):
            life.process = self._as_forked(pid, birth) or life.process
        return life.process

    def _as_forked(self, pid: int, birth: Birth) -> Process | None:
        """A fork that is gone, or a zombie, by what its parent was when it made it.

        A parent that is gone, too, and was a fork itself, was what that was whose program it had.
        """
        if not birth.parent or birth.parent == pid:
            return None
        own_birth = Birth(birth.parent_ns)
        if birth.program not in (0, birth.parent):
            # Those between its parent and `program` are not known: it stands for them.
            own_birth = Birth(birth.parent_ns, birth.program, None, birth.program, birth.left_ns)
        made_ns = birth.left_ns if birth.program == birth.parent else birth.at_ns
        parent = self.of(birth.parent, at_ns=made_ns or birth.at_ns, birth=own_birth)
        if parent is None or not (parent.exe or parent.argv):
            return None
        name = os.path.basename(parent.exe) if parent.exe else ""
        forked = replace(
            parent,
            pid=pid,
            started_ns=_wall_ns(birth.at_ns),
            uid=parent.uid if birth.uid is None else birth.uid,
            user=parent.user if birth.uid is None else user_name(birth.uid),
            parents=((parent.pid, name), *parent.parents)[:PARENTS_MAX],
        )
        if birth.at_ns and pid not in self._lives:
            # What its parent was may be forgotten when this is asked for again.
            self._add(pid, _Life(birth.at_ns, process=forked))
        return forked

    @staticmethod
    def _as_executed(life: _Life, lives: Sequence[_Life]) -> Process:
        """The kernel's record; the parents known before the exec where it has none.

        It knows those of processes that were in scope when they were forked.
        """
        assert life.executed is not None
        process = process_as_executed(life.executed, life.cwd)
        for before in reversed(lives[: lives.index(life)] if life in lives else ()):
            if before.process is not None and not process.parents and before.executed is None:
                return replace(process, parents=before.process.parents)
        return process

    def _life_at(self, pid: int, at_ns: int, born_ns: int) -> _Life | None:
        """The life in whose time that was; None when only others are known."""
        lives = self._lives.get(pid)
        if not lives:
            return _Life(born_ns)
        life = next((each for each in reversed(lives) if each.since_ns <= at_ns), None)
        if born_ns and (life is None or not life.is_of(born_ns)):
            # It ran no program of its own: it is a fork of another one.
            life = _Life(born_ns)
            if lives[-1].since_ns < born_ns:
                self._add(pid, life)
            else:  # others have followed: nothing can be learned of it any more
                return None
        return life

    def _life_now(self, pid: int) -> _Life:
        lives = self._lives.get(pid)
        began_ns = _began_ns(pid)
        if not lives:  # what was before it had the number is not its own
            return _Life(0 if began_ns is None else max(0, began_ns - _tick_ns()))
        if began_ns is not None and lives[-1].since_ns and _is_after(began_ns, lives[-1].since_ns):
            self._add(pid, _Life(began_ns))  # another process, that ran no program of its own
        return self._lives[pid][-1]

    def _read(self, pid: int, life: _Life, fresh: bool, at_ns: int | None) -> None:
        now = time.monotonic()
        if not fresh and now - life.read_at < IDENTITY_S:
            return
        limit_ns = life.since_ns or at_ns
        if limit_ns and _began_after(pid, limit_ns):
            return
        process = read_process(pid)
        if process is not None and self._has_news(pid):
            return
        if process is None or (not process.argv and (life.process or life.executed)):
            return  # gone, or a zombie: what we knew is better
        if process.argv:
            life.read_at = now
            if pid not in self._lives:
                self._add(pid, life)
        if life.process is not None and life.process.root is not None:
            # As it was first seen: a parent that has ended since is no other session.
            process = replace(process, root=life.process.root)
        life.process = process
        self._added(sum(map(len, process.argv)))

    def _added(self, count: int) -> None:
        """Forget the oldest where arguments take more than they may; counted once in a while."""
        self._added_bytes += count
        if self._added_bytes < ARGUMENT_BYTES_MAX // 4:
            return
        self._added_bytes = 0
        sizes = {
            pid: sum(each.argument_bytes for each in lives) for pid, lives in self._lives.items()
        }
        left = sum(sizes.values())
        for pid, size in sizes.items():
            if left <= ARGUMENT_BYTES_MAX:
                break
            self._count -= len(self._lives.pop(pid))
            left -= size

    def _add(self, pid: int, life: _Life) -> None:
        if pid not in self._lives and len(self._lives) >= IDENTITIES_MAX:
            self._drop_oldest_pid()
        lives = self._lives.setdefault(pid, [])
        self._lives.move_to_end(pid)
        lives.append(life)
        self._count += 1
        over = max(0, len(lives) - LIVES_OF_ONE_MAX)
        while over < len(lives) - 1 and lives[over + 1].since_ns < life.since_ns - LIFE_KEPT_NS:
            over += 1
        del lives[:over]
        self._count -= over
        while self._count > LIVES_MAX:
            self._drop_oldest_pid()

    def _drop_oldest_pid(self) -> None:
        _, lives = self._lives.popitem(last=False)
        self._count -= len(lives)

    def forget(self, pid: int, before_ns: int) -> None:
        """What it ran until then has ended; a program that it ran later is not forgotten.

        It is kept for a moment: a fork of it may be heard of only now, and be gone as well.
        """
        now = time.monotonic()
        self._ended.append((now, pid, before_ns))
        while self._ended and self._ended[0][0] <= now - ENDED_KEPT_S:
            self._drop_ended(*self._ended.popleft()[1:])

    def _drop_ended(self, pid: int, before_ns: int) -> None:
        known = self._lives.get(pid, [])
        lives = [life for life in known if life.since_ns > before_ns]
        self._count -= len(known) - len(lives)
        if lives:
            self._lives[pid] = lives
        else:
            self._lives.pop(pid, None)


def folder_of(record: Record) -> str | None:
    """Working directory of the process of an exec; None when it, or another of its pid, is gone."""
    folder = working_directory(record.tgid)
    return None if folder is None or _began_after(record.tgid, record.at_ns) else folder


def process_as_executed(record: Record, cwd: str | None = None) -> Process:
    """A process by the kernel's record of its exec, when /proc does not have it any more.

    `started_ns` is when it began to run this program.
    """
    uid = record.uid
    exe = program_of(record.path) or record.comm or None
    arguments = _arguments(record.data, record.length)
    parents = _parents(record)
    # Its own start is not known any more: that of its program is as good a name.
    parent = parents[0][0] if parents else 0
    own = Ancestor(record.tgid, record.at_ns // _tick_ns(), parent, exe, arguments)
    return Process(
        pid=record.tgid,
        started_ns=_wall_ns(record.at_ns),
        exe=exe,
        argv=without_secrets(arguments),
        cwd=cwd,
        uid=uid,
        user=user_name(uid),
        parents=parents,
        project_hint=project_in(record.project),
        root=root_name(own),
    )


def _arguments(raw: bytes, length: int) -> Sequence[str]:
    *whole, rest = raw.split(b"\0")
    arguments = [part.decode("utf-8", "replace") for part in whole]
    # Half of a prompt is no argument that anybody gave, and half of a key is not known for one.
    return [*arguments, REDACTED] if rest or len(raw) < length else arguments


def program_of(path: str) -> str | None:
    """The program that an exec of this path runs, as /proc would name it: of a script, its
    interpreter. None where the path alone does not show it."""
    if not path.startswith("/") or path.startswith(("/dev/fd/", "/proc/")):
        return None
    head = b""
    with contextlib.suppress(OSError), os.fdopen(open_regular(path), "rb", buffering=0) as file:
        head = file.read(HEAD_BYTES) or b""
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n")[0].split()
        return os.path.realpath(os.fsdecode(words[0])) if words else None
    return os.path.realpath(path)


def _parents(record: Record) -> tuple[tuple[int, str], ...]:
    """From the parent at birth upwards, as far as it is still there."""
    parent = record.offset
    if not parent or _began_after(parent, record.at_ns):
        return ()
    return parents_of(parent)


def _began_after(pid: int, at_ns: int) -> bool:
    """Whether this is a later process with the same number, or none."""
    began_ns = _began_ns(pid)
    return began_ns is None or _is_after(began_ns, at_ns)


def _began_ns(pid: int) -> int | None:
    """When a process began, to the tick, by the monotonic clock; None when it is gone."""
    ticks = started_ticks(pid)
    if ticks is None:
        return None
    asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return ticks * _tick_ns() - asleep_ns


def _is_after(began_ns: int, at_ns: int) -> bool:
    return began_ns - _tick_ns() > at_ns


def _wall_ns(monotonic_ns: int) -> int:
    return time.time_ns() - time.monotonic_ns() + monotonic_ns


def _tick_ns() -> int:
    return 1_000_000_000 // os.sysconf("SC_CLK_TCK")
