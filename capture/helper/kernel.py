"""The program in the kernel, its maps and rings: loaded now, or taken over from a helper that died.

With a supervisor, the probes and maps of a dead helper are still there (`handover.py`): the next
one attaches nothing anew, and carries on where that one was.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass

from capture import bpf, loader, protocol
from capture.helper.handover import LAYOUT, Hold
from capture.helper.mounts import tracing_folder


@dataclass(slots=True)
class Kernel:
    """The loaded program. `inherited`: a helper before us has loaded it."""

    loaded: loader.Loaded  # bcc closes the descriptors when its object goes
    ring: bpf.Ring
    process_ring: bpf.Ring
    connections: bpf.Map
    stats: bpf.Map
    inherited: bool

    @property
    def programs(self) -> dict[str, int]:
        """Descriptors of the programs, by name."""
        return self.loaded.programs

    @property
    def maps(self) -> dict[str, int]:
        """Descriptors of the maps, by name."""
        return self.loaded.maps

    @property
    def wakes_us(self) -> bool:
        """Whether it wakes us when the ring is a quarter full: built with bcc it cannot."""
        return self.loaded.name != "bcc"

    def statistics(self) -> dict[str, int]:
        """Its counters, by name."""
        values = {}
        for index, name in enumerate(protocol.STATISTICS):
            raw = self.stats.get(struct.pack("=I", index))
            values[name] = int.from_bytes(raw or b"", "little")
        return values


def load_or_inherit(hold: Hold, way: str, ring_bytes: int, *, at_once: bool) -> Kernel:
    """What a helper before us has loaded, else the program loaded now. Raises LoadFailed, OSError.

    Once it is set up, `keep` has it held for the next helper.
    """
    given = _given(hold, ring_bytes)
    loaded = given or loader.load(way, ring_bytes, at_once=at_once)
    maps = loaded.maps
    return Kernel(
        loaded=loaded,
        ring=bpf.Ring(maps["ring"], ring_bytes),
        process_ring=bpf.Ring(maps["process_ring"], loader.PROCESS_RING_BYTES),
        connections=bpf.Map(
            maps["connections"], protocol.CONNECTION_KEY.size, protocol.CONNECTION.size
        ),
        stats=bpf.Map(maps["stats"], 4, 8),
        inherited=given is not None,
    )


def _given(hold: Hold, ring_bytes: int) -> loader.Given | None:
    """What a helper before us has loaded; None when there was none, or one of another kind."""
    about = hold.take("kernel")
    if about is None:
        return None
    if about.about[1:] != [LAYOUT, ring_bytes]:
        hold.begin_anew()
        return None
    programs = {name[8:]: held.fds[0] for name, held in hold.take_all("program:")}
    maps = {name[4:]: held.fds[0] for name, held in hold.take_all("map:")}
    return loader.Given(about.about[0], programs, maps)


def keep(kernel: Kernel, hold: Hold) -> None:
    """Have the program held for the next helper: its scope is set by now."""
    for name, fd in kernel.programs.items():
        hold.keep(f"program:{name}", True, [fd])
    for name, fd in kernel.maps.items():
        hold.keep(f"map:{name}", True, [fd])
    # Last: without it what came before is of no use.
    hold.keep("kernel", [kernel.loaded.name, LAYOUT, kernel.ring.size_bytes])


def attach_kept(hold: Hold, name: str, attach: Callable[[], int | None]) -> list[int]:
    """The probe's descriptor: a dead helper's, else of one attached now; held under this name."""
    if (held := hold.take(f"trace:{name}")) is not None:
        return held.fds
    if (link := attach()) is None:
        return []
    hold.keep(f"trace:{name}", True, [link])
    return [link]


def attach_tracepoints(kernel: Kernel, hold: Hold) -> list[int]:
    """Follow every exec, fork and exit. Raises OSError."""
    programs = kernel.programs
    events = f"{tracing_folder()}/events/sched"

    def number(event: str) -> int:
        with open(f"{events}/{event}/id", encoding="ascii") as file:
            return int(file.read())

    def on_exec() -> int:
        program = programs.get("on_exec_with_arguments", programs["on_exec"])
        return bpf.attach_tracepoint(program, number("sched_process_exec"))

    def on_fork() -> int:
        with open(f"{events}/sched_process_fork/format", encoding="ascii") as file:
            arrays = "char parent_comm[16]" in file.read()
        program = programs["fork_arrays" if arrays else "fork_locations"]
        return bpf.attach_tracepoint(program, number("sched_process_fork"))

    def on_exit() -> int:
        program = programs.get("on_exit_of_last", programs["on_exit"])
        return bpf.attach_raw_tracepoint(program, "sched_process_exit")

    return [
        *attach_kept(hold, "exit", on_exit),
        *attach_kept(hold, "exec", on_exec),
        *attach_kept(hold, "fork", on_fork),
    ]


_STATE_LAYOUT = ("__u16 protocol;\toffset:30;", "__u8 daddr_v6[16];\toffset:56;")


def socket_tracepoints(kernel: Kernel) -> dict[str, Callable[[], int | None]]:
    """How to attach to what shows TCP connections, by name; None where the kernel has it not.

    `opened` and `ended` show which there are, `sent` their bytes and where they lead to, `received`
    the other bytes.
    """
    programs = kernel.programs

    def on_state() -> int | None:
        folder = f"{tracing_folder()}/events/sock/inet_sock_set_state"
        with contextlib.suppress(OSError):
            with open(f"{folder}/format", encoding="ascii") as file:
                layout = file.read()
            if all(each in layout for each in _STATE_LAYOUT):
                with open(f"{folder}/id", encoding="ascii") as file:
                    return bpf.attach_tracepoint(programs["on_socket_state"], int(file.read()))
        return None

    def raw(program: str, tracepoint: str) -> int | None:
        with contextlib.suppress(OSError, KeyError):
            return bpf.attach_raw_tracepoint(programs[program], tracepoint)
        return None

    return {
        "opened": on_state,
        "ended": lambda: raw("on_socket_destroyed", "tcp_destroy_sock"),
        "sent": lambda: raw("on_socket_sent", "sock_send_length"),
        "received": lambda: raw("on_socket_received", "sock_recv_length"),
    }
