"""`halton-meter config`: see, change and check config.toml, and have the service read it again.

Exit codes: 0 done; 1 the file holds a wrong value, or cannot be read or written; 2 wrong usage, and
nothing was written.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from halton_meter.accounts import home_folder
from halton_meter.cli import config_file
from halton_meter.cli.configured import no_folder, told
from halton_meter.cli.named import FilePath
from halton_meter.cli.output import (
    LINE_CHARACTERS_MAX,
    count,
    fail,
    name_typed,
    print_json,
    say,
    styled,
    unwritten,
    wrong_usage,
)
from halton_meter.problem import Problem
from halton_meter.settings.config import (
    CONFIG_BYTES_MAX,
    CONFIG_NAME,
    EDIT,
    SYSTEM_CONFIG,
    Config,
    ConfigError,
    Loaded,
    read,
    read_system,
    read_text,
)
from halton_meter.settings.proxy import ProxyConfig
from halton_meter.toml_file import look, too_large

EXAMPLES = """
    \b
    Examples:
      halton-meter config get                          every setting and where it comes from
      halton-meter config set proxy.port 8082
      halton-meter config set hosts.llm.example.com openai
      halton-meter config check                        exit code 1 where something is wrong
"""


@click.group(epilog=EXAMPLES)
def config() -> None:
    """Show, change and check the settings in config.toml."""


def _home(*, may_be_none: bool = False) -> Path:
    """The data folder. Ends the command where it can be none, unless only its name is asked for."""
    try:
        home = home_folder()
    except ConfigError as error:
        fail(*error.problems)
    if not may_be_none and (what := no_folder(home)) is not None:
        fail(Problem(what, ""))
    return home


# --- get ------------------------------------------------------------------------------------------


@config.command(
    epilog="""\b
Examples:
  halton-meter config get
  halton-meter config get proxy.port
  halton-meter config get --json | jq .settings
"""
)
@click.argument("key", required=False, type=name_typed, metavar="[KEY]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def get(key: str | None, as_json: bool) -> None:
    """Show a setting, or all of them, and which file and line each comes from."""
    home = _home()
    found = read(home)
    told(found, ends=True)
    document = _document(home)
    rows = [*_settings(found, document)]
    if key is not None:
        wanted = config_file.keys_of(key)
        rows = [row for row in rows if row[0][: len(wanted)] == wanted]
        if not rows:
            _refuse_unknown(wanted)
    if as_json:
        print_json({"file": str(home / CONFIG_NAME), "settings": [_as_json(row) for row in rows]})
    elif key is not None and len(rows) == 1 and rows[0][0] == config_file.keys_of(key):
        say(_shown(rows[0][1]))
    else:
        width = max((len(_dotted(keys)) for keys, _, _ in rows), default=0)
        for keys, value, place in rows:
            name = _dotted(keys).ljust(width)
            say(f"{name}  {_shown(value)}  {styled(place or 'default', 'dim')}")
    sys.exit(1 if found.wrong else 0)


_Row = tuple[tuple[str, ...], Any, str | None]


def _document(home: Path) -> Any:
    """The file with the lines of its values; None where there is none or it is no TOML."""
    from halton_meter import toml_file

    try:
        return toml_file.read(home / CONFIG_NAME, CONFIG_BYTES_MAX)
    except toml_file.NotToml:
        return None


def _settings(found: Loaded, document: Any) -> Iterator[_Row]:
    """Every setting in force: its keys, its value, and "FILE:LINE" (None: the default)."""
    table = document.table if document is not None else {}
    named: dict[str, Any] = {}
    for each in fields(Config):
        if each.name in ("users", "all_users"):
            continue  # root's own, in root's file
        named[each.name] = getattr(found.config, each.name)
    named["proxy"] = found.config.proxy._asdict()
    for name, value in named.items():
        if name in ("hosts", "projects"):
            yield from _leaves((name,), table.get(name, {}), document)
        elif name == "proxy":
            own = table.get(name, {})
            for key, inner in value.items():
                is_set = isinstance(own, Mapping) and key in own
                yield (name, key), _plain(inner), document.at(name, key) if is_set else None
        else:
            yield (name,), _plain(value), document.at(name) if name in table else None
    known = {*named, "hosts", "projects"}
    for name, value in table.items():
        if name not in known:
            yield from _leaves((name,), value, document)


def _leaves(keys: tuple[str, ...], value: Any, document: Any) -> Iterator[_Row]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves((*keys, key), inner, document)
    else:
        yield keys, value, document.at(*keys)


def _plain(value: Any) -> Any:
    """As TOML has it: lists for tuples, an upstream proxy as its address."""
    if isinstance(value, tuple):
        if len(value) == 2 and isinstance(value[1], int):
            return f"http://{value[0]}:{value[1]}"
        # Of projects and budgets, which have commands of their own, the names.
        return [getattr(each, "name", each) for each in value]
    return value


def _as_json(row: _Row) -> dict[str, Any]:
    keys, value, place = row
    return {"key": _dotted(keys), "value": value, "set_at": place}


def _dotted(keys: tuple[str, ...]) -> str:
    from halton_meter.settings.projects import toml_key

    return ".".join(map(toml_key, keys))


def _shown(value: Any) -> str:
    import json

    if value is None:
        return "not set"
    return json.dumps(value, ensure_ascii=False, default=str)


def _refuse_unknown(keys: tuple[str, ...]) -> None:
    """End the command: no setting has this name. One of a table that is just empty is none, too."""
    from halton_meter.toml_file import nearest

    names = [each.name for each in fields(Config)]
    inner = [f"proxy.{name}" for name in ProxyConfig._fields]
    if keys[0] in names:
        fail(Problem(f"{_dotted(keys)} is not set", _how_to_set(keys)))
    near = nearest(_dotted(keys), (*names, *inner))
    meant = f"; did you mean {near}?" if near else ""
    wrong_usage(f"there is no setting {_dotted(keys)}{meant}", "halton-meter config get")


def _how_to_set(keys: tuple[str, ...]) -> str:
    """A command that takes what may be set there."""
    if keys[0] in ("users", "all_users"):
        return f"sudoedit {SYSTEM_CONFIG}"  # root's own, in root's file
    if keys[0] in ("projects", "budgets"):
        return f"halton-meter {keys[0].removesuffix('s')} set --help"
    if keys == ("hosts",):
        return "halton-meter config set hosts.HOST PROVIDER"
    return f"halton-meter config set {shlex.quote(_dotted(keys))} VALUE"


# --- set, unset -----------------------------------------------------------------------------------


@config.command(
    "set",
    epilog="""\b
