"""Where the program begins: the status line is answered before anything heavy is imported.

`halton-meter statusline` and `halton-meter prompt` run every few seconds and must be there at once;
click alone takes longer to import than they have. Everything else is `halton_meter.cli`.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a word, also while it is still imported."""
    try:
        _run(sys.argv[1:])
    except KeyboardInterrupt:
        from halton_meter.problem import INTERRUPTED

        sys.exit(INTERRUPTED)


def _run(words: list[str]) -> None:
    if words in (["statusline"], ["prompt"]):
        from halton_meter.statusline import quick

        if quick.is_quick(words):
            quick.main(words[0])
            return
    from halton_meter.cli import main as command_line

    command_line(prog_name="halton-meter")
