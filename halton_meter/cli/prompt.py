"""`halton-meter prompt`: today's cost and the plan's window, short enough for a shell's prompt.

Without options it never gets here: `entry.py` answers first, without click. Exit code: 0.
"""

from __future__ import annotations

import time

import click

EXAMPLES = """
    \b
    Examples:
      halton-meter prompt                            $3.10 5h 62%
      halton-meter prompt | tr -d '$'                3.10 5h 62%

    \b
    In your shell's start-up file:
      PS1='$(halton-meter prompt) \\w \\$ '                       (bash)
      setopt prompt_subst; RPROMPT='$(halton-meter prompt)'     (zsh)
      function fish_right_prompt; halton-meter prompt; end      (fish)
"""


@click.command(epilog=EXAMPLES)
def prompt() -> None:
    """Print a short text for a shell's prompt: what today cost, and the plan's window.

    It takes some 30 ms. Nothing is printed before something was metered; "not metered" while no
    service runs.
    """
    from halton_meter.statusline import quick

    click.echo(quick.answer("prompt", b"", time.time()))
