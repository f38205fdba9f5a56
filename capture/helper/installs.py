"""Lists the installed clients that have a TLS stack of their own, and notices new ones.

Such a program must be searched before its functions are known; done ahead of its first run, that
run is metered from its first byte. `Installs.candidates` lists files now, inotify shows when to
list again: nothing is polled. This file opens nothing; names alone decide.
"""

from __future__ import annotations

import ctypes
import fnmatch
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

WATCHES_MAX = 512
CANDIDATES_MAX = 3000
CANDIDATES_OF_PATTERN_MAX = 300
FOLDERS_MAX = 5000
"""Read in one listing: folders linked in circles end it for their owner alone."""
NAMES_A_BREATH = 100
NAMES_MAX = 5000
"""Names read of one folder; more are not looked at."""
EVENT_BYTES = 16 << 10
PASSWD_BYTES_MAX = 1 << 20

_NPM_FOLDERS = (
    "{home}/.npm-global/lib/node_modules",
    "{home}/.npm-packages/lib/node_modules",
    "{home}/.local/lib/node_modules",
    "{home}/.nvm/versions/node/*/lib/node_modules",
    "{home}/.local/share/fnm/node-versions/*/installation/lib/node_modules",
    "{home}/.volta/tools/image/packages/*/lib/node_modules",
    "{home}/.local/share/pnpm/global/*/node_modules",
    "{home}/.bun/install/global/node_modules",
    "{home}/.claude/local/node_modules",
    "{home}/.npm/_npx/*/node_modules",
    "/usr/local/lib/node_modules",
    "/usr/lib/node_modules",
)
_NPM_PACKAGES = (
    "@anthropic-ai/claude-code*/claude*",
    "@anthropic-ai/claude-code*/bin/*",
    "@anthropic-ai/claude-code/node_modules/@anthropic-ai/claude-code-*/claude*",
    "opencode-*/bin/*",
    "opencode-ai/node_modules/opencode-*/bin/*",
    "@oven/bun-*/bin/bun*",
    "bun/bin/bun*",
    "bun/node_modules/@oven/bun-*/bin/bun*",
    "@openai/codex-linux-*/vendor/*/*/codex*",
    "@openai/codex/vendor/*/*/codex*",
    "@openai/codex/node_modules/@openai/codex-linux-*/vendor/*/*/codex*",
    "@github/copilot-linux*/copilot",
    "@github/copilot/node_modules/@github/copilot-linux*/copilot",
    "@deno/linux-*/deno",
    "deno/node_modules/@deno/linux-*/deno",
)
_PATTERNS = (
    "{home}/.local/share/claude/versions/*",
    "{home}/.claude/local/claude*",
    "{home}/.bun/bin/*",
    "{home}/.deno/bin/deno",
    "{home}/.opencode/bin/*",
    "{home}/.local/bin/*",
    "{home}/bin/*",
    "{home}/go/bin/*",
    "{home}/.local/lib/python3*/site-packages/grpc/_cython/cygrpc*.so",
    "{home}/.nvm/versions/node/*/bin/node",
    "{home}/.local/share/fnm/node-versions/*/installation/bin/node",
    "{home}/.volta/tools/image/node/*/bin/node",
    "{home}/.local/share/uv/python/*/bin/python3*",
    "{home}/miniconda3/lib/libssl.so*",
    "{home}/miniforge3/lib/libssl.so*",
    "{home}/anaconda3/lib/libssl.so*",
    "/usr/bin/node",
    "/usr/local/bin/*",
    "/usr/lib/python3/dist-packages/grpc/_cython/cygrpc*.so",
    "/usr/local/lib/python3*/*-packages/grpc/_cython/cygrpc*.so",
    *(f"{folder}/{package}" for folder in _NPM_FOLDERS for package in _NPM_PACKAGES),
)