Examples:
  halton-meter config set retention_days 365
  halton-meter config set openai_compatible_hosts llm.example.com 10.0.0.7:8000
  halton-meter config set hosts.gateway.example.com gateway
  halton-meter config set openai_compatible_hosts --add llm.example.org
""",
)
@click.argument("key", type=name_typed, metavar="KEY")
@click.argument("values", nargs=-1, required=True, type=name_typed, metavar="VALUE…")
@click.option("--add", "how", flag_value="add", help="Add to a list instead of replacing it.")
@click.option("--remove", "how", flag_value="remove", help="Remove from a list.")
def set_(key: str, values: tuple[str, ...], how: str | None) -> None:
    """Change a setting; comments stay, and a wrong value is refused.

    A service that runs uses the change at once. Other hosts are read by the uprobes service only
    for root: sudo halton-meter config reload
    """
    home, keys = _home(), config_file.keys_of(key)

    def apply(document: Any) -> None:
        before = _at(document, keys)
        is_list = isinstance(before, list) or _is_list(keys)
        if how is not None and not is_list:
            wrong_usage(f"--{how} is for lists; {_dotted(keys)} is none")
        if not is_list and len(values) > 1:
            wrong_usage(f"{_dotted(keys)} takes one value, not {len(values)}")
        value = _listed(before, values, how) if is_list else _typed(keys, values[0])
        config_file.put(document, keys, value)

    done = config_file.change(home, apply)
    if not done.differs:
        say(f"{_dotted(keys)} is so already, in {done.path}")
        return
    say(f"{_dotted(keys)} set in {done.path}")
    config_file.said_reloaded(home)


def _at(document: Any, keys: tuple[str, ...]) -> Any:
    level = document
    for key in keys:
        if not isinstance(level, Mapping) or key not in level:
            return None
        level = level[key]
    return level


_LISTS = (("openai_compatible_hosts",), ("users",))


def _is_list(keys: tuple[str, ...]) -> bool:
    if keys[0] == "projects" and len(keys) == 3:
        return True
    return keys in _LISTS


def _listed(before: Any, values: tuple[str, ...], how: str | None) -> list[str]:
    kept = [str(each) for each in before] if isinstance(before, list) else []
    if how == "add":
        return [*kept, *(each for each in dict.fromkeys(values) if each not in kept)]
    if how == "remove":
        return [each for each in kept if each not in values]
    return list(dict.fromkeys(values))


def _typed(keys: tuple[str, ...], text: str) -> Any:
    """A number or a truth where TOML reads one, else a text; a project's or host's is a text."""
    import tomllib

    if keys[0] in ("hosts", "projects"):
        return text
    try:
        found = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, int | float | bool | list) else text


@config.command(
    epilog="""\b
