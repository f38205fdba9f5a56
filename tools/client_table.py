"""Writes the table of clients in docs/capture.md from what the tests proved.

    make clients                        # runs every client, and keeps the results
    python tools/client_table.py        # writes the table between its markers
    python tools/client_table.py --check  # exit 1 when the table is out of date

It reads `tests/lab/real_clients/results.json` alone: what no test tried stays empty.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "capture.md"
RESULTS = ROOT / "tests" / "lab" / "real_clients" / "results.json"
BEGIN, END = "<!-- clients: tools/client_table.py -->", "<!-- /clients -->"
WAYS = ("uprobes", "key log", "proxy")
HEAD = "| client | version tried | TLS stack | " + " | ".join(WAYS) + " |"

Row = dict[str, str]


def table(rows: list[Row]) -> str:
    """The table in Markdown: a line for each client and TLS stack."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["client"], row["stack"]].append(row)
    lines = [HEAD, "|---" * (3 + len(WAYS)) + "|"]
    for (client, stack), members in sorted(groups.items(), key=lambda each: each[0][0].lower()):
        versions = sorted({row["version"] for row in members}, key=_numbers)
        cells = [_cell(members, way, versions) for way in WAYS]
        lines.append(f"| {client} | {', '.join(versions)} | {stack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: list[Row], way: str, versions: list[str]) -> str:
    """The results, each with its versions where not all versions were tried that way."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["way"] == way:
            found[row["result"]].append(row["version"])
    return "; ".join(
        result if len(tried) == len(versions) else f"{result} ({', '.join(sorted(tried))})"
        for result, tried in sorted(found.items())
    )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def with_table(text: str, made: str) -> str:
    """The document with this table. Raises ValueError where the markers are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> int:
    """Write or check; see the file's head."""
    text = DOCUMENT.read_text()
    wanted = with_table(text, table(json.loads(RESULTS.read_text())))
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print("docs/capture.md: the table of clients is old; run: python tools/client_table.py")
        return int(wanted != text)
    DOCUMENT.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
