"""Changes config.toml for commands: comments stay, and what would be wrong is not written.

`change` applies a function to the file as tomlkit has it, judges the result as every command does
(`settings/config.py`), and writes it whole or not at all. `reload_services` has what runs use
it. It knows no key but the hosts'.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from halton_meter.cli.output import fail, note, say, unwritten, wrong_usage
from halton_meter.problem import Problem
from halton_meter.settings.config import CONFIG_BYTES_MAX, CONFIG_NAME, Loaded, read_text
from halton_meter.toml_file import look, shown_value, too_large

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

PATH_KEYS_MAX = 16
LOCK_NAME, LOCK_S_MAX = "config.lock", 5.0


class Changed(NamedTuple):
    """What a change did: the file, and whether anything in it is another."""

    path: Path
    differs: bool


def change(home: Path, apply: Callable[[TOMLDocument], None]) -> Changed:
    """Change config.toml in `home`; it is made where there is none, of mode 0600.

    Ends the command with exit code 1 where the file cannot be read or written, and with 2 where the
    result would have a wrong value, or one without effect, that the file does not have now.
    Two commands at once take turns.
    """
    from halton_meter.spending.ledger import locked

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no folder, or a full disk: see `_write`
            stack.enter_context(locked(home, LOCK_NAME, LOCK_S_MAX))
        return _changed(home, apply)


def _changed(home: Path, apply: Callable[[TOMLDocument], None]) -> Changed:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    path = home / CONFIG_NAME
    before, stamp = _text(path)
    found = read_text(before.encode(), str(path))
    try:
        document = tomlkit.parse(before)
    except (TOMLKitError, RecursionError):
        fail(*_problems(found, path))
    apply(document)
    after = tomlkit.dumps(document)
    after = after.rstrip("\n") + "\n" if after.strip() else ""
    if after.rstrip() == before.rstrip():
        return Changed(path, False)
    judged = read_text(after.encode(), str(path))
    if new := _new(found, judged):
        wrong_usage("\n".join(new), "halton-meter config get   shows what is set")
    _write(path, after, stamp)
    return Changed(path, True)


def _text(path: Path) -> tuple[str, int | None]:
    """The file's text, and its time of change; "" and None where there is none."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
            stamp = os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return "", None
    except OSError as error:
        fail(Problem(f"{path}: cannot be read: {error.strerror}", look(path)))
    if len(raw) > CONFIG_BYTES_MAX:
        fail(Problem(too_large(path, CONFIG_BYTES_MAX), look(path)))
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode(), stamp
    except UnicodeDecodeError:
        pass
    fail(*_problems(read_text(raw, str(path)), path))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _problems(found: Loaded, path: Path) -> list[Problem]:
    lines = found.wrong or (f"{path}: cannot be read as it is",)
    return [Problem(line, "") for line in lines[:-1]] + [
        Problem(lines[-1], "halton-meter config edit")
    ]


def _new(before: Loaded, after: Loaded) -> list[str]:
    """The lines about the new text that were not true of the old one, without file and line."""

    def said(lines: Iterable[str]) -> list[str]:
        return [line.partition(": ")[2] for line in lines]

    known = {*said(before.wrong), *said(before.notes)}
    return [line for line in said((*after.wrong, *after.notes)) if line not in known]


def _write(path: Path, text: str, stamp: int | None) -> None:
    from proxy_fallback.setup.changes import write_whole

    mode = 0o600
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat() if stamp is not None or path.exists() else None
        if (None if found is None else found.st_mtime_ns) != stamp:
            what = f"{path} was changed by another program meanwhile; nothing was written"
            fail(Problem(what, "run this command again"))
        mode = mode if found is None else found.st_mode & 0o777
        write_whole(path, text.encode(), mode)
    except OSError as error:
        fail(unwritten(path, error, path.parent))


# --- keys and values ------------------------------------------------------------------------------


