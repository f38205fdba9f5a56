"""`halton-meter statusline`: a line for Claude Code's status bar, and `install`, `uninstall`.

Without a subcommand it never gets here: `entry.py` answers first, without click. Exit codes: 0
always for the line itself; `install` and `uninstall`: 0 done, 1 the client's settings cannot be
read or written, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import click

from halton_meter.cli.output import fail, look_at, print_json, say, shown
from halton_meter.problem import Problem

RECORD_NAME = "statusline.json"
SETTINGS_BYTES_MAX = 4 << 20
# The client asks anew after so many seconds: what was metered a second late, and what has expired.
REFRESH_S = 10
EXAMPLES = """
    \b
    Examples:
      halton-meter statusline install      show it in Claude Code
      halton-meter statusline uninstall    restore what was there before
      echo '{"session_id": "6f1e…"}' | halton-meter statusline
"""


@click.group(invoke_without_command=True, epilog=EXAMPLES)
@click.pass_context
def statusline(context: click.Context) -> None:
    """Print one line about a session, from the JSON that Claude Code pipes in.

    It shows what was metered of the session and of today, a budget, the plan's windows and when
    they reset, and until when the prompt cache lives. "≠ client" means that Claude Code's own
    estimate differs from what was metered. It takes some 30 ms and always ends with exit code 0.
    """
    if context.invoked_subcommand is None:
        from halton_meter.statusline import quick

        click.echo(quick.answer("statusline", quick.piped(), time.time()))


class _Changing(click.Command):
    """A command that ends with what it was refused."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Refused as error:
            fail(error.problem)


