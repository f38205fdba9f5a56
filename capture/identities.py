"""Who processes are, remembered: what was learned while they lived is all that there will be.

/proc tells most (`processes.py`), but only as long as a process lives, and a `curl` may be gone
before the helper gets a turn. What the kernel copied at the exec (`on_exec` in probe.bpf.c) then
stands in: arguments, program, user, parent, HALTON_PROJECT. The working directory it cannot tell:
that is read before all else when an exec is heard of, and is unknown when even that was too late.
A pid has a life for each program that it ran, and a connection belongs to the life in which it was
made.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from capture.arguments import REDACTED, without_secrets
from capture.attachments import open_regular
from capture.processes import parents_of, project_in, read_process, started_ticks, user_name
from capture.protocol import Record
from halton_meter.model import Process

IDENTITY_S = 1.0
IDENTITIES_MAX = 4096
ARGUMENT_BYTES_MAX = 4 << 20  # of all that is remembered: one process may have 32 KB of them
LIVES_MAX = 4  # of one pid: a shell that becomes `env` that becomes the client
HEAD_BYTES = 256  # of a program: the kernel reads as much of its first line
_NEVER = float("-inf")


@dataclass(slots=True)
class _Life:
    """One program of a pid. `executed` is what the kernel told; None for those older than we."""

    executed: Record | None = None
    cwd: str | None = None
    process: Process | None = None
    read_at: float = _NEVER  # when /proc told, by the monotonic clock

    @property
    def since_ns(self) -> int:
        return self.executed.at_ns if self.executed else 0

    @property
    def argument_bytes(self) -> int:
        told = len(self.executed.data) if self.executed else 0
        return told + sum(map(len, self.process.argv if self.process else ()))


class Identities:
    """Bounded in number; the pid that was heard of longest ago is forgotten first."""

    def __init__(self) -> None:
        self._lives: OrderedDict[int, list[_Life]] = OrderedDict()
        self._added_bytes = 0  # since it was last counted what all have

    def executed(self, record: Record, cwd: str | None = None) -> None:
        """A process runs another program now, in that directory if it is known."""
        lives = self._lives_of(record.tgid)
        lives.append(_Life(record, cwd))
        del lives[:-LIVES_MAX]
        self._added(len(record.data))

    def of(self, pid: int, *, fresh: bool = False, at_ns: int | None = None) -> Process | None:
        """Who it is, or was at that (monotonic) time; None when nothing told.

        Read anew when what is known is older than IDENTITY_S, or for `fresh`.
        """
        lives = self._lives.get(pid) or [_Life()]
        life = lives[-1]
        if at_ns is not None and life.since_ns > at_ns:
            life = next((each for each in reversed(lives) if each.since_ns <= at_ns), life)
        if life is lives[-1]:
            self._read(pid, life, fresh)
        if life.process is None and life.executed is not None:
            life.process = process_as_executed(life.executed, life.cwd)
        return life.process

    def _read(self, pid: int, life: _Life, fresh: bool) -> None:
        now = time.monotonic()
        if not fresh and now - life.read_at < IDENTITY_S:
            return
        if life.executed is not None and _began_after(pid, life.executed.at_ns):
            return
        process = read_process(pid)
        if process is None or (not process.argv and (life.process or life.executed)):
            return  # gone, or a zombie: what we knew is better
        if process.argv:
            life.read_at = now
            if pid not in self._lives:
                self._lives_of(pid).append(life)
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
            del self._lives[pid]
            left -= size

    def _lives_of(self, pid: int) -> list[_Life]:
        if pid not in self._lives and len(self._lives) >= IDENTITIES_MAX:
            self._lives.popitem(last=False)
        return self._lives.setdefault(pid, [])

    def remember(self, process: Process) -> None:
        """What another helper knew, of one that may be gone by now."""
        if process.pid not in self._lives:
            self._lives_of(process.pid).append(_Life(process=process))

    def forget(self, pid: int, before_ns: int) -> None:
        """What it ran until then has ended; a program that it ran later is not forgotten."""
        lives = [life for life in self._lives.get(pid, ()) if life.since_ns > before_ns]
        if lives:
            self._lives[pid] = lives
        else:
            self._lives.pop(pid, None)


def process_as_executed(record: Record, cwd: str | None = None) -> Process:
    """What the kernel told at an exec, for a process that /proc does not know any more.

    `started_ns` is when it began to run this program.
    """
    uid = record.uid
    return Process(
        pid=record.tgid,
        started_ns=time.time_ns() - time.monotonic_ns() + record.at_ns,
        exe=program_of(record.path) or record.comm or None,
        argv=without_secrets(_arguments(record.data, record.length)),
        cwd=cwd,
        uid=uid,
        user=user_name(uid),
        parents=_parents(record),
        project_hint=project_in(record.project),
    )


def _arguments(raw: bytes, length: int) -> Sequence[str]:
    *whole, rest = raw.split(b"\0")
    arguments = [part.decode("utf-8", "replace") for part in whole]
    # Half of a prompt is no argument that anybody gave, and half of a key is not known for one.
    return [*arguments, REDACTED] if rest or len(raw) < length else arguments


def program_of(path: str) -> str | None:
    """The program that an exec of this path runs, as /proc would name it: of a script, its
    interpreter. None where the path alone does not tell."""
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
    ticks = started_ticks(pid)
    if ticks is None:
        return True
    hertz = os.sysconf("SC_CLK_TCK")
    asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return (ticks - 1) * (1_000_000_000 // hertz) > at_ns + asleep_ns
