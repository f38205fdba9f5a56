"""Writes what the commands' own help says: docs/cli.md, and the manual page man/halton-meter.1.

    python tools/cli_reference.py           # writes both
    python tools/cli_reference.py --check   # exit 1 when one is not current

`halton_meter/cli/pages.py` reads the commands and draws them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from halton_meter import __version__
from halton_meter.cli import main as halton_meter
from halton_meter.cli.pages import NAME, manual_page, markdown, pages

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "cli.md"
MANUAL = ROOT / "man" / "halton-meter.1"
HEAD = """\
# Commands

<!-- Written by tools/cli_reference.py from the commands' own help: change that instead. -->

- `halton-meter COMMAND --help` prints the same text.
- Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C (0 for what runs until
  then, as `tail -f`), unless the command says otherwise.
- A failure prints `halton-meter: what happened` and `fix: what to do` on stderr.
- Times that you read and type are local, unless you type an offset or `Z`. JSON, CSV and exports
  hold UTC.
- Data is in `~/.halton-meter`, or in the folder that `HALTON_METER_HOME` names.
"""


def reference() -> str:
    """The whole of docs/cli.md."""
    parts = [HEAD]
    for page in pages(NAME, halton_meter):
        level = "##" if page.words.count(" ") < 2 else "###"
        parts.append(f"{level} {page.words}\n\n{markdown(page)}\n")
    return "\n".join(parts)


def manual() -> str:
    """The manual page with all commands in it, as the wheel ships it."""
    first, *others = pages(NAME, halton_meter)
    # Without a date, which would make every build another.
    return manual_page(first._replace(commands=()), __version__, "", others)


def main() -> int:
    """Write the files, or check them."""
    stale = [(path, made) for path, made in _made() if _text(path) != made]
    for path, made in stale:
        if "--check" in sys.argv[1:]:
            print(f"{path} is not current: python tools/cli_reference.py", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made)
    return int(bool(stale) and "--check" in sys.argv[1:])


def _made() -> tuple[tuple[Path, str], ...]:
    return (REFERENCE, reference()), (MANUAL, manual())


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
