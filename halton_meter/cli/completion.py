"""`halton-meter completion SHELL`: prints what makes the Tab key complete our commands.

The script is click's own; it asks this program, which imports no command to name commands
(`LazyGroup.shell_complete`). Exit codes: 0 printed; 1 the shell is too old; 2 wrong usage.
"""

from __future__ import annotations

import click

from halton_meter.cli.output import fail
from halton_meter.cli.pages import NAME
from halton_meter.problem import Problem

VARIABLE = "_HALTON_METER_COMPLETE"
_WHERE = {
    "bash": f"echo 'eval \"$({NAME} completion bash)\"' >> ~/.bashrc",
    "zsh": f"echo 'eval \"$({NAME} completion zsh)\"' >> ~/.zshrc",
    "fish": f"{NAME} completion fish > ~/.config/fish/completions/{NAME}.fish",
}


@click.command(
    epilog="""\b
Examples:
  halton-meter completion bash
  halton-meter completion fish
"""
)
@click.argument("shell", type=click.Choice(sorted(_WHERE)), metavar="bash|zsh|fish")
def completion(shell: str) -> None:
    """Print the script that completes commands and options in your shell.

    In bash, add to ~/.bashrc: eval "$(halton-meter completion bash)". In zsh the same in ~/.zshrc,
    behind compinit. In fish: halton-meter completion fish >
    ~/.config/fish/completions/halton-meter.fish
    """
    from click.shell_completion import get_completion_class

    from halton_meter.cli import main

    found = get_completion_class(shell)
    assert found is not None
    try:
        script = found(main, {}, NAME, VARIABLE).source()
    except RuntimeError as error:  # bash before 4.4
        fail(Problem(str(error), f"use a newer {shell}"))
    # Not under the completed program's name: it need not be on PATH where the script is made.
    click.echo(f"# {shell}: {_WHERE[shell]}")
    click.echo(script)
