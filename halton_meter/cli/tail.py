"""`halton-meter tail`: the latest requests, one line each, and with -f each new one as it ends.

It looks on and takes nothing over (`halton_meter/store/following.py`): not the journal, not the
database. With --json one object of the public contract a line. Exit codes: 0 done, also when
nothing matches, and by Ctrl-C or the reader's end; 1 the store cannot be read; 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

import click

from halton_meter.accounts import home_folder
from halton_meter.cli.configured import Configured
from halton_meter.cli.held import with_held
from halton_meter.cli.number import Whole
from halton_meter.cli.output import (
    aligned_line,
    columns,
    cost_text,
    count_text,
    json_line,
    money_text,
    note,
    price_text,
    say,
    shown,
    styled,
    wrong_usage,
)
from halton_meter.cli.selection import (
    no_match,
    now_ns,
    read_selection,
    selection_options,
    store_problems,
)
from halton_meter.contract import event_json
from halton_meter.model import Outcome, PricedEvent, client_of
from halton_meter.store import Selection
from halton_meter.store.errors import NOTHING
from halton_meter.store.following import Follower, ended_ns

LATEST = 10
# How long a request that has ended may wait to be printed.
LOOK_EVERY_S = 0.2
LATEST_MAX = 100_000  # they are held in memory; `events` lists any number


@contextlib.contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C ends it well; DuckDB has words of its own for one that hits it in a query."""
    try:
        yield
    except KeyboardInterrupt:
        return
    except RuntimeError as error:
        if "nterrupted" not in str(error):
            raise


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter tail                                the last 10 requests
  halton-meter tail -f                             and each new one as it ends
  halton-meter tail -f -n 0 --project api --json | jq .list_usd
