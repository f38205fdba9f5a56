"""Tables, bars and figures as plain text. `rich` costs 60 ms at start-up; these need none of it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_EVEN, Decimal

UNKNOWN = "-"
BAR_CELLS = 12
LINE_CHARACTERS_MAX = 2000
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STEPS = "▁▂▃▄▅▆▇█"
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def colours() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, style: str) -> str:
    """`text` in a style, on a terminal only."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if colours() else text


def shown(text: str | None, width: int = 40) -> str:
    """A name from outside, made harmless and no wider than `width`.

    Names come from traffic: what could move the cursor, colour the screen or turn the direction of
    the text goes.
    """
    if text is None or not text:
        return UNKNOWN
    clean = text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= width else f"{clean[: width - 1]}…"


def harmless(line: str) -> str:
    """A whole line of which parts come from outside, such as a program's path or a model's name."""
    return shown(line, LINE_CHARACTERS_MAX)


def harmless_lines(text: str) -> str:
    """Several lines of which parts come from outside; they stay as many lines."""
    return "\n".join(map(harmless, text.split("\n")))


def count_text(count: int | None) -> str:
    """A count in four figures: 950, 12.3k, 4.56M; "-" for unknown."""
    if count is None:
        return UNKNOWN
    if abs(count) < 10_000:
        return f"{count:,}"
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if abs(count) >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count / 1000:.4g}k" if abs(count) < 999_950 else "1M"


def money_text(amount: Decimal | None, places: int = 2) -> str:
    """Dollars rounded half to even; "unpriced" for unknown. More than nothing is never "$0.00"."""
    if amount is None:
        return "unpriced"
    unit = Decimal(1).scaleb(-places)
    rounded = amount.quantize(unit, ROUND_HALF_EVEN)
    if not rounded and amount:
        return f"<${unit:f}" if amount > 0 else f"-<${unit:f}"
    return f"-${-rounded:,f}" if rounded < 0 else f"${rounded:,f}"


def duration_text(milliseconds: float | None) -> str:
    """340 ms, 3.2 s, 2 m 05 s; "-" for unknown."""
    if milliseconds is None:
        return UNKNOWN
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.1f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    return f"{minutes} m {seconds:02d} s"


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


def _width(text: str) -> int:
    return len(_ESCAPE.sub("", text))