Examples:
  halton-meter config unset retention_days
  halton-meter config unset hosts.llm.example.com
"""
)
@click.argument("key", type=name_typed, metavar="KEY")
def unset(key: str) -> None:
    """Remove a setting from the file, so that its default counts."""
    home, keys, found = _home(), config_file.keys_of(key), []

    def apply(document: Any) -> None:
        if config_file.remove(document, keys):
            found.append(keys)

    done = config_file.change(home, apply)
    if not found and keys[0] not in (each.name for each in fields(Config)):
        _refuse_unknown(keys)
    if not found:
        say(f"{_dotted(keys)} is not set in {done.path}")
        return
    say(f"{_dotted(keys)} removed from {done.path}")
    config_file.said_reloaded(home)


# --- path, edit, check, reload --------------------------------------------------------------------

_SYSTEM = click.option(
    "--system",
    is_flag=True,
    help=f"Root's own file, {SYSTEM_CONFIG}, which decides who is metered.",
)


@config.command(
    epilog="""\b
Examples:
  halton-meter config path
  halton-meter config path --system
"""
)
@_SYSTEM
def path(system: bool) -> None:
    """Print where config.toml is, or would be."""
    click.echo(str(SYSTEM_CONFIG if system else _home(may_be_none=True) / CONFIG_NAME))


@config.command(
    epilog="""\b
Examples:
  halton-meter config edit
  EDITOR='code --wait' halton-meter config edit
"""
)
def edit() -> None:
    """Open config.toml in your editor, and check it before it counts.

    The editor is $VISUAL, $EDITOR, or the first of editor, nano and vi that is there.
    """
    home = _home()
    target = home / CONFIG_NAME
    text = _edited(target)
    while True:
        found = read_text(text.encode(), str(target))
        told(found)
        if not found.wrong:
            break
        again = sys.stdin.isatty() and click.confirm(
            "Edit again? (no: your changes are dropped)", default=True, err=True
        )
        if not again:
            fail(Problem(f"{target} was left as it is", EDIT))
        text = _in_editor(text)
    before = target.read_text() if target.exists() else ""
    if text == before:
        say("nothing changed")
        return
    try:
        from proxy_fallback.setup.changes import write_whole

        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        write_whole(target, text.encode(), mode)
    except OSError as error:
        fail(unwritten(target, error, home))
    say(f"{target} written")
    config_file.said_reloaded(home)


_NEW = """\
# Settings of Halton Meter. Every one is optional. All of them: halton-meter config get

"""


def _edited(target: Path) -> str:
    from capture.packets.input_files import open_file

    try:
        with open_file(target) as file:
            text = file.read(CONFIG_BYTES_MAX + 1).decode("utf-8", "replace")
    except FileNotFoundError:
        text = _NEW
    except OSError as error:
        fail(Problem(f"{target}: cannot be read: {error.strerror}", look(target)))
    if len(text) > CONFIG_BYTES_MAX:
        fail(Problem(too_large(target, CONFIG_BYTES_MAX), look(target)))
    found = _in_editor(text)
    return "" if found == _NEW else found


def _in_editor(text: str) -> str:
    """The text as the editor leaves it, which works on a copy: a half-done file never counts."""
    import tempfile

    words = _editor()
    with tempfile.TemporaryDirectory(prefix="halton-meter-") as folder:
        copy = Path(folder) / CONFIG_NAME
        copy.write_text(text)
        try:
            code = subprocess.call([*words, str(copy)])
        except OSError as error:
            what = f"the editor {words[0]} cannot be started: {error.strerror}"
            fail(Problem(what, f"EDITOR=nano {EDIT}"))
        if code:
            what = f"the editor {words[0]} ended with code {code}; nothing was changed"
            fail(Problem(what, f"EDITOR=nano {EDIT}"))
        return copy.read_bytes().decode("utf-8", "replace")


def _editor() -> list[str]:
    import shutil

    for name in ("VISUAL", "EDITOR"):
        value = os.environ.get(name, "")
        try:
            words = shlex.split(value)
        except ValueError as error:  # a quote that is not closed
            reason = str(error)[:1].lower() + str(error)[1:]
            fail(Problem(f"{name} is no command: {value!r}: {reason}", f"export {name}=nano"))
        if words:
            return words
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fix = f"halton-meter config set KEY VALUE, or: EDITOR=PROGRAM {EDIT}"
        fail(Problem("there is no terminal to edit in", fix))
    for name in ("editor", "nano", "vi"):
        if shutil.which(name):
            return [name]
    fail(Problem("no editor was found", f"EDITOR=PROGRAM {EDIT}"))


@config.command(
    epilog="""\b
