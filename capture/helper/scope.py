"""The scope: which users' processes and which hosts the kernel may copy plaintext of.

It is set when the helper starts, in the maps `settings`, `uids` and `hosts`; a reader that is
`restricted` cannot change it. `in_scope` in probe.bpf.c enforces it; `in_scope` here answers the
same question about a process that discovery looks at. `process_tree.py` keeps who descends from
whom.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from capture import bpf, protocol
from capture.helper.process_tree import EXCLUDED, IN_SCOPE, ProcessTree

REQUEST_BYTES_MAX = 8 * 1024 * 1024

_SETTINGS = struct.Struct("=IIQIIQQII")
_EVERYONE, _UIDS, _TREES, _CGROUP, _OWNER = 1, 2, 4, 8, 16
_INIT_PID_NAMESPACE = 0xEFFFFFFC


class Refused(Exception):
    """A command that is refused; the text is the reason."""


class EnforcedScope:
    """The scope and the hosts. When `restricted`, the reader may not name processes of users
    outside the scope."""

    def __init__(
        self,
        maps: Mapping[str, int],
        tree: ProcessTree,
        scope: dict[str, Any],
        *,
        restricted: bool,
        request_bytes_max: int | None = None,
    ) -> None:
        self._scope = scope
        self.reader: int | None = scope.get("reader")
        self.restricted = restricted
        self.tree = tree
        self._host_map = bpf.Map(maps["hosts"], 4 + protocol.HOST_BYTES_MAX, 1)
        self._set_settings(request_bytes_max or REQUEST_BYTES_MAX, maps)
        uids = bpf.Map(maps["uids"], 4, 1)
        for uid in scope["uids"]:
            uids.set(struct.pack("=I", uid), b"\x01")
        for pid in scope["excluded"]:
            tree.exclude(pid)

    def _set_settings(self, request_bytes_max: int, maps: Mapping[str, int]) -> None:
        scope = self._scope
        flags = _TREES | (_EVERYONE if scope["everyone"] else 0) | (_UIDS if scope["uids"] else 0)
        cgroup = level = 0
        if scope["cgroup"]:
            path = os.path.realpath(scope["cgroup"])
            cgroup = os.stat(path).st_ino
            level = len(
                [part for part in os.path.relpath(path, "/sys/fs/cgroup").split("/") if part != "."]
            )
            flags |= _CGROUP
        owner = scope.get("owner")
        flags |= _OWNER if owner is not None else 0
        namespace = os.stat("/proc/self/ns/pid")
        nested = namespace.st_ino != _INIT_PID_NAMESPACE
        bpf.Map(maps["settings"], 4, _SETTINGS.size).set(
            bytes(4),
            _SETTINGS.pack(
                flags,
                request_bytes_max,
                cgroup,
                level,
                nested,
                namespace.st_dev,
                namespace.st_ino,
                owner or 0,
                0,
            ),
        )

    def set_hosts(self, hosts: Iterable[str]) -> None:
        """Replace the allow-list, also one that a helper before us has left."""
        wanted = {host_key(host) for host in hosts}
        have = set(self._host_map.all_keys())
        for key in wanted - have:
            self._host_map.set(key, b"\x01")
        for key in have - wanted:
            self._host_map.drop(key)

    def check_owner(self, pid: int) -> None:
        """Raise Refused unless the reader may name this process."""
        if not self.restricted or self._scope["everyone"]:
            return
        try:
            owner = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            raise Refused(f"there is no process {pid}") from None
        if owner not in self._scope["uids"]:
            raise Refused(f"process {pid} belongs to another user")

    def is_of_run(self, pid: int) -> bool:
        """Whether a process belongs to a command that `run` started, for itself or the service."""
        return self.is_for_runs or self.tree.run_of(pid) > 0

    @property
    def is_for_runs(self) -> bool:
        """Whether only processes are in scope that descend from a command."""
        return not self._scope["uids"] and not self._scope["everyone"]

    def in_scope(self, pid: int) -> bool:
        """Whether a living process is in scope, its cgroup aside."""
        flags = self.tree.flags(pid)
        if flags & EXCLUDED:
            return False
        if self._scope["everyone"]:
            return True
        owner = self._scope.get("owner")
        if flags & IN_SCOPE and owner is None:
            return True
        try:
            uid = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            return False
        return uid in self._scope["uids"] or bool(flags & IN_SCOPE and uid == owner)


def host_key(host: str) -> bytes:
    """The key of an allow-list entry in the kernel's trie: reversed, NUL closing a whole name."""
    name = host.strip().lower().rstrip(".")
    suffix = name.startswith("*.")
    raw = (name[1:] if suffix else name).encode("ascii")
    if not 0 < len(raw) < protocol.HOST_BYTES_MAX - 1:
        raise Refused(f"not a host name: {host!r}")
    bits = (len(raw) + (0 if suffix else 1)) * 8
    return struct.pack("=I", bits) + raw[::-1].ljust(protocol.HOST_BYTES_MAX, b"\0")
