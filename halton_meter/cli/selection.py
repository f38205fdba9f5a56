"""The options that choose events, shared by `events`, `report`, `export` and `reprice`.

Wrong values are wrong usage (exit code 2); what the store has to say is a failure (exit code 1).
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click

from halton_meter.accounts import home_folder
from halton_meter.periods import parse_when
from halton_meter.store import NothingStored, Selection, StoreError

_Command = TypeVar("_Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--today", is_flag=True, help="Since midnight."),
    click.option("--since", metavar="WHEN", help="7d, 24h, 30m, 2w, a date or an RFC 3339 time."),
    click.option("--from", "from_", metavar="WHEN", help="The first moment, as for --since."),
    click.option("--to", metavar="WHEN", help="The end; a date includes that day."),
    click.option("--provider", metavar="NAME", help="Only this provider, e.g. anthropic."),
    click.option("--model", metavar="NAME", help="Only this model, as the provider names it."),
    click.option("--project", metavar="NAME", help="Only this project."),
    click.option("--flag", metavar="WORD", help="Only requests with this flag, e.g. implausible."),
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
    since: str | None,
    from_: str | None,
    to: str | None,
    provider: str | None,
    model: str | None,
    project: str | None,
    flag: str | None,
) -> Selection:
    """The options as a Selection; times without an offset are local."""
    named = [n for n, v in (("--today", today), ("--since", since), ("--from", from_)) if v]
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(named)} each set the beginning; give one of them.")
    beginning = "today" if today else since or from_
    from_ns = None if beginning is None else _moment(named[0], beginning, now_ns)
    to_ns = None if to is None else _moment("--to", to, now_ns, end=True)
    if from_ns is not None and to_ns is not None and from_ns >= to_ns:
        raise click.UsageError(
            f"The period ends before it begins: {named[0]} {beginning} --to {to}."
        )
    return Selection(from_ns, to_ns, provider, model, project, flag)


def _moment(option: str, text: str, now_ns: int, end: bool = False) -> int:
    try:
        return parse_when(text, now_ns, end)
    except (ValueError, OverflowError, OSError) as error:
        raise click.UsageError(
            f"{option} {text!r} is no time. Write 7d, 24h, 30m, today, 2026-11-23 or "
            "2026-11-23T09:30:00Z."
        ) from error


def now_ns() -> int:
    """What time it is."""
    return time.time_ns()


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Say what the store has to say on stderr, and exit with 1."""
    try:
        yield
    except NothingStored:
        raise  # no failure: each command has its own way to say so
    except StoreError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # `| head` has seen enough: click ends quietly
        named = f"{error.filename}: " if error.filename else ""
        raise click.ClickException(
            f"{named}{error.strerror or error}. See: ls -ld {home_folder()}"
        ) from error
