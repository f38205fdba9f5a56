"""How every command fails and prints: problems, tables, money, counts, durations, times.

A failure is one line, "halton-meter: what happened, with the value", and one indented line, "fix:",
with the command that solves it. People read local time; JSON, CSV and exports carry UTC
(`halton_meter.contract.rfc3339`). Names come from traffic: nothing printed here lets one move the
cursor, colour the screen or turn the direction of the text. CSV is `halton_meter/spreadsheet.py`.

Nothing heavy is imported: `rich` alone costs 60 ms at start-up.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any, NoReturn

import click

from halton_meter.cli.streams import takes_all
from halton_meter.problem import Problem, Unavailable

UNKNOWN = "-"
# In the place of a price: the request only started something (`UsageEvent.free`).
PENDING = "pending"
PENDING_NOTE = "priced with its answer"
# What people read for the contract's outcomes.
OUTCOMES = {"complete": "", "gapped": "incomplete (bytes lost)", "aborted": "interrupted"}
BAR_CELLS = 12
_MINUTE_NS = 60 * 10**9
CENT = Decimal("0.01")
GAP_CHARACTERS_MAX = 100
LINE_CHARACTERS_MAX = 2000
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STEPS = "▁▂▃▄▅▆▇█"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
# Controls, marks that turn the direction of the text, and what takes no room.
_UNPRINTABLE = re.compile("[\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")

# A command of ours that another user is to run, so not by the PATH of who reads it.
_AS_ANOTHER = re.compile(r"(\bsudo (?:-u \S+ )?|\bsu -c ')halton-meter\b")

# What sudoers' secure_path has on Debian, Fedora and Arch.
SUDO_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")

# --- printing and failing -------------------------------------------------------------------------


def say(text: str) -> None:
    """Print lines for people on stdout."""
    click.echo(harmless_lines(as_typed(text)))


def note(text: str, at: str = "") -> None:
    """Print something worth knowing on stderr; the command goes on. `at` stands before the line."""
    click.echo(harmless_lines(as_typed(f"{at}halton-meter: {text}")), err=True)


def as_typed(text: str) -> str:
    """With the path in commands that sudo would not find: it looks in folders of the system only,
    and pipx, uv and a venv install elsewhere.
    """
    program = sys.argv[0] if sys.argv else ""
    folder, name = os.path.split(os.path.abspath(program))
    if name != "halton-meter" or not _AS_ANOTHER.search(text):
        return text
    if any(os.path.exists(f"{each}/{name}") for each in SUDO_FOLDERS):
        return text
    typed = shlex.quote(f"{folder}/{name}")
    return _AS_ANOTHER.sub(lambda found: f"{found[1]}{typed}", text)


def print_json(document: Any) -> None:
    """Print one JSON object on one line."""
    click.echo(json_line(document))


def write_json_lines(documents: Iterable[Any]) -> None:
    """Print many JSON objects, one a line."""
    for document in documents:
        sys.stdout.write(json_line(document) + "\n")


def json_line(document: Any) -> str:
    """A JSON object on one line. What the terminal lacks, or would act upon, is escaped."""
    import orjson

    try:
        text = orjson.dumps(document).decode()
    except TypeError:  # half a character, as a file's name may hold
        text = json.dumps(document)
    if text.isascii() and "\x7f" not in text:
        return text
    if not takes_all(sys.stdout):
        return json.dumps(document)
    return text if text.isprintable() else _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if found[0] != "\x7f" else "\\u007f"


def problem_text(problem: Problem) -> str:
    """A problem as people read it. An error whose text names the fix itself has an empty one."""
    fix = problem.fix.replace("\n", "\n       ")
    return f"{problem.what}\n  fix: {fix}" if fix else problem.what


def complain(*problems: Problem) -> None:
    """Print problems on stderr; the caller decides how the command ends."""
    for problem in problems:
        note(problem_text(problem))


def fail(*problems: Problem, as_json: bool = False) -> NoReturn:
    """End the command with exit code 1, its problems on stderr and, if asked, as JSON on stdout."""
    if as_json:
        errors = [{"error": each.what, "fix": each.fix} for each in problems]
        print_json(errors[0] if len(errors) == 1 else {"errors": errors})
    complain(*problems)
    sys.exit(1)


def wrong_usage(what: str, fix: str = "") -> NoReturn:
    """End the command with exit code 2; the fix is the command's help unless a better is known."""
    raise WrongUsage(what, fix)