Examples:
  halton-meter config check
  halton-meter config check config.toml.new
  sudo halton-meter config check --system
"""
)
@click.argument("file", required=False, type=FilePath(path_type=Path), metavar="[FILE]")
@_SYSTEM
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(file: Path | None, system: bool, as_json: bool) -> None:
    """Check config.toml, or another file, line by line.

    Each wrong value is one line with file, line and the nearest right value.

    Exit codes: 0 every value is right, also where some have no effect; 1 a value is wrong, or the
    file cannot be read.
    """
    name = SYSTEM_CONFIG if system else file or _home() / CONFIG_NAME
    try:
        found = read_system() if system else _read_file(name, named=file is not None)
    except ConfigError as error:
        fail(*error.problems, as_json=as_json)
    if as_json:
        listed = {"wrong": [*found.wrong], "without_effect": [*found.notes]}
        print_json({"file": str(name), "ok": not found.wrong, **listed})
    else:
        told(found, ends=True)
        if not found.wrong:
            without = f"; {count(len(found.notes), 'setting')} without effect" * bool(found.notes)
            there = "" if name.exists() else " (there is none: the defaults count)"
            say(f"{name}: every value is right{without}{there}")
    sys.exit(1 if found.wrong else 0)


def _read_file(name: Path, *, named: bool) -> Loaded:
    """What a file says; one that a user has `named` must be there."""
    from halton_meter import toml_file
    from halton_meter.settings.config import judged, not_toml

    ours = not named or name.absolute() == (_home(may_be_none=True) / CONFIG_NAME).absolute()
    try:
        document = toml_file.read(name, CONFIG_BYTES_MAX, ours=ours)
    except toml_file.NotToml as error:
        return not_toml(error, EDIT if ours else _then_check(name))
    if document is not None:
        found = judged(document)
        return found if ours or not found.wrong else found._replace(fix=_then_check(name))
    if not named:
        return Loaded()
    return Loaded(wrong=(f"{name}: no such file; name a TOML file",))


def _then_check(name: Path) -> str:
    return f"correct the file, then: halton-meter config check {shlex.quote(str(name))}"


@config.command(
    epilog="""\b
Examples:
  halton-meter config reload             rules, prices, limits
  sudo halton-meter config reload        also the hosts that uprobes watch
"""
)
def reload() -> None:
    """Have the running services read the settings again, without a restart.

    Project rules, your own prices and retention count at once. Which hosts the uprobes service
    watches is read again only for root. SIGHUP to the service does the same.

    Exit codes: 0 read again; 1 a value is wrong (all others are used), or no service runs.
    """
    from halton_meter import accounts

    home = _home()
    if accounts.is_root() and sys.platform == "linux":
        _reload_of_root(home)
        return
    wrong = told(read(home), ends=True)
    lines = config_file.reload_services(home)
    for line in lines:
        say(line)
    if not lines:
        fail(Problem("no service runs, so nothing had to be read again", "halton-meter status"))
    sys.exit(1 if wrong else 0)


# Services that are asked as the user that they are: the proxy, the key log service.
OTHERS_MAX = 2


def _reload_of_root(home: Path) -> None:
    """Signal the supervisor, which reads both files; ask the others as the user that they are."""
    from halton_meter import accounts, privileges, untrusted
    from halton_meter.live.probes import service

    account = accounts.invoking_account()
    try:
        own, _ = service.read_configuration(account, home)
        wrong = told(own, ends=True)
    except ConfigError as error:
        fail(*error.problems)
    found = service.supervisor_of(home, account.uid)
    if found is not None:
        service.signal_reload(found)
        say("the uprobes service reads its settings again, the hosts too")

    def others() -> dict[str, list[str]]:
        return {"lines": config_file.reload_services(home, uprobes=False)}

    answer = privileges.as_account(account, others)
    if not isinstance(answer, dict):
        answer = {}
    told_others = untrusted.texts(answer, "lines", OTHERS_MAX, LINE_CHARACTERS_MAX)
    for line in told_others:
        say(line)
    if not told_others and found is None:
        fail(Problem("no service runs, so nothing had to be read again", "halton-meter status"))
    sys.exit(1 if wrong else 0)