""",
)
@click.option("-f", "--follow", is_flag=True, help="Go on: print each request as it ends.")
@click.option(
    "-n",
    "--lines",
    "latest",
    type=Whole(0, LATEST_MAX),
    default=LATEST,
    help=f"Begin with the last N that match. Default: {LATEST}.",
)
@selection_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, times in UTC.")
def tail(follow: bool, latest: int, as_json: bool, **options: Any) -> None:
    """Print the latest requests, in the order in which they ended. Times are local.

    It only looks on: neither metering nor other commands wait for it. End -f by Ctrl-C.
    """
    selection = read_selection(now_ns(), **options)
    if follow and selection.to_ns is not None:
        wrong_usage("-f goes on, and --to ends", "leave one of them out")
    printer = _json_lines if as_json else _Lines(sys.stdout.isatty())
    follower = Follower(home_folder(), selection)
    with contextlib.closing(follower), _until_interrupted():
        with store_problems():
            found = follower.begin(latest, follow)
        printer(found)
        if follow:
            _follow(follower, printer)
        elif not found and not as_json:
            say(_nothing(selection, latest))


_Printer = Callable[[Iterable[PricedEvent]], None]


def _json_lines(events: Iterable[PricedEvent]) -> None:
    for event in events:
        sys.stdout.write(json_line(event_json(event)) + "\n")


def _nothing(selection: Selection, latest: int) -> str:
    if not latest:
        return (
            "-n 0 prints no request that has ended. To see those to come: halton-meter tail -f -n 0"
        )
    if selection != Selection():
        return no_match(selection, "tail")
    return with_held(NOTHING)


def _follow(follower: Follower, print_them: _Printer) -> None:
    _say_whether_anything_meters()
    said: str | None = None
    while _somebody_reads(LOOK_EVERY_S):
        print_them(follower.more())
        sys.stdout.flush()
        if follower.trouble != said:
            said = follower.trouble
            note(said or "the database can be read again")


def _say_whether_anything_meters() -> None:
    """Whoever waits for what cannot come should know."""
    from halton_meter.live.control import answering

    sys.stdout.flush()
    if not answering(home_folder()):
        note(
            "nothing is metered now; waiting for a run or a service. "
            "Start one: sudo halton-meter start   (or: halton-meter run -- CMD)"
        )


def _somebody_reads(seconds: float) -> bool:
    """Wait; False once standard output is a pipe that nobody reads any more, which a command that
    prints nothing would not notice.
    """
    if sys.platform == "win32":
        time.sleep(seconds)
        return True
    watched = select.poll()
    try:
        watched.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # a test's, or closed before we began
        time.sleep(seconds)
        return True
    gone = watched.poll(int(seconds * 1000))
    return not any(state & (select.POLLERR | select.POLLHUP) for _, state in gone)


# --- lines for people -----------------------------------------------------------------------------


class _Column(NamedTuple):
    """A column of fixed width, as what comes later is not known; in a terminal of 80, narrower.

    In a still narrower one the columns with the lowest `worth` go; those without one stay.
    """

    name: str
    width: int
    narrow: int
    right: bool = False
    worth: int | None = None


_COLUMNS = (
    _Column("TIME", 8, 8),
    _Column("CLIENT", 14, 8, worth=3),
    _Column("PROJECT", 14, 7, worth=5),
    _Column("MODEL", 26, 16, worth=6),
    _Column("IN", 6, 6, True, worth=2),
    _Column("CACHED", 6, 6, True, worth=1),
    _Column("OUT", 6, 6, True, worth=4),
    _Column("LIST PRICE", 10, 8, True),
)
_WIDE = sum(column.width + 2 for column in _COLUMNS) + 12
_STATUS_CELLS = len("STATUS")


class _Lines:
    """Prints requests one a line, with a heading, and the date where it changes."""

    def __init__(self, to_terminal: bool) -> None:
        self._cells = columns() if to_terminal else None
        self._narrow = self._cells is not None and self._cells < _WIDE
        self._there = _COLUMNS if self._cells is None else _fitting(self._cells)
        self._day = datetime.now().date()
        self._headed = False

    def __call__(self, events: Iterable[PricedEvent]) -> None:
        for event in events:
            if not self._headed:
                self._headed = True
                names = [*(column.name for column in _COLUMNS), "STATUS"]
                names[-2] = "PRICE" if self._narrow else names[-2]
                click.echo(styled(self._line(names), "dim"))
            ended = datetime.fromtimestamp(ended_ns(event) // 1_000_000_000)
            if ended.date() != self._day:
                self._day = ended.date()
                click.echo(styled(f"{self._day:%Y-%m-%d}", "dim"))
            line = self._line(_cells(event, f"{ended:%H:%M:%S}", self._narrow))
            click.echo(styled(line, "red") if event.usage.error_class else line)

    def _line(self, cells: Iterable[str]) -> str:
        *given, status = cells
        there = [cell for c, cell in zip(_COLUMNS, given, strict=True) if c in self._there]
        widths = [(c.narrow if self._narrow else c.width, c.right) for c in self._there]
        line = aligned_line([*there, status], widths, " " if self._narrow else "  ")
        return line if self._cells is None else shown(line, self._cells)


def _fitting(cells: int) -> tuple[_Column, ...]:
    """The columns that a terminal has room for beside the status: what a request cost is never the
    one that is cut off.
    """
    there = list(_COLUMNS)
    for column in sorted(_COLUMNS, key=lambda each: each.worth or 0):
        if sum(each.narrow + 1 for each in there) + _STATUS_CELLS <= cells:
            break
        if column.worth is not None:
            there.remove(column)
    return tuple(there)


def _cells(event: PricedEvent, time_text: str, narrow: bool) -> list[str]:
    usage, tokens = event.usage, event.tokens
    exe = usage.process.exe if usage.process else None
    usd = event.list_usd
    return [
        time_text,
        shown(client_of(usage.caller.client, exe)),
        shown(usage.project),
        shown(usage.model or usage.request_model),
        count_text(tokens.input),
        count_text(tokens.cache_read),
        count_text(tokens.output),
        price_text(usd, usage.free, _short_cost(usd) if narrow else cost_text(usd)),
        shown(_status(event), 100),
    ]


def _short_cost(usd: Decimal | None) -> str:
    """Rounded to what eight cells take: a price that is cut off would be another one."""
    places = 4 if usd is None or usd < 100 else 2 if usd < 1000 else 0
    return money_text(usd, places)


def _status(event: PricedEvent) -> str:
    """How it ended, then its flags."""
    usage = event.usage
    ended = {Outcome.GAPPED: "incomplete", Outcome.ABORTED: "interrupted"}.get(usage.outcome, "")
    if usage.error_class is not None:
        code = f"{usage.http_status} " if usage.http_status else ""
        ended = f"{code}{usage.error_class}"
    flags = sorted({*usage.flags, *event.flags} - {"gapped", "aborted"})
    return " ".join([ended or "ok", *flags])