@statusline.command(
    cls=_Changing,
    epilog="""\b
Examples:
  halton-meter statusline install            in ~/.claude/settings.json
  halton-meter statusline install --json     the same, for a script
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
def install(as_json: bool) -> None:
    """Show the line in Claude Code: set statusLine in its settings.

    The settings are ~/.claude/settings.json, or that of $CLAUDE_CONFIG_DIR. All else in them stays
    byte for byte; a status line that was there before is kept, and comes back with `uninstall`.
    """
    from halton_meter.statusline.settings import status_line, with_status_line

    path = _settings_path()
    text = _read(path)
    before = None if text is None else _checked(status_line, text, path)
    ours = _value()
    records = _records()
    record = records.get(str(path))
    if before is not None and _is_ours(before, record):
        record = record or {"before": None, "made": False}
        if before == ours:
            _done(as_json, path, "installed already", {"changed": False})
            return
    else:
        record = {"before": before, "made": text is None}
    # On disk before the change: whatever happens next, `uninstall` knows what was there.
    records[str(path)] = {**record, "ours": ours}
    _keep(records)
    _write(path, _checked(lambda t: with_status_line(t, ours), text or "{}\n", path))
    note = "" if record["before"] is None else "; the one before is kept for `uninstall`"
    _done(as_json, path, f"status line set{note}", {"changed": True, "replaced": record["before"]})


@statusline.command(
    cls=_Changing,
    epilog="""\b
Examples:
  halton-meter statusline uninstall
  halton-meter statusline uninstall --json     for a script
""",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as one JSON object.")
def uninstall(as_json: bool) -> None:
    """Restore Claude Code's settings as they were before.

    A status line that you have set yourself since then stays.
    """
    path = _settings_path()
    done = remove(path)
    _done(as_json, path, done or "there is no status line of Halton Meter", {"changed": bool(done)})


def remove_all() -> tuple[list[str], list[Problem]]:
    """Put back every settings file that `install` changed, for `uninstall`; what was done, and what
    could not be.
    """
    lines, problems = [], []
    for name in list(_records()):
        try:
            done = remove(Path(name))
        except Refused as error:
            problems.append(error.problem)
            continue
        if done:
            lines.append(f"{name}: {done}")
    return lines, problems


def remove(path: Path) -> str | None:
    """Put one settings file back; what was done, None where there was nothing to do. Raises
    Refused.
    """
    from halton_meter.statusline.settings import (
        status_line,
        with_status_line,
        without_status_line,
    )

    records = _records()
    record = records.pop(str(path), None)
    text = _read(path)
    now = None if text is None else _checked(status_line, text, path)
    done = None
    if text is not None and now is not None and _is_ours(now, record):
        before = None if record is None else record.get("before")
        if isinstance(before, str):
            _write(path, _checked(lambda t: with_status_line(t, before), text, path))
            done = "the status line of before is back"
        else:
            rest = _checked(without_status_line, text, path)
            if record is not None and record.get("made") is True and not json.loads(rest):
                path.unlink()
            else:
                _write(path, rest)
            done = "status line removed"
    if record is not None:
        _keep(records)
    return done


# --- the value ------------------------------------------------------------------------------------


def _value() -> str:
    """What we set, as JSON's text."""
    return json.dumps(
        {"type": "command", "command": _command(), "refreshInterval": REFRESH_S}, indent=2
    ).replace("\n", "\n  ")


def _command() -> str:
    """The program that was called now, by its path: a client's PATH may lack it."""
    program = Path(sys.argv[0])
    if program.name != "halton-meter" or not program.is_file():
        found = shutil.which("halton-meter") or str(Path(sys.executable).with_name("halton-meter"))
        program = Path(found)
    if not program.is_file():
        return f"{shlex.quote(sys.executable)} -m halton_meter statusline"
    return f"{shlex.quote(str(program.absolute()))} statusline"


def _is_ours(value: str, record: dict[str, Any] | None) -> bool:
    """Whether a status line is the one that we set, whatever has laid it out anew since."""
    try:
        command = json.loads(value).get("command")
    except (ValueError, AttributeError):
        return False
    words = command.split() if isinstance(command, str) else []
    if words[-1:] == ["statusline"] and "halton" in " ".join(words[:-1]):
        return True
    return record is not None and value == record.get("ours")


# --- files ----------------------------------------------------------------------------------------


def _settings_path() -> Path:
    """Where Claude Code looks: $CLAUDE_CONFIG_DIR, else .claude in $HOME."""
    from halton_meter.accounts import invoking_account

    named = os.environ.get("CLAUDE_CONFIG_DIR")
    home = os.environ.get("HOME") or str(invoking_account().home)
    folder = Path(named).expanduser() if named else Path(home) / ".claude"
    return folder.absolute() / "settings.json"


def _read(path: Path) -> str | None:
    """The settings' text; None where there are none."""
    from capture.packets.input_files import open_file

    try:
        with open_file(path) as file:
            data = file.read(SETTINGS_BYTES_MAX + 1)
        if len(data) > SETTINGS_BYTES_MAX:
            _refuse(path, f"it is larger than {SETTINGS_BYTES_MAX >> 20} MiB")
        return data.decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        _refuse(path, error.strerror or str(error))
    except UnicodeDecodeError:
        _refuse(path, "it is not UTF-8")


def _checked(change: Any, text: str, path: Path) -> Any:
    from halton_meter.statusline.settings import NotSettings

    try:
        return change(text)
    except NotSettings as error:
        _refuse(path, f"it is no JSON object: {error}")


def _write(path: Path, text: str) -> None:
    from proxy_fallback.setup.changes import write_whole

    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, parents=True)
        mode = path.stat().st_mode & 0o7777 if path.exists() else 0o600
        write_whole(path, text.encode(), mode)
    except OSError as error:
        look = look_at(error, path.parent, _look(path))
        _refuse(path, error.strerror or str(error), "written", look)


class Refused(Exception):
    """A file that cannot be read or written; nothing was changed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def _look(path: Path) -> str:
    return f"ls -l {shlex.quote(str(path))}"


def _refuse(path: Path, why: str, what: str = "used", fix: str | None = None) -> NoReturn:
    said = f"{shown(str(path), 200)} cannot be {what}: {why}. Nothing was changed"
    raise Refused(Problem(said, fix or _look(path)))


def _record_path() -> Path:
    from halton_meter.accounts import home_folder

    return home_folder() / RECORD_NAME


def _records() -> dict[str, dict[str, Any]]:
    """What was before our status line, by the settings' path."""
    from halton_meter.statusline.snapshot import read

    found = read(str(_record_path()))
    return {name: each for name, each in found.items() if isinstance(each, dict)}


def _keep(records: dict[str, Any]) -> None:
    path = _record_path()
    if not records:
        path.unlink(missing_ok=True)
        return
    _write(path, json.dumps(records, indent=1) + "\n")


def _done(as_json: bool, path: Path, what: str, more: dict[str, Any]) -> None:
    if as_json:
        print_json({"settings": str(path), "done": what, **more})
    else:
        say(f"{what} ({shown(str(path), 200)})")
