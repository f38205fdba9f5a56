"""`init` and `uninstall`: take the plan's steps one by one, show them, or undo them.

Each step is a list of changes (changes.py), so that it can be shown beforehand, made once however
often init runs, and undone. If a step fails, everything that this run did is undone. Changes of an
earlier mode that this one does not need are undone, too. plan.py defines the steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy_fallback.setup import service_files
from proxy_fallback.setup.changes import ChangeError, CommandRun
from proxy_fallback.setup.ledger import Entry, Ledger
from proxy_fallback.setup.machine import CA_FOLDER_NAME, Machine
from proxy_fallback.setup.plan import Choice, SetupError, SetupPlan, SetupStep

# What a ledger calls the proxy's own service, on each platform.
PROXY_KEYS = frozenset(
    f"service:{name}" for name in (service_files.UNIT, service_files.LABEL, "background")
)


@dataclass(frozen=True, slots=True)
class StepTaken:
    """A step that was taken."""

    number: int
    of: int
    title: str
    detail: str
    changed: bool


def take_steps(
    machine: Machine, choice: Choice, ledger: Ledger, report: Callable[[StepTaken], None]
) -> bool:
    """Set up; returns whether anything changed. Raises SetupError, with everything undone."""
    try:
        plan = SetupPlan(machine, choice)
        plan.check(ledger)
    except ChangeError as error:
        problem = error.problem
        raise SetupError(f"{problem.what}\n  nothing was changed", problem.fix) from None
    former = ledger.entries
    title = ""
    try:
        ledger.begin()
        changed, keys = False, set[str]()
        for number, step in enumerate(plan.steps, 1):
            title = step.title
            stepped, planned = _take(step, ledger)
            keys |= planned
            changed = changed or stepped
            report(StepTaken(number, len(plan.steps), step.title, step.detail(), stepped))
        for entry in reversed(ledger.entries):
            if entry.change.key not in keys:
                ledger.undo(entry.change.key)
                changed = True
        ledger.finish(choice.mode)
        return changed
    except (ChangeError, OSError, KeyboardInterrupt) as error:
        raise _undone(f"{title}: ", error, ledger, former) from None


def _take(step: SetupStep, ledger: Ledger) -> tuple[bool, set[str]]:
    changed = files_changed = step.before(ledger)
    keys = set()
    for change in step.changes():
        keys.add(change.key)
        # A service must be restarted after its file has changed.
        command = isinstance(change, CommandRun)
        made = ledger.make(change, again=command and files_changed)
        changed, files_changed = changed or made, files_changed or (made and not command)
    return step.after(ledger) or changed, keys


def _undone(
    title: str, error: BaseException, ledger: Ledger, former: Sequence[Entry]
) -> SetupError:
    """Undo what this run did; the error to raise says whether that worked."""
    what, fix = str(error), "halton-meter init --dry-run   to see every command"
    if isinstance(error, KeyboardInterrupt):
        what, fix = "interrupted", "halton-meter init"
    if isinstance(error, ChangeError):
        what, fix = error.problem.what, error.problem.fix or fix
    try:
        ledger.put_back(former)
    except (ChangeError, OSError) as trouble:
        outcome, fix = f"not everything could be undone: {trouble}", "halton-meter uninstall"
    else:
        outcome = "everything that this init did is undone"
    return SetupError(f"{title}{what}\n  {outcome}", fix)


def describe(machine: Machine, choice: Choice, ledger: Ledger) -> list[tuple[str, list[str]]]:
    """What `take_steps` would do: each step's title and its commands and file changes.

    It runs commands that read settings, and changes nothing. Raises SetupError if it would refuse.
    """
    try:
        plan = SetupPlan(machine, choice, dry_run=True)
        plan.check(ledger)
        shown = []
        for step in plan.steps:
            lines = [
                line
                for change in step.changes()
                if not ledger.in_force(change)
                for line in change.lines()
            ]
            shown.append((step.title, [*step.acts, *lines]))
    except ChangeError as error:
        raise SetupError(error.problem.what, error.problem.fix) from None
    return shown


def undo_but_the_proxy(ledger: Ledger) -> list[str]:
    """Undo what points programs to the proxy; what those that run need stays; returns notes.

    That is the proxy's service and all that was set up before it, such as the trust in its CA.
    Raises ChangeError.
    """
    keys = [entry.change.key for entry in ledger.entries]
    last = max((at for at, key in enumerate(keys) if key in PROXY_KEYS), default=-1)
    needed = frozenset(keys[: last + 1])
    return ledger.undo_all(keep=lambda change: change.key in needed)


def undo(ledger: Ledger, machine_home: Path) -> list[str]:
    """`uninstall`: undo everything, and remove the CA; returns notes. Raises ChangeError."""
    notes = ledger.undo_all()
    folder = machine_home / CA_FOLDER_NAME
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    return notes