def keys_of(text: str) -> tuple[str, ...]:
    """A setting's name as its keys: "proxy.port", 'projects."my app".paths', "hosts.a.example.com".

    Ends the command with exit code 2 for what is no name.
    """
    import tomllib

    table, dot, host = text.partition(".")
    if table == "hosts" and dot and host:  # a host's own dots are none of TOML's
        return (table, host.strip("\"'"))
    keys: list[str] = []
    try:
        level: Any = tomllib.loads(f"{text} = 0")
        while isinstance(level, dict) and len(level) == 1 and len(keys) < PATH_KEYS_MAX:
            (key, level), *_ = level.items()
            keys.append(key)
    except (ValueError, RecursionError):
        level = None
    if level != 0 or not keys:
        wrong_usage(f"{shown_value(text)} is not a setting's name", "halton-meter config get")
    return tuple(keys)


def put(document: MutableMapping[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set the value at these keys; tables on the way are made."""
    import tomlkit

    level: Any = document
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(level.get(key), MutableMapping):
            if key in level:
                del level[key]
            level[key] = tomlkit.table(is_super_table=depth < len(keys) - 2)
        level = level[key]
    there = level.get(keys[-1])
    if isinstance(there, list) and isinstance(value, list):
        _relisted(there, value)
    else:
        level[keys[-1]] = value


def _relisted(items: list[Any], wanted: list[Any]) -> None:
    """Make a list of the file's hold these values; what stays keeps its place and its comment."""
    for index in reversed(range(len(items))):
        if items[index] not in wanted:
            del items[index]
    for value in wanted:
        if value not in items:
            items.append(value)


def remove(document: MutableMapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Remove the value at these keys, and tables that are empty then; whether there was one."""
    levels: list[Any] = [document]
    for key in keys[:-1]:
        level = levels[-1].get(key)
        if not isinstance(level, MutableMapping):
            return False
        levels.append(level)
    if keys[-1] not in levels[-1]:
        return False
    del levels[-1][keys[-1]]
    for level, key in reversed(list(zip(levels, keys[:-1], strict=False))):
        if level[key]:
            break
        del level[key]
    return True


# --- what runs ------------------------------------------------------------------------------------


def reload_services(home: Path, *, uprobes: bool = True) -> list[str]:
    """Have what runs read rules, prices and limits again; lines for people. Nothing runs: none.

    `uprobes`: that service, too.
    """
    from halton_meter.live.control import (
        KEY_LOG_SOCKET_NAME,
        PROXY_SOCKET_NAME,
        SOCKET_NAME,
        ask_service,
    )

    lines = []
    for name, what, fix in (
        (SOCKET_NAME, "the uprobes service", "sudo halton-meter config reload"),
        (PROXY_SOCKET_NAME, "the local proxy", "halton-meter init"),
        (KEY_LOG_SOCKET_NAME, "the key log service", ""),
    ):
        answer = None
        if uprobes or name != SOCKET_NAME:
            answer = ask_service(home, "reload", name=name)
        if answer is None:
            continue
        if not answer.get("reloaded"):
            lines.append(f"{what} is of an earlier version; restart it to have it read the change")
            continue
        lines.append(f"{what} uses it from now on")
        if answer.get("hosts_differ"):
            lines[-1] = f"{what} uses it, except for the hosts; for these: {fix}"
        elif name == PROXY_SOCKET_NAME and (kept := _kept_port(home, answer)):
            lines[-1] = f"{what} uses it, except for the port: it listens on {kept}"
    return lines


def _kept_port(home: Path, answer: Mapping[str, Any]) -> str | None:
    """Where the proxy goes on listening though another port is set, and what ends that."""
    from halton_meter.settings import config
    from proxy_fallback.setup.ledger import LEDGER_NAME

    port = config.read(home).config.proxy.port
    addresses = [str(each) for each in answer.get("addresses") or ()]
    if not addresses or any(each.endswith(f":{port}") for each in addresses):
        return None
    again = "halton-meter stop --via proxy; halton-meter start --via proxy"
    if (home / LEDGER_NAME).exists():  # programs are set up to use the port
        again = "halton-meter init"
    return f"{', '.join(addresses)} until you run: {again}"


def said_reloaded(home: Path) -> None:
    """Have what runs read the change, and say so."""
    for line in reload_services(home):
        say(f"  {line}")


def noted(found: Loaded) -> None:
    """Say on stderr what a file has in it that has no effect."""
    for line in found.notes:
        note(line)
