"""The process of a connection whose packets were seen.

Who connects is told by the kernel in the moment of it, where we could ask it (`connectors.py`).
Else the process is looked for by its socket, while both are there. A connection may live for some
milliseconds, so the processes of the command are looked at first: those that had a connection
before, then all below the command. All others of the user are searched only where it matters, which
takes some 40 ms.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Iterator

from capture.processes.proc import children_of, read_process
from halton_meter.live.keylog.connectors import Connectors
from halton_meter.live.left_running import environment_of
from halton_meter.model import Process
from proxy_fallback.edge.client_socket import ClientSocket
from proxy_fallback.edge.owner import OwnerUnknown, owner_of, owner_pid

RECENT_MAX = 64
ARGUMENTS_BYTES = 4096  # that tell one program from the next
# Who connects for a moment only has just begun, as a rule; to look at so many takes 1 ms.
NEWEST = 8
PROCESSES_MAX = 4096
SOCKETS_MAX = 65_536


class Owners:
    """`root` is the command's process id, once it runs; `connectors` tells who connects.

    `told` stands in the environment of the command alone, by which its daemons are known.
    """

    def __init__(self, connectors: Connectors | None = None, told: bytes | None = None) -> None:
        self.root: int | None = None
        self._told = told
        self._daemons: OrderedDict[tuple[int, int], None] = OrderedDict()  # (pid, start)
        self._connectors = connectors
        self._command: Process | None = None
        self._arguments = b""
        self._found: OrderedDict[int, Process] = OrderedDict()  # the latest last

    def began(self, pid: int) -> None:
        """The command runs as this process."""
        self.root = pid
        self.look()

    def look(self) -> None:
        """Note what the command is by now: a wrapper becomes another program (`env`, `timeout`).

        Called often: it may have ended when somebody asks.
        """
        if self.root is None:
            return
        with contextlib.suppress(OSError), open(f"/proc/{self.root}/cmdline", "rb") as file:
            arguments = file.read(ARGUMENTS_BYTES)
            # In the middle of an exec there are none.
            if self._command is None or (arguments and arguments != self._arguments):
                self._arguments = arguments
                self._command = read_process(self.root) or self._command

    def likely(self) -> Process | None:
        """Whose a connection is that ended before it was looked at, and whose keys we have.

        It is of the command, which alone knows our key log: the one process of it that had other
        connections, or the command itself where there are several, or none.
        """
        self.look()
        of_command = [each for each in self._found.values() if self.is_of_command(each)]
        return of_command[0] if len(of_command) == 1 else self._command

    def find(
        self, client: tuple[str, int], server: tuple[str, int], search: bool, newest: int = 0
    ) -> Process | None:
        """The process that holds the socket from `client` to `server`; None: not found.

        With `search` all processes are looked at, else the command's and the `newest` so many.
        """
        if self._connectors is not None:
            told = self._connectors.find(client, server, wait=search)
            if told is not None:
                return self._remember(told)
            if self._connectors.sees and not search:  # asked again once it matters
                return None
        inode = None
        self.look()
        with contextlib.suppress(OwnerUnknown):
            found = owner_of(client, server)
            inode = found.inode if found else None
        if not inode:
            return None
        for pid in (*reversed(self._found), *self._tree(), *_newest(newest)):
            if _holds(pid, inode):
                return self._read(pid)
        other = owner_pid(ClientSocket(*client, server[1])) if search else None
        return None if other is None else self._read(other)

    def find_udp(self, client: tuple[str, int]) -> Process | None:
        """The process that holds the UDP socket at this port; None: not found."""
        inode, _ = udp_socket(client[1])
        if not inode:
            return None
        for pid in (*reversed(self._found), *self._tree(), *_newest(PROCESSES_MAX)):
            if _holds(pid, inode):
                return self._read(pid)
        return None

    def is_of_command(self, process: Process) -> bool:
        """Whether a process is the command's, or below it."""
        if self.root is None or process.pid == self.root or self._is_daemon(process):
            return True
        return self.root in {pid for pid, _ in process.parents}

    def _is_daemon(self, process: Process) -> bool:
        return (process.pid, process.started_ns) in self._daemons

    def _read(self, pid: int) -> Process | None:
        process = read_process(pid)
        return None if process is None else self._remember(process)

    def _note_daemon(self, process: Process) -> None:
        """Note one whose parents ended; now, as it may have ended when somebody asks."""
        if self._told is None or self.is_of_command(process):
            return
        own = environment_of(process.pid)
        above = (environment_of(pid) for pid, _ in process.parents)
        # One that has ended by now may well have been of the command, as no parent says otherwise.
        if (
            self._told in own
            or any(self._told in each for each in above)
            or (not own and _is_orphan(process) and self._is_younger(process))
        ):
            self._daemons[process.pid, process.started_ns] = None
            if len(self._daemons) > PROCESSES_MAX:
                self._daemons.popitem(last=False)

    def _is_younger(self, process: Process) -> bool:
        return self._command is not None and process.started_ns >= self._command.started_ns

    def _remember(self, process: Process) -> Process:
        self._note_daemon(process)
        self._found[process.pid] = process
        self._found.move_to_end(process.pid)
        if len(self._found) > RECENT_MAX:
            self._found.popitem(last=False)
        return process

    def _tree(self) -> Iterator[int]:
        waiting = [self.root] if self.root is not None else []
        for _ in range(PROCESSES_MAX):
            if not waiting:
                return
            pid = waiting.pop()
            yield pid
            waiting += children_of(pid)


def _is_orphan(process: Process) -> bool:
    return not process.parents or process.parents[0][0] == 1 or process.parents[0][1] == "systemd"


def udp_socket(port: int) -> tuple[int, int]:
    """(inode, user) of the UDP socket at a local port; (0, 0): there is none."""
    for table in ("udp", "udp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{table}") as file:
            for line in itertools.islice(file, 1, SOCKETS_MAX):
                fields = line.split()
                if len(fields) > 9 and fields[1].endswith(f":{port:04X}"):
                    return int(fields[9]), int(fields[7])
    return 0, 0


def _newest(count: int) -> list[int]:
    """The processes that began last."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()] if count else []
    return sorted(pids, reverse=True)[:count]


def _holds(pid: int, inode: int) -> bool:
    wanted = f"socket:[{inode}]"
    with contextlib.suppress(OSError):
        for name in reversed(os.listdir(f"/proc/{pid}/fd")):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == wanted:
                    return True
    return False


class OfUser:
    """The owners of connections of this machine, for a service that is one user's."""

    def __init__(self, uid: int, connectors: Connectors | None = None) -> None:
        self._uid = uid
        self._owners = Owners(connectors)

    def find(
        self, client: tuple[str, int], server: tuple[str, int], search: bool
    ) -> Process | None:
        """The process; of another user's, whose processes are not ours to see, the user alone."""
        with contextlib.suppress(OwnerUnknown):
            found = owner_of(client, server)
            if found is not None and found.inode and found.uid != self._uid:
                return Process(0, 0, uid=found.uid)
        return self._owners.find(client, server, search, newest=NEWEST)

    def find_udp(self, client: tuple[str, int]) -> Process | None:
        """The same for a UDP socket."""
        inode, uid = udp_socket(client[1])
        if inode and uid != self._uid:
            return Process(0, 0, uid=uid)
        return self._owners.find_udp(client)

    def is_foreign(self, process: Process | None) -> bool:
        """Whether it is known to be another user's."""
        return process is not None and process.uid not in (None, self._uid)