class WrongUsage(click.UsageError):
    """Wrong options or arguments, printed as every other problem is."""

    def __init__(self, what: str, fix: str = "", context: click.Context | None = None) -> None:
        super().__init__(what, context)
        self._fix = fix

    def show(self, file: Any = None) -> None:
        """Print it; click ends the process with exit code 2."""
        complain(Problem(self.format_message(), self._fix or f"{_typed(self.ctx)} --help"))


def _typed(context: click.Context | None) -> str:
    """The command as it is typed, however this process was started."""
    words: list[str] = []
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name or "")
        context = context.parent
    return " ".join(("halton-meter", *words))


def plain_usage(error: click.UsageError, command: str | None = None) -> click.UsageError:
    """An error of click's own, such as an unknown option, as ours: one line, and `command`'s help
    where click does not say whose option it is.
    """
    if isinstance(error, WrongUsage | click.exceptions.NoArgsIsHelpError):
        return error
    what = " ".join(error.format_message().split())
    if isinstance(error, click.NoSuchOption) and re.match(r"-\d", error.option_name):
        what = f"{what.rstrip('.')}; amounts are written without a minus sign"
    fix = f"halton-meter {command} --help" if command and error.ctx is None else ""
    return WrongUsage(what, fix, error.ctx)


# --- names ----------------------------------------------------------------------------------------


def shown(text: str | None, width: int = 40) -> str:
    """A name from outside, made harmless and no wider than `width` cells of a terminal."""
    if text is None or not text:
        return UNKNOWN
    clean = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return clean if cells(clean) <= width else f"{_cut(clean, width - 1)}…"


