"""The budgets that a command means, and what they have spent, as `halton-meter budget` asks it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from halton_meter.accounts import home_folder
from halton_meter.budget import Budget
from halton_meter.cli.output import fail
from halton_meter.problem import Problem


def _fail(what: str, fix: str) -> NoReturn:
    fail(Problem(what, fix))


def configured(
    names: Sequence[str] = (), unknown: Callable[[str, str], NoReturn] = _fail
) -> tuple[Path, tuple[Budget, ...]]:
    """The data folder and its budgets, or those named; ends the command for an `unknown` name."""
    from halton_meter.settings import config
    from halton_meter.toml_file import nearest

    home = home_folder()
    found = config.read(home).config.budgets
    known = [each.name for each in found]
    for name in names:
        if name not in known:
            near = nearest(name, known)
            fix = f"did you mean {near}?" if near else "halton-meter budget list"
            unknown(f"there is no budget {name!r}", fix)
    return home, tuple(each for each in found if not names or each.name in names)


def sums_of(home: Path, budgets: Sequence[Budget], at_ns: int) -> tuple[Any, str | None]:
    """What they have spent; and why it is not of now, if so. Raises OSError."""
    from halton_meter.spending import standing
    from halton_meter.store import StoreError

    try:
        return standing.refresh(home, every(home, budgets), at_ns), None
    except (OSError, StoreError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).partition(". ")[0]
        return standing.last_known(home, every(home, budgets)), why or "the store cannot be read"


def every(home: Path, budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """These budgets, and the others of the configuration: a baseline is of all of them."""
    from halton_meter.settings import config

    named = {each.name for each in budgets}
    others = (each for each in config.read(home).config.budgets if each.name not in named)
    return (*budgets, *others)


def is_there(stop: Any) -> bool:
    """Whether somebody still holds it, or processes of it are still stopped."""
    if sys.platform != "linux":
        return True
    from halton_meter.live.stopping import is_alive

    return is_alive(stop.by) or any(map(is_alive, stop.processes))
