"""Our end of the process that sees who connects (`capture/connectors.py`)."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from capture.processes.proc import from_json
from halton_meter.live import own_code

if TYPE_CHECKING:
    from halton_meter.model import Process

Address = tuple[str, int]

READY_S_MAX = 30.0
# For what the kernel has told already: as a rule it takes less than a millisecond.
ANSWER_S_MAX = 0.5
CONNECTIONS_MAX = 4_096
LINE_BYTES_MAX = 256 << 10
_ANSWER = b"true"


def start_connectors(uid: int, gid: int, ports: Sequence[int]) -> Connectors | None:
    """Start it, as root; it becomes that user. None where the kernel cannot tell who connects."""
    ours, its = socket.socketpair()
    with its:
        command = own_code.python("capture.connectors", str(its.fileno()), str(uid), str(gid))
        subprocess.Popen(
            [*command, *map(str, ports)],
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            close_fds=True,
            start_new_session=True,  # a Ctrl-C is meant for the command
        )
    found = Connectors(ours)
    if found.wait(READY_S_MAX):
        return found
    found.close()
    return None


class Connectors:
    """Who opened which connection, as far as the process behind `link` has told."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._buffer = bytearray()
        self._found: OrderedDict[tuple[Address, Address], Process] = OrderedDict()
        self._owed = 1  # answers; the first comes unasked
        self.sees = True

    def find(self, client: Address, server: Address, wait: bool) -> Process | None:
        """Who connected `client` to `server`, told once; None: not known.

        Who waits gets all that the kernel knew when he asked.
        """
        self._read()
        if (client, server) not in self._found and wait and self.sees:
            with contextlib.suppress(OSError):
                self._link.sendall(b"?")
                self._owed += 1
            self.wait(ANSWER_S_MAX)
        return self._found.pop((client, server), None)

    def wait(self, seconds: float) -> bool:
        """Read until nothing is owed any more; whether that came in time."""
        waiting, until = select.poll(), time.monotonic() + seconds
        waiting.register(self._link, select.POLLIN)
        while self.sees and self._owed and (left := until - time.monotonic()) > 0:
            waiting.poll(left * 1000)
            self._read()
        return self.sees and not self._owed

    def close(self) -> None:
        """Let it end."""
        self._link.close()

    def _read(self) -> None:
        try:
            while data := self._link.recv(1 << 16, socket.MSG_DONTWAIT):
                self._buffer += data
                self._learn()
            self.sees = False
        except BlockingIOError:
            pass
        except OSError:
            self.sees = False

    def _learn(self) -> None:
        lines, _, rest = self._buffer.rpartition(b"\n")
        self._buffer = bytearray(rest if len(rest) <= LINE_BYTES_MAX else b"")
        for line in lines.split(b"\n") if lines else ():
            if line == _ANSWER:
                self._owed -= 1
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                (client, port), (server, server_port), process = json.loads(line)
                ends = (str(client), int(port)), (str(server), int(server_port))
                self._found[ends] = from_json(process)
                if len(self._found) > CONNECTIONS_MAX:
                    self._found.popitem(last=False)
