"""CSV in which no name from outside can become a formula or a row.

Names of models, programs and projects come from traffic and from other users' processes. Excel,
LibreOffice and Google Sheets run a cell that begins with =, +, - or @ (some after blanks or quotes,
some in their full-width forms too), and end a row at a carriage return. Where the list separator is
a semicolon, as in most of Europe, a cell begins behind each of those, too. All CSV of this program
is written here. It knows nothing about the columns.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from typing import Any, TextIO

_FORMULA = re.compile(r"""(?:^|(?<=;))(?=[\s"']*[=+\-@＝＋－＠﹢﹣﹦﹫−])""")
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


def cell(value: Any) -> str:
    """A value as a cell: text without unprintable characters, behind an apostrophe where it would
    be a formula. Numbers stay numbers; unknown (None) is empty.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return str(value)
    # Direction marks, zero widths and the BOM would hide the first character.
    text = value if value.isprintable() else "".join(filter(str.isprintable, value))
    return text if _NUMBER.fullmatch(text) else _FORMULA.sub("'", text)


def write_rows(output: TextIO, rows: Iterable[Iterable[Any]]) -> int:
    """Write rows, every cell in quotes; return how many. `output` must not translate newlines."""
    writer = csv.writer(output, lineterminator="\n", quoting=csv.QUOTE_ALL)
    count = 0
    for row in rows:
        writer.writerow([cell(value) for value in row])
        count += 1
    return count
