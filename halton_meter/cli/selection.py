"""The options that choose stored requests, shared by `events`, `report`, `export` and `reprice`.

Wrong values are wrong usage (exit code 2); a store that cannot be read is a failure (exit code 1).
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.output import fail, look_at, name_typed, wrong_usage
from halton_meter.periods import parse_when, use_zone
from halton_meter.problem import Problem
from halton_meter.store import NothingStored, Selection, StoreError

_Command = TypeVar("_Command", bound=Callable[..., Any])

# Of --limit: far beyond what is stored, and a number that a database takes.
ROWS_MAX = 1_000_000_000

# What --branch without a name stands for: no branch is called so.
HERE = ".."


def _use_zone(context: click.Context, _option: click.Parameter, name: str | None) -> None:
    if name is None or context.resilient_parsing:
        return
    try:
        context.call_on_close(use_zone(name))
    except ValueError:
        what = f"--tz {name!r} is no time zone that this machine knows"
        wrong_usage(what, "write UTC, Europe/Berlin or +02:00")


_OPTIONS = (
    click.option("--today", is_flag=True, help="Since local midnight."),
    click.option("--week", is_flag=True, help="Since Monday, local midnight."),
    click.option("--month", is_flag=True, help="Since the first of this month, local midnight."),
    click.option(
        "--since",
        metavar="TIME",
        help="From TIME on: 7d or 7 (days), 24h, 30m, 2w, today, yesterday, week, month, "
        "2026-11-23, 2026-11-23T09:30 (local time), 2026-11-23T09:30Z.",
    ),
    click.option("--from", "from_", metavar="TIME", help="The same as --since."),
    click.option(
        "--to", metavar="TIME", help="Up to TIME, written as for --since; a date includes that day."
    ),
    click.option(
        "--provider", type=name_typed, metavar="NAME", help="Only this provider, e.g. anthropic."
    ),
    click.option(
        "--model",
        type=name_typed,
        metavar="NAME",
        help="Only this model, as the provider names it.",
    ),
    click.option(
        "--project",
        type=name_typed,
        metavar="NAME",
        help="Only this project; - for requests without one.",
    ),
    click.option(
        "--client",
        type=name_typed,
        metavar="NAME",
        help="Only this client, e.g. claude-cli; of one that has no name, its program's.",
    ),
    click.option(
        "--session",
        type=name_typed,
        metavar="ID",
        help="Only this session, by its whole id: halton-meter session list --json.",
    ),
    click.option(
        "--branch",
        type=name_typed,
        is_flag=False,
        flag_value=HERE,
        metavar="[NAME]",
        help="Only this git branch; without NAME, the branch and project of the current folder.",
    ),
    click.option(
        "--flag",
        type=name_typed,
        metavar="WORD",
        help="Only requests with this flag, e.g. implausible.",
    ),
    click.option(
        "--tz",
        metavar="ZONE",
        is_eager=True,
        expose_value=False,
        callback=_use_zone,
        help="Read and show times, and count days, in this time zone: UTC, Europe/Berlin, +02:00. "
        "Default: the system's.",
    ),
)


def selection_options(command: _Command) -> _Command:
    """Give a command the options; they arrive as the keywords of `read_selection`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_selection(
    now_ns: int,
    *,
    today: bool,
    week: bool,
    month: bool,
    since: str | None,
    from_: str | None,
    to: str | None,
    provider: str | None,
    model: str | None,
    project: str | None,
    client: str | None,
    session: str | None,
    branch: str | None,
    flag: str | None,
) -> Selection:
    """The options as a Selection; times without an offset are local."""
    words = {"--today": today, "--week": week, "--month": month}
    times = {"--since": since, "--from": from_}
    named = [name for name, is_set in words.items() if is_set]
    # An empty text is no time: "--since $FROM" with nothing in FROM is not everything.
    named += [name for name, given in times.items() if given is not None]
    if len(named) > 1:
        wrong_usage(f"{' and '.join(named)} each set the beginning", "give one of them")
    chosen = next((name.removeprefix("--") for name, is_set in words.items() if is_set), None)
    beginning = chosen if chosen is not None else since if since is not None else from_
    from_ns = None if beginning is None else moment(named[0], beginning, now_ns)
    to_ns = None if to is None else moment("--to", to, now_ns, end=True)
    if from_ns is not None and to_ns is not None and from_ns >= to_ns:
        given = f"{named[0] if chosen else f'{named[0]} {beginning}'} --to {to}"
        if from_ns == to_ns:
            wrong_usage(f"the period ends when it begins: {given}", "write a later --to")
        wrong_usage(f"the period ends before it begins: {given}", "swap the two times")
    if branch == HERE:
        here, branch = _branch_here()
        project = project or here
    return Selection(from_ns, to_ns, provider, model, project, flag, session, branch, client=client)


def _branch_here() -> tuple[str | None, str]:
    """The project and the git branch of the current folder."""
    import os

    from halton_meter.attribution import Attribution
    from halton_meter.model import Process

    hint = os.environ.get("HALTON_PROJECT")
    here = Process(os.getpid(), 0, cwd=os.getcwd(), uid=os.getuid(), project_hint=hint)
    project, branch = Attribution()(here)
    if branch is None:
        wrong_usage(
            f"{os.getcwd()} is on no git branch",
            "name one, as in: halton-meter report --branch main",
        )
    return project, branch


def no_match(selection: Selection, command: str) -> str:
    """What a command says whose selection has no request; `command` lists all of them."""
    lines = [f"No requests match. All that are stored: halton-meter {command}"]
    if selection.flag is not None:
        lines += _flag_lines(selection.flag)
    return "\n".join(lines)


def _flag_lines(flag: str) -> list[str]:
    """The flags there are, where this is none of them."""
    import textwrap

    from halton_meter.vocabulary import FLAGS, PRICE_FLAGS

    known = sorted({*FLAGS, *PRICE_FLAGS})
    if flag.partition(":")[0] in known:
        return []
    listed = textwrap.wrap(f"There is no flag {flag!r}. Flags: {', '.join(known)}", 100)
    return [listed[0], *(f"  {line}" for line in listed[1:])]


def moment(option: str, text: str, now_ns: int, end: bool = False) -> int:
    """A time given for an option, in ns; wrong usage where it is none."""
    try:
        return parse_when(text, now_ns, end)
    except (ValueError, OverflowError, OSError):
        wrong_usage(
            f"{option} {text!r} is not a time",
            "write 7d, 24h, today, week, month, 2026-11-23 or 2026-11-23T09:30 (local time), or "
            "2026-11-23T09:30Z",
        )


def now_ns() -> int:
    """What time it is."""
    return time.time_ns()


@contextlib.contextmanager
def store_problems() -> Iterator[None]:
    """Fail with what the store says. That nothing is stored is no failure: each command says it."""
    try:
        yield
    except NothingStored:
        raise
    except StoreError as error:
        fail(Problem(str(error), ""))
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # `| head` has seen enough: click ends quietly
        named = f"{error.filename}: " if error.filename else ""
        fail(Problem(f"{named}{error.strerror or error}", look_at(error, home_folder())))