def cells(text: str) -> int:
    """How many cells of a terminal a printable text takes."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def filled(text: str, width: int, *, right: bool = False) -> str:
    """A text with spaces up to `width` cells."""
    spaces = " " * (width - cells(text))
    return spaces + text if right else text + spaces


def _cut(text: str, width: int) -> str:
    """The beginning that has room in `width` cells."""
    if text.isascii():
        return text[:width]
    for at, character in enumerate(text):
        width -= _cells_of(character)
        if width < 0:
            return text[:at]
    return text


def _cells_of(character: str) -> int:
    """Two for Chinese, Japanese, Korean and emoji; none for an accent of the letter before it."""
    import unicodedata  # only for names that are not ASCII

    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def name_typed(text: str) -> str:
    """A name on the command line as UTF-8 text, whatever the locale made of its bytes; what is no
    text in it is U+FFFD. A `type` of click's.
    """
    return os.fsencode(text).decode("utf-8", "replace")


def harmless(line: str) -> str:
    """A whole line of which parts come from outside, such as a program's path or a model's name."""
    return shown(line, LINE_CHARACTERS_MAX)


def harmless_lines(text: str) -> str:
    """Several lines of which parts come from outside; they stay as many lines."""
    return "\n".join(harmless(line) if line else "" for line in text.split("\n"))


# --- figures --------------------------------------------------------------------------------------


def count(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 request", "2,000 requests"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def count_text(number: int | None) -> str:
    """A count in four figures: 950, 12.3k, 4.56M; "-" for unknown."""
    if number is None:
        return UNKNOWN
    if abs(number) < 10_000:
        return f"{number:,}"
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number / 1000:.4g}k" if abs(number) < 999_950 else "1M"


def money_text(amount: Decimal | None, places: int = 2, *, at_least: bool = False) -> str:
    """Dollars rounded half to even; "unpriced" for unknown. More than nothing is never "$0.00": it
    is "<$0.01", or, of a sum that is `at_least` so much, told to its first digit.
    """
    if amount is None:
        return "unpriced"
    unit = Decimal(1).scaleb(-places)
    rounded = amount.quantize(unit, ROUND_HALF_EVEN)
    if not rounded and amount:
        if at_least:
            digit = Decimal(1).scaleb(amount.adjusted())
            return money_text(amount.quantize(digit, ROUND_FLOOR), -amount.adjusted())
        return f"<${unit:f}" if amount > 0 else f"-<${unit:f}"
    return f"-${-rounded:,f}" if rounded < 0 else f"${rounded:,f}"


def cost_text(amount: Decimal | None) -> str:
    """Dollars with four decimals, below a cent with six; "unpriced" for unknown."""
    return money_text(amount, 6 if amount is not None and 0 < abs(amount) < CENT else 4)


def sum_text(amount: Decimal | None, unpriced: int, places: int = 2) -> str:
    """A sum in a table: "+" stands behind one from which `unpriced` requests are missing."""
    text = money_text(amount, places, at_least=bool(unpriced))
    return text + ("+" if unpriced and amount is not None else "")


def sum_words(amount: Decimal | None, unpriced: int, text: str, what: str = "list price") -> str:
    """A sum in a sentence, `text` being the amount as it is printed there: "$1.20 list price", "at
    least $1.20 list price (4 requests unpriced)", "list price not known (4 requests unpriced)".
    """
    missing = f" ({count(unpriced, 'request')} unpriced)" if unpriced else ""
    if amount is None:
        return f"{what} not known{missing}"
    return f"{'at least ' if unpriced else ''}{text} {what}{missing}"


def free_note(free: str | None) -> str | None:
    """Why a request costs nothing, in a few words; None for an error, which says so itself."""
    return PENDING_NOTE if free == PENDING else None if free == "error" else free


def price_text(amount: Decimal | None, free: str | None, text: str) -> str:
    """The price of one request as `text`; of one whose price comes with a later answer, and which
    so is nothing by itself, what it waits for.
    """
    return PENDING if free == PENDING and not amount else text


def duration_text(milliseconds: float | None) -> str:
    """340 ms, 3.2 s, 2 min 05 s, 3 h 05 min, 2 d 03 h; "-" for unknown."""
    if milliseconds is None:
        return UNKNOWN
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.1f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def outcome_text(outcome: str, gap: str | None) -> str:
    """How a request ended, and why it is incomplete where that is known; "" for complete ones."""
    return f"incomplete: {shown(gap, GAP_CHARACTERS_MAX)}" if gap else OUTCOMES[outcome]


def local_time(at_ns: int, *, seconds: bool = False) -> str:
    """A time of the local zone, e.g. 2026-11-23 09:30; say the zone once beside it."""
    moment = datetime.fromtimestamp(at_ns // 1_000_000_000)
    return moment.strftime("%Y-%m-%d %H:%M:%S" if seconds else "%Y-%m-%d %H:%M")


def span_text(from_ns: int, to_ns: int, *, short: bool = False) -> str:
    """From when to when, of the local zone; with seconds where both are in one minute, and of one
    second that one. `short`: the day is told once where both are of one.
    """
    exact = to_ns // _MINUTE_NS == from_ns // _MINUTE_NS
    first, last = (local_time(at_ns, seconds=exact) for at_ns in (from_ns, to_ns))
    if exact and first == last:
        return first
    day = first[: first.index(" ") + 1]
    return f"{first} to {last.removeprefix(day) if short else last}"


def zone_text(*at_ns: int) -> str:
    """The local zone's name at these times: "CET", or "CET/CEST" where they lie in both."""
    moments = (datetime.fromtimestamp(at // 1_000_000_000).astimezone() for at in at_ns)
    return "/".join(dict.fromkeys(moment.tzname() or "local time" for moment in moments))


def implausible_words(number: int) -> str:
    """What to say of requests with amounts that no request can have, and how to see them."""
    one = number == 1
    return (
        f"{count(number, 'request')} {'states' if one else 'state'} amounts that no request can "
        f"have; {'it is' if one else 'they are'} in no sum. See: "
        "halton-meter events --flag implausible"
    )


# --- tables and bars ------------------------------------------------------------------------------


def colours() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, style: str) -> str:
    """`text` in a style, on a terminal only."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colours() else text


def bar(share: float, cells: int = BAR_CELLS) -> str:
    """A share of 0 to 1 as a bar, exact to an eighth of a cell; more than nothing shows."""
    eighths = round(max(0.0, min(1.0, share)) * cells * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(cells)


def sparkline(values: Sequence[Decimal | None]) -> str:
    """One character a value, scaled to the largest; unknown and nothing are a dot."""
    largest = max((value for value in values if value is not None), default=Decimal(0))
    if largest <= 0:
        return "·" * len(values)
    return "".join(_STEPS[min(7, int(value / largest * 8))] if value else "·" for value in values)


def problems_of(error: Exception) -> tuple[Problem, ...]:
    """What an error that came up to the command line says to people: the problems that it has, or
    the file that the system refused. None for all others: those are faults of ours.
    """
    from halton_meter.settings.config import ConfigError

    if isinstance(error, ConfigError | Unavailable):
        return error.problems
    if not isinstance(error, OSError) or not error.filename:
        return ()
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if not path:
        return ()
    fix = look_at(error, os.path.dirname(os.path.abspath(path)))
    return (Problem(f"{path}: {error.strerror or type(error).__name__}", fix),)


def unwritten(path: object, error: OSError, folder: object) -> Problem:
    """A file that could not be written, and where to look for why."""
    what = f"{path} cannot be written: {error.strerror or error}"
    return Problem(what, look_at(error, folder))


def look_at(error: OSError, folder: object, otherwise: str | None = None) -> str:
    """The command that shows why the system refused to write in a folder: the disk, or else who
    may, or `otherwise`.
    """
    quoted = shlex.quote(str(folder))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"df -h {quoted}"
    return otherwise or f"ls -ld {quoted}"


def columns() -> int:
    """How wide what is printed may be: of the terminal, else as COLUMNS says, else 80."""
    import shutil  # 2 ms, which most commands need not

    return shutil.get_terminal_size().columns


def lines_of_terminal() -> int:
    """How many lines stdout's terminal has; 0 where it is none."""
    import shutil

    return shutil.get_terminal_size().lines if sys.stdout.isatty() else 0


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str]) -> str:
    """Rows under a header, columns as wide as their widest cell, those in `right` right-aligned."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(_width(row[n]) for row in table) for n in range(len(header))]
    to_right = [name in frozenset(right) for name in header]
    lines = []
    for number, row in enumerate(table):
        cells = (
            " " * (width - _width(cell)) + cell
            if flush_right
            else cell + " " * (width - _width(cell))
            for cell, width, flush_right in zip(row, widths, to_right, strict=True)
        )
        line = "  ".join(cells).rstrip()
        lines.append(styled(line, "dim") if number == 0 else line)
    return "\n".join(lines)


def fitted(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[str],
    expendable: Sequence[str],
) -> str:
    """As `aligned`; on a terminal that is narrower, without as many of the `expendable` columns as
    it takes, the first of them first: wrapped lines are no table. A pipe gets all.
    """
    table = [list(header), *(list(row) for row in rows)]
    room = columns() if sys.stdout.isatty() else sys.maxsize
    for name in expendable:
        lines = zip(*table, strict=True)
        if sum(max(map(_width, column)) for column in lines) + 2 * (len(table[0]) - 1) <= room:
            break
        if name in table[0]:
            at = table[0].index(name)
            table = [[*row[:at], *row[at + 1 :]] for row in table]
    return aligned(table[0], table[1:], right)


def aligned_line(
    cells: Iterable[str], widths: Iterable[tuple[int, bool]], between: str = "  "
) -> str:
    """Cells in columns of fixed width (True: right-aligned), cut to them; those beyond follow."""
    left = iter(cells)
    fitted = [
        filled(shown(cell, width), width, right=right)
        for (width, right), cell in zip(widths, left, strict=False)
    ]
    return between.join([*fitted, *left]).rstrip()


def _width(text: str) -> int:
    return cells(_ESCAPE.sub("", text))
