"""Commands that only ask a server to start something: `run` does not follow what that starts.

A run follows the processes that its command starts. tmux, a container's engine or an editor's
window start what they are asked for themselves, and may have run before. This file knows such
commands by name, and reads of a shell's script no more than which commands it begins with.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# Command -> how its server's command line begins; None: the server always runs outside.
_SERVERS: Mapping[str, str | None] = {
    "tmux": "tmux",
    "byobu": "tmux",
    "screen": "SCREEN",
    "zellij": "zellij",
    "code": "code",
    "code-insiders": "code-insiders",
    "codium": "codium",
    "cursor": "cursor",
    "windsurf": "windsurf",
    "zed": "zed",
    "gnome-terminal": "gnome-terminal-server",
    "systemd-run": None,
    "emacsclient": None,
    "at": None,
    "batch": None,
    "docker": None,
    "nerdctl": None,
    "kubectl": None,
    "ssh": None,
    "mosh": None,
    "machinectl": None,
    "flatpak-spawn": None,
    "xdg-open": None,
    "gtk-launch": None,
    "busctl": None,
    "gdbus": None,
    "dbus-send": None,
}
# With one of these words the command starts what it starts itself.
_ITSELF: Mapping[str, str] = {"systemd-run": "--scope"}
_WRAPPERS = frozenset({"env", "nice", "nohup", "setsid", "stdbuf", "time", "timeout", "sudo"})
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish"})
_BETWEEN_COMMANDS = re.compile(r"[;|&()\n]+|\b(?:do|then|else|exec)\b")
SCRIPT_CHARACTERS_MAX = 64 << 10


def asked_servers(argv: Sequence[str], uid: int, proc: Path = Path("/proc")) -> list[str]:
    """The commands in `argv` whose server runs already, outside of what the run will follow.

    Call it before the command starts: a server that it starts itself is followed.
    """
    return [
        name
        for name, words in dict(_commands(list(argv))).items()
        if name in _SERVERS
        and _ITSELF.get(name) not in words
        and _runs_already(_SERVERS[name], uid, proc)
    ]


def lines(names: Sequence[str]) -> list[str]:
    """What to say of them, and what to do."""
    said = []
    for name in names:
        said.append(f"not followed: what {name} starts belongs to a server outside of this run")
        said.append(f"  run it in there: {name} … halton-meter run -- CMD")
    return said


def _commands(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands that a command line runs, by name, with their words."""
    while argv and (os.path.basename(argv[0]) in _WRAPPERS or "=" in argv[0]):
        argv = argv[1:]
        while argv and (argv[0].startswith("-") or argv[0].rstrip("smhd").isdecimal()):
            argv = argv[1:]
    if not argv:
        return
    name = os.path.basename(argv[0])
    yield name, argv
    if name in _SHELLS and "-c" in "".join(argv[1:2])[:4].replace("l", "").replace("e", ""):
        for part in _BETWEEN_COMMANDS.split("".join(argv[2:3])[:SCRIPT_CHARACTERS_MAX]):
            if words := part.split():
                yield from _commands(words)


def _runs_already(server: str | None, uid: int, proc: Path) -> bool:
    if server is None:
        return True
    with contextlib.suppress(OSError):
        for name in os.listdir(proc):
            with contextlib.suppress(OSError):
                if not name.isdecimal() or (proc / name).stat().st_uid != uid:
                    continue
                first = (proc / name / "cmdline").read_bytes()[:4096].partition(b"\0")[0]
                if os.path.basename(first.decode("utf-8", "replace")).startswith(server):
                    return True
    return False
