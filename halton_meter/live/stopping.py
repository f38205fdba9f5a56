"""Stops processes of the user's at a limit, continues them, or ends them; Linux only.

It is done by whoever may signal them anyway: the metering worker, which runs as the user. No
process is signalled by its number alone. A descriptor of it is opened first (pidfd), and then its
start is looked at: one that began after the request that spent is another process that was given
the same number. Stopped are a process, what descends from it, and, where it is a job of a
terminal's, that job, as Ctrl-Z would; never a shell that waits for jobs, nor anything of ours.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from capture.processes import proc
from halton_meter.live.terminal import PLAIN_SCREEN
from halton_meter.spending.stops import ProcessId

ROUNDS_MAX = 20  # of looking for children that were forked while their parents were being stopped
PROCESSES_MAX = 4096
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Seen:
    """A process as /proc has it now."""

    pid: int
    parent: int
    group: int
    session: int
    terminal: int
    ticks: int
    has_ended: bool = False  # and waits for its parent to hear of it


def look_at(pid: int) -> _Seen | None:
    """A process by its number; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read(4096).rpartition(b")")[2].split()
        parent, group, session, terminal = map(int, fields[1:5])
        has_ended = fields[0] in (b"Z", b"X")
        return _Seen(pid, parent, group, session, terminal, int(fields[19]), has_ended)
    except (OSError, ValueError, IndexError):
        return None


def identity(pid: int) -> ProcessId:
    """What tells a living process from later ones of its number; (pid, 0) for one that is gone."""
    ticks = proc.started_ticks(pid)
    return pid, ticks or 0


def is_alive(process: ProcessId) -> bool:
    """Whether that process, and not another of its number, is there and has not ended.

    One that was killed is a zombie until its parent hears of it: it does nothing any more.
    """
    seen = look_at(process[0]) if process[1] > 0 else None
    return seen is not None and seen.ticks == process[1] and not seen.has_ended


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read(4096).rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False


def began_before(pid: int, at_ns: int) -> ProcessId | None:
    """The process of that number if it ran at that time already; None for a later one, or none.

    Numbers are unique among the living, so that is the one that had it then.
    """
    found = identity(pid)
    boot_ns = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return found if found[1] and boot_ns + found[1] * _TICK_NS <= at_ns + _TICK_NS else None


