"""Writes docs/cli.md from the commands' own help.

    python tools/cli_reference.py           # writes docs/cli.md
    python tools/cli_reference.py --check   # exit 1 when it is not current

It reads click's commands, not their printed help, so that click's version changes nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from halton_meter.cli import main as halton_meter

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """\
# Commands

<!-- Written by tools/cli_reference.py from the commands' own help: change that instead. -->

- `halton-meter COMMAND --help` prints the same text.
- Exit codes: 0 done, 1 failed, 2 wrong usage, unless the command says otherwise.
- A failure prints `halton-meter: what happened` and `fix: what to do` on stderr.
- Times that you read and type are local, unless you type an offset or `Z`. JSON, CSV and exports
  hold UTC.
- Data is in `~/.halton-meter`, or in the folder that `HALTON_METER_HOME` names.
"""


def reference() -> str:
    """The whole file."""
    parts = [HEAD]
    for words, command in commands("halton-meter", halton_meter):
        level = "##" if words.count(" ") < 2 else "###"
        parts.append(f"{level} {words}\n\n" + "\n\n".join(_section(words, command)) + "\n")
    return "\n".join(parts)


def commands(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """The command as it is typed, then those in it."""
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(f"{words} {name}", inner)


def _section(words: str, command: click.Command) -> Iterator[str]:
    yield f"    {_usage(words, command)}"
    paragraphs = [*_paragraphs(command.help), *_paragraphs(command.epilog)]
    yield from (each for each in paragraphs if not each.startswith("```"))
    options = [each for each in command.params if isinstance(each, click.Option)]
    if lines := [_option_line(each) for each in options if not each.hidden]:
        yield "\n".join(lines)
    yield from (each for each in paragraphs if each.startswith("```"))


def _usage(words: str, command: click.Command) -> str:
    arguments = [_argument(each) for each in command.params if isinstance(each, click.Argument)]
    if isinstance(command, click.Group):
        arguments = ["COMMAND"]
    return " ".join((words, "[OPTIONS]", *arguments))


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    repeated = "" if argument.nargs == 1 or name.endswith("…") else "…"
    return f"{name}{repeated}" if argument.required else f"[{name}]{repeated}"


def _option_line(option: click.Option) -> str:
    names = ", ".join((*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f" {_value(option)}"
    shown = option.show_default
    default = f" Default: {shown if isinstance(shown, str) else option.default}." if shown else ""
    return f"- `{names}{value}`: {option.help}{default}"


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    return {"integer range": "N", "path": "PATH"}.get(option.type.name, option.type.name.upper())


def _paragraphs(text: str | None) -> Iterator[str]:
    """Paragraphs of a help text; one that click must not wrap (\\b), the examples, as code."""
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        kept = inspect.cleandoc(paragraph.removeprefix("\b").strip("\n"))
        if kept.startswith("Examples:"):
            lines = inspect.cleandoc("\n" + kept.partition("\n")[2])
            yield f"```sh\n{lines}\n```"
        elif kept:
            yield " ".join(kept.split())


def main() -> int:
    """Write the file, or check it."""
    made = reference()
    if "--check" not in sys.argv[1:]:
        REFERENCE.write_text(made)
        return 0
    if REFERENCE.read_text() == made:
        return 0
    print(f"{REFERENCE} is not current: python tools/cli_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
