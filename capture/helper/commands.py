"""What a reader may order of processes: which to meter, to watch, to search and to pause.

A reader is not root, and may be hostile: each command's fields are checked here, and what the
reader may do to whom is asked of the scope (`scope.py`). How commands come in and are answered, and
those about the link itself (`read`, `barrier`, `pace`, `report`, `stop`), is `loop.py`'s business.
"""

from __future__ import annotations

import os
from typing import Any

from capture.helper.discovery import Discovery
from capture.helper.pausing import Pausing
from capture.helper.scope import EnforcedScope, Refused
from halton_meter import untrusted

PROGRAMS_MAX, PATH_CHARACTERS_MAX = 16, 4096  # that a reader has searched at once


class ProcessCommands:
    """Carries out commands about processes and their programs' files."""

    def __init__(self, discovery: Discovery, scope: EnforcedScope, pausing: Pausing) -> None:
        self._discovery = discovery
        self._files = discovery.files
        self._scope = scope
        self._tree = scope.tree
        self._pausing = pausing

    def carry_out(self, what: str | None, command: dict[str, Any]) -> dict[str, Any]:
        """Do what a command says; what its answer tells beside its number.

        Raises Refused or OSError with the reason, and anything else where a field is nonsense.
        """
        if what in ("root", "hosts") and self._scope.restricted:
            raise Refused(f"{what}: whom and what to meter is fixed when the capture starts")
        if what == "root":
            self.add_root(_pid(command))
        elif what == "watch":
            pid = _pid(command)
            self._scope.check_owner(pid)
            self._tree.watch(pid)
        elif what == "pause":
            self._pause(command)
        elif what == "pause_run":
            self._pause_run(command)
        elif what == "answer":
            self._pausing.answer(_pid(command), goes_on=command.get("goes_on") is not False)
        elif what == "search":
            return {"searching": self._search(command)}
        elif what == "hosts":
            self._scope.set_hosts(command["hosts"])
        else:
            raise Refused(f"unknown command {what!r}")
        return {}

    def add_root(self, pid: int) -> None:
        """Put a process and what descends from it in scope."""
        for each in self._tree.include(pid):
            # For its parents: the record of its next exec does not have them.
            self._discovery.identities.of(each)
            self._discovery.schedule(each)

    def _pause(self, command: dict[str, Any]) -> None:
        """Have a process paused before each request, or no longer."""
        pid, on = _pid(command), command.get("on") is True
        if on and not self._scope.in_scope(pid):
            raise Refused(f"process {pid} is not metered")
        if not self._pausing.name(pid, on=on):
            raise Refused(f"process {pid} cannot be paused")

    def _pause_run(self, command: dict[str, Any]) -> None:
        """The same of all processes of a run."""
        pid, on = _pid(command), command.get("on") is True
        if on and not self._scope.in_scope(pid):
            raise Refused(f"process {pid} is not metered")
        if on and pid not in self._tree.roots_of(pid):
            self._tree.watch(pid)  # the only run there is: nobody had to tell it from others
        self._pausing.name_run(pid, on=on)

    def _search(self, command: dict[str, Any]) -> int:
        """Look into programs that somebody is about to run; how many are searched as yet."""
        paths = untrusted.texts(command, "programs", PROGRAMS_MAX, PATH_CHARACTERS_MAX)
        found = [
            self._files.look_at(each, os.path.realpath(each))
            for each in paths
            if each.startswith("/")
        ]
        return sum(each is not None and self._files.is_searching(each) for each in found)


def _pid(command: dict[str, Any]) -> int:
    pid = untrusted.whole_number(command, "pid", untrusted.PID_MAX, 1)
    if pid is None:
        raise Refused("not a process id")
    return pid