class Stopper:
    """Processes that were stopped together; holds a descriptor of each."""

    def __init__(self, keep: Collection[int] = ()) -> None:
        self._keep = {os.getpid(), os.getppid(), 0, 1, *keep}
        self._fds: dict[ProcessId, int] = {}
        self.refused: set[int] = set()  # that we may not signal: another user's

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """Those that are stopped, in the order in which they were."""
        return tuple(self._fds)

    def adopt(self, processes: Iterable[ProcessId]) -> None:
        """Take over what another has stopped; nobody is signalled."""
        for process in processes:
            if process in self._fds or len(self._fds) >= PROCESSES_MAX:
                continue
            if (fd := _open_alive(process)) is not None:
                self._fds[process] = fd

    def stop_again(self) -> None:
        """Send all of them SIGSTOP once more: somebody may have continued them."""
        for fd in self._fds.values():
            self._send(fd, signal.SIGSTOP)

    def stop(self, roots: Iterable[ProcessId]) -> int:
        """Stop these and all that descends from them; how many were stopped by this call.

        Parents first, so that none hears of a child that stopped; again and again until no new
        child is found, as a process that is stopped forks no more.
        """
        known = list(roots)
        before = len(self._fds)
        for process in known:
            self._signal_new(process)
        for _ in range(ROUNDS_MAX):
            alive = [pid for pid, _ in known if identity(pid) in self._fds]
            found = {identity(each) for pid in alive for each in proc.descendants(pid)}
            fresh = [
                each for each in found if each not in self._fds and each[0] not in self.refused
            ]
            stopped = [self._signal_new(each) for each in fresh]
            if not any(stopped):
                break
        return len(self._fds) - before

    def _signal_new(self, process: ProcessId) -> bool:
        pid, ticks = process
        if process in self._fds:  # it may have been continued by somebody
            return self._send(self._fds[process], signal.SIGSTOP) and False
        if pid in self._keep or not ticks or len(self._fds) >= PROCESSES_MAX:
            return False
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            return False
        if proc.started_ticks(pid) != ticks:  # after it was opened: this is what the fd is of
            os.close(fd)
            return False
        if not self._send(fd, signal.SIGSTOP):
            os.close(fd)
            self.refused.add(pid)
            return False
        self._fds[process] = fd
        return True

    @staticmethod
    def _send(fd: int, number: int) -> bool:
        try:
            signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return True

    def signal(self, number: int) -> None:
        """Send all of them a signal, children first."""
        for fd in reversed(self._fds.values()):
            self._send(fd, number)

    def resume(self) -> None:
        """Let all of them go on, and draw their screens anew."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGWINCH)
        self.close()

    def end(self) -> None:
        """Ask all of them to end; they get a moment (`kill`)."""
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End those that are still there."""
        self.signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Let go of their descriptors."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def job_of(process: ProcessId, keep: Collection[int] = ()) -> list[ProcessId]:
    """The processes to stop with one that spends: the job of a terminal that it belongs to.

    A job is a process group that a terminal's shell made: its leader is not the session's. Without
    a terminal, or in the shell's own group, it is the process alone.
    """
    seen = look_at(process[0])
    if seen is None or seen.ticks != process[1] or not seen.terminal or seen.group == seen.session:
        return [process]
    alike = []
    for pid in proc.all_pids():
        other = look_at(pid)
        if (
            other is not None
            and pid not in keep
            and (other.group, other.session) == (seen.group, seen.session)
        ):
            alike.append((pid, other.ticks))
    # The leader first: it is the one that waits for the others.
    return sorted(alike, key=lambda each: (each[0] != seen.group, each[0])) or [process]


def may_pause(pid: int, root: int | None) -> bool:
    """Whether nobody but us takes notice when a process is stopped for some milliseconds.

    A shell with job control would take its terminal back from a job that stops, and a debugger is
    told of it. So it must be in the process group of the run that it is of (`root`), which no shell
    has put it into a job of its own of; or it has no terminal and leads its group's session.
    """
    seen = look_at(pid)
    if seen is None or seen.has_ended or proc.tracer_of(pid) != 0:
        return False
    top = None if root is None else look_at(root)
    if top is not None:
        return (seen.group, seen.session) == (top.group, top.session)
    return not seen.terminal and seen.group == seen.session


def resume_all(processes: Sequence[ProcessId]) -> int:
    """Continue processes that somebody else had stopped; how many of them are still there."""
    found = 0
    for process in processes:
        if (fd := _open_alive(process)) is None:
            continue
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(fd, signal.SIGCONT)
            signal.pidfd_send_signal(fd, signal.SIGWINCH)
            found += 1
        os.close(fd)
    return found


def _open_alive(process: ProcessId) -> int | None:
    """A descriptor of that process; None where it is not there. The file may name any number."""
    if not is_alive(process):
        return None
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(process[0])
        if is_alive(process):  # after it was opened: this is what the descriptor is of
            return fd
        os.close(fd)
    return None


def say_on_terminal(pid: int, text: str) -> bool:
    """Print a line on the terminal of a process of ours; False where it has none that we may use.

    Modes that a stopped program has left on are turned off: its mouse, its other screen.
    """
    for number in (2, 1, 0):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/{pid}/fd/{number}")
            if not path.startswith(("/dev/pts/", "/dev/tty")):
                continue
            there = os.stat(path)
            if there.st_rdev != os.stat(f"/proc/{pid}/fd/{number}").st_rdev:
                continue
            fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(fd, f"{PLAIN_SCREEN}\r\n{text}\r\n".encode())
            finally:
                os.close(fd)
            return True
    return False
