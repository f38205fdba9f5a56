"""A command starts with a sound configuration, or says in one line a wrong value what is wrong.

`Configured` is the class of every command that acts for the user alone. Those that may be root
(`run`, `start`, `daemon`, `stop`) read the file with the user's rights and call `told` themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter.cli.output import complain, fail, note
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.settings.config import Loaded

_VARIABLES = ("HALTON_METER_HOME", "HALTON_PROJECT")
_OUR_VARIABLES = frozenset({*_VARIABLES, "HALTON_METER_REDIRECT", "HALTON_METER_CA"})


class Configured(click.Command):
    """A command that does nothing before the configuration is sound. Its help needs none."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, or end with exit code 1."""
        require_sound()
        return super().invoke(ctx)


class Tolerant(click.Command):
    """A command that says what is wrong in the configuration, and goes on."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        told_here()
        return super().invoke(ctx)


def require_sound() -> None:
    """End with exit code 1 and a line for each wrong value, or go on."""
    if told_here():
        raise SystemExit(1)


def told_here() -> bool:
    """Say what is wrong in this user's configuration; whether anything is.

    A data folder that cannot be one ends the command: there is nothing to go on with.
    """
    from halton_meter.accounts import home_folder
    from halton_meter.settings import config

    try:
        home = home_folder()
    except config.ConfigError as error:
        fail(*error.problems)
    told_of_variables(os.environ)
    if (what := no_folder(home)) is not None:
        fail(Problem(what, ""))
    return told(config.read(home))


def told(found: Loaded, after: str = "", *, ends: bool = False) -> bool:
    """Say what is wrong, and `after` it what follows, and what has no effect; whether a value is
    wrong. Where that `ends` a command about settings, the last line has the next one; elsewhere
    a wrong value is one line, which names file and line."""
    for line in found.notes:
        note(line)
    for number, line in enumerate(found.wrong, 1):
        is_whole = line.endswith(("?", "."))
        then = f" {after[0].upper()}{after[1:]}." if is_whole and after else after and f"; {after}"
        fix = found.fix if ends and number == len(found.wrong) else ""
        complain(Problem(f"{line}{then}", fix))
    return bool(found.wrong)


def no_folder(home: Path) -> str | None:
    """What is wrong with the data folder where it can be none; None where it is one, or is yet to
    be made.
    """
    named = f"{_VARIABLES[0]} names" if os.environ.get(_VARIABLES[0]) else "the data folder is"
    other = f"name another folder: export {_VARIABLES[0]}=FOLDER"
    try:
        str(home).encode()
        found = next(each for each in (home, *home.parents) if _is_there(each))
        if found.is_dir():
            return None
    except UnicodeEncodeError:
        return f"{named} {home}, which is not UTF-8 text; {other}, or: export LC_ALL=C.UTF-8"
    except OSError as error:
        return f"{named} {home}, which cannot be reached: {error.strerror}; {other}"
    return f"{named} {home}, and {found} is not a folder; {other}"


def _is_there(path: Path) -> bool:
    """Whether something has this name. Raises OSError where it cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def stand_in_folder() -> None:
    """Have `run` go on where the data folder can be none: in a folder of its own, to the end."""
    import atexit
    import shutil
    import tempfile

    from halton_meter import accounts
    from halton_meter.privileges import as_account
    from halton_meter.settings.config import ConfigError

    try:
        home = accounts.home_folder()
        what = no_folder(home)
        if what is None and (not accounts.is_root() or accounts.invoking_account().uid == 0):
            home.mkdir(0o700, parents=True, exist_ok=True)
    except ConfigError as error:
        what = error.what
    except OSError as error:
        what = f"the data folder {home} cannot be made: {error.strerror}"
    if what is None:
        return
    note(f"{what}; what this run uses is in its summary only")
    folder = tempfile.mkdtemp(prefix="halton-meter-")
    os.environ[accounts.HOME_VARIABLE] = folder
    account = accounts.invoking_account()
    if accounts.is_root():
        os.chown(folder, account.uid, account.gid)
    # As the user, whose folder it is now.
    atexit.register(as_account, account, lambda: shutil.rmtree(folder, ignore_errors=True))


def told_of_variables(environ: Mapping[str, str]) -> None:
    """Say which variables look like ours and are not."""
    from halton_meter.toml_file import nearest

    for name in environ:
        if name.startswith("HALTON") and name not in _OUR_VARIABLES:
            near = nearest(name, _VARIABLES, 0.8)
            if near is not None:
                note(f"the variable {name} has no effect; did you mean {near}?")
