"""The file of `run --json-summary`: tried before the command starts, written after its end.

Both as the user: root must not write wherever a name given to sudo points.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from halton_meter.cli.output import complain, print_json
from halton_meter.cli.streams import OutputRefused, names_stdout
from halton_meter.problem import Problem

_OTHER = "name another file: --json-summary FILE"


def refusal(named: str) -> tuple[str, str] | None:
    """Why no summary could be written there, and the fix; None where one can be."""
    from halton_meter import accounts, privileges

    if names_stdout(named):
        return None
    said = privileges.as_account(accounts.invoking_account(), lambda: _refusal(Path(named)))
    return (str(said[0]), str(said[1])) if isinstance(said, list | tuple) else None


def _refusal(path: Path) -> tuple[str, str] | None:
    folder = path.absolute().parent
    what = f"the summary cannot be written to {path}: "
    try:
        return _refused(path, folder, what)
    except OSError as error:
        return (
            f"{what}{error.strerror or type(error).__name__}",
            f"ls -ld {shlex.quote(str(folder))}",
        )


def _refused(path: Path, folder: Path, what: str) -> tuple[str, str] | None:
    if path.is_dir():
        return f"{what}that is a folder", _OTHER
    if path.exists():
        return None if os.access(path, os.W_OK) else (f"{what}you may not write it", _OTHER)
    if folder.is_dir():
        if os.access(folder, os.W_OK | os.X_OK):
            return None
        return f"{what}you may not write in its folder", f"ls -ld {shlex.quote(str(folder))}"
    if folder.exists():
        return f"{what}{folder} is not a folder", _OTHER
    return f"{what}there is no folder {folder}", f"mkdir -p {shlex.quote(str(folder))}"


def write_summary(named: str, summary: dict[str, Any]) -> None:
    """Write it; where that fails, say so: the exit code stays the command's own."""
    from halton_meter import accounts, privileges
    from halton_meter.settings import config

    if names_stdout(named):
        try:
            print_json(summary)
        except OutputRefused as refused:
            complain(Problem(f"the summary cannot be written: {refused.strerror}", "df -h"))
        return
    text = json.dumps(summary) + "\n"
    try:
        account = accounts.invoking_account()
        why = privileges.as_account(account, lambda: _written(Path(named), text))
    except config.ConfigError as error:
        why = error.what
    if why is not None:
        folder = shlex.quote(str(Path(named).absolute().parent))
        complain(Problem(f"the summary cannot be written to {named}: {why}", f"ls -ld {folder}"))


def _written(path: Path, text: str) -> str | None:
    """Write it; why it could not be, or None."""
    try:
        path.write_text(text)
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()
    return None