_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE, _IN_ONLYDIR = 0x8, 0x80, 0x100, 0x1000000
_IN_Q_OVERFLOW = 0x4000
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_EVENT = struct.Struct("=iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Installs:
    """The places of some users' clients. Readable (`fileno`) when one of them has changed."""

    def __init__(self, homes: Iterable[str], patterns: Iterable[str] = _PATTERNS) -> None:
        self._patterns = sorted(
            {pattern.format(home=home) for pattern in patterns for home in homes}
            | {pattern for pattern in patterns if "{home}" not in pattern}
        )
        self._fd = int(_libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
        self._watched: dict[str, int] = {}
        self._wanted: dict[int, set[str]] = {}

    def fileno(self) -> int:
        """For epoll; -1 when the kernel gives no inotify (its users' limit is reached)."""
        return self._fd

    def close(self) -> None:
        """Watch no more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def candidates(self) -> Iterator[str | None]:
        """Files there now that may hold a client; watches wherever another may appear.

        None after each folder: the caller may go on with the listing later.
        """
        found: set[str] = set()
        folders = 0
        for pattern in self._patterns:
            of_pattern = 0
            for path in self._follow("/", pattern.lstrip("/").split("/")):
                folders += path is None
                of_pattern += path is not None
                if folders >= FOLDERS_MAX or len(found) >= CANDIDATES_MAX:
                    return
                if of_pattern > CANDIDATES_OF_PATTERN_MAX:
                    break
                if path is None or path not in found:
                    yield path
                if path is not None:
                    found.add(path)

    def _follow(self, folder: str, segments: list[str]) -> Iterator[str | None]:
        segment, *rest = segments
        if "*" in segment:
            self._watch(folder, segment)
            names = fnmatch.filter(_names(folder), segment)
            yield None
        else:
            there = os.path.lexists(os.path.join(folder, segment))
            if not rest or not there:  # a file may be half written, or replaced
                self._watch(folder, segment)
            if not there:
                return
            names = [segment]
        for number, name in enumerate(names):
            path = os.path.join(folder, name)
            if number % NAMES_A_BREATH == NAMES_A_BREATH - 1:
                yield None
            if rest and os.path.isdir(path):
                yield from self._follow(path, rest)
            elif not rest and os.path.isfile(path):
                yield path

    def _watch(self, folder: str, segment: str) -> None:
        if folder not in self._watched:
            if self._fd < 0 or len(self._watched) >= WATCHES_MAX:
                return
            mask = _IN_CREATE | _IN_MOVED_TO | _IN_CLOSE_WRITE | _IN_ONLYDIR
            number = _libc.inotify_add_watch(self._fd, os.fsencode(folder), ctypes.c_uint32(mask))
            if number < 0:
                return
            self._watched[folder] = number
        self._wanted.setdefault(self._watched[folder], set()).add(segment)

    def changed(self) -> bool:
        """True when a name we look for appeared, or its file was written, since the last call."""
        changed = False
        if self._fd >= 0:  # once a turn, or a program that writes all the time would keep us here
            try:
                data = os.read(self._fd, EVENT_BYTES)
            except BlockingIOError:
                return False
            at = 0
            while at + _EVENT.size <= len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                at += _EVENT.size + length
                if mask & _IN_Q_OVERFLOW:
                    changed = True
                if number in self._wanted and not name:  # the folder is gone; it may come again
                    self._forget(number)
                    changed = True
                wanted = self._wanted.get(number, ())
                text = os.fsdecode(name)
                changed = changed or any(fnmatch.fnmatch(text, segment) for segment in wanted)
        return changed

    def _forget(self, number: int) -> None:
        self._wanted.pop(number, None)
        self._watched = {path: each for path, each in self._watched.items() if each != number}


def _names(folder: str) -> list[str]:
    names: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) >= NAMES_MAX:
                    break
    except OSError:
        return []
    return sorted(names)


def homes_of(uids: Iterable[int] | None) -> list[str]:
    """The home folders of these users, of all people for None, by /etc/passwd.

    Not by the name service: it may ask a network, and the capture must not wait.
    """
    wanted = None if uids is None else set(uids)
    homes = []
    try:
        text = Path("/etc/passwd").read_bytes()[:PASSWD_BYTES_MAX].decode("utf-8", "replace")
    except OSError:
        return []
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) >= 7 and fields[2].isdigit():
            uid, home = int(fields[2]), fields[5]
            person = uid == 0 or 1000 <= uid < 65534
            if (person if wanted is None else uid in wanted) and len(home) > 1:
                homes.append(home)
    return sorted(set(homes))
