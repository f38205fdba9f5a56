"""A command's help as data, and drawn as Markdown (docs/cli.md) and as a manual page.

It reads click's commands, not their printed help, so that click's version changes nothing. What a
command does, and its options, are written beside the command and nowhere else.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import click

NAME = "halton-meter"
_EXAMPLE_GAP = re.compile(r"\s{2,}")


class Option(NamedTuple):
    """An option as it is typed ("--since TIME"), and what it does."""

    typed: str
    help: str


class Page(NamedTuple):
    """A command's help. `words` is the command as it is typed; `paragraphs` hold no line breaks.

    `examples` are whole lines: a call, and behind two spaces what it is for. `commands` are those
    in a group, with their first sentences.
    """

    words: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]
    examples: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]

    @property
    def summary(self) -> str:
        """The first sentence, without its full stop."""
        first = self.paragraphs[0] if self.paragraphs else ""
        return re.split(r"\.(?:\s|$)", first, maxsplit=1)[0]


def pages(words: str, command: click.Command) -> Iterator[Page]:
    """The command's page, then those of the commands in it."""
    yield page(words, command)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from pages(f"{words} {name}", inner)


def page(words: str, command: click.Command) -> Page:
    """One command's page."""
    parts = [*_parts(command.help), *_parts(command.epilog)]
    options = [each for each in command.params if isinstance(each, click.Option)]
    commands: list[tuple[str, str]] = []
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                commands.append((name, inner.get_short_help_str(200)))
    return Page(
        words,
        _usage(words, command),
        tuple(text for text, is_examples in parts if not is_examples),
        tuple(_option(each) for each in options if not each.hidden),
        tuple(line for text, is_examples in parts if is_examples for line in text.split("\n")),
        tuple(commands),
    )


def _usage(words: str, command: click.Command) -> str:
    arguments = [_argument(each) for each in command.params if isinstance(each, click.Argument)]
    if isinstance(command, click.Group):
        arguments = ["COMMAND"]
    return " ".join((words, "[OPTIONS]", *arguments))


def _argument(argument: click.Argument) -> str:
    name = (argument.metavar or (argument.name or "").upper()).removesuffix("...").strip("[]")
    repeated = "" if argument.nargs == 1 or name.endswith("…") else "…"
    return f"{name}{repeated}" if argument.required else f"[{name}]{repeated}"


def _option(option: click.Option) -> Option:
    names = ", ".join((*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f" {_value(option)}"
    shown = option.show_default
    default = f" Default: {shown if isinstance(shown, str) else option.default}." if shown else ""
    return Option(f"{names}{value}", f"{option.help}{default}")


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(option.type.choices)
    return option.type.name.upper()


def _parts(text: str | None) -> Iterator[tuple[str, bool]]:
    """Paragraphs of a help text, and whether each holds the examples."""
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        kept = inspect.cleandoc(paragraph.removeprefix("\b").strip("\n"))
        if kept.startswith("Examples:"):
            yield inspect.cleandoc("\n" + kept.partition("\n")[2]), True
        elif kept:
            yield " ".join(kept.split()), False


# --- Markdown -------------------------------------------------------------------------------------


def markdown(each: Page) -> str:
    """A section's text, below its heading."""
    parts = [f"    {each.usage}", *each.paragraphs]
    if each.options:
        parts.append("\n".join(f"- `{option.typed}`: {option.help}" for option in each.options))
    if each.examples:
        parts.append("```sh\n{}\n```".format("\n".join(each.examples)))
    return "\n\n".join(parts)


# --- manual pages ---------------------------------------------------------------------------------

EXIT_STATUS = (
    ("0", "Done."),
    ("1", "Failed; the reason and the next command are on standard error."),
    ("2", "Wrong usage."),
)
ENVIRONMENT = (
    ("HALTON_METER_HOME", "The data folder, in place of ~/.halton-meter."),
    ("HALTON_PROJECT", "The project of the programs that have it."),
    ("NO_COLOR", "Print no colours."),
)
FILES = (
    ("~/.halton-meter/config.toml", "Your settings: halton-meter config."),
    ("~/.halton-meter/meter.duckdb", "What was metered."),
    ("/etc/halton-meter/config.toml", "Root's settings: who is metered."),
)


def manual_page(each: Page, version: str, date: str, inner: Iterable[Page] = ()) -> str:
    """A manual page of section 1; `inner` are pages of further commands, as sections of it."""
    title = each.words.replace(" ", "-").upper()
    lines = [
        f".\\\" Written from the command's own help ({NAME} man): change that instead.",
        f'.TH {_quoted(title)} 1 {_quoted(date)} {_quoted(f"{NAME} {version}")} "User Commands"',
        ".SH NAME",
        f"{_roff(each.words.replace(' ', '-'))} \\- {_roff(_lower(each.summary))}",
        ".SH SYNOPSIS",
        f".B {_roff(each.words)}",
        _roff(each.usage.removeprefix(each.words).strip()),
        ".SH DESCRIPTION",
        *_paragraphs(each.paragraphs),
        *_tagged(".SH OPTIONS", each.options),
        *_tagged(".SH COMMANDS", each.commands),
    ]
    for other in inner:
        lines += [
            f".SH {_quoted(other.words.removeprefix(NAME).strip().upper())}",
            f".B {_roff(other.words)}",
            _roff(other.usage.removeprefix(other.words).strip()),
            *(f".PP\n{_roff(text)}" for text in other.paragraphs),
            *_tagged(None, other.options),
            *_examples(other.examples, ".PP"),
        ]
    lines += _examples(each.examples, ".SH EXAMPLES")
    lines += _tagged(".SH EXIT STATUS", EXIT_STATUS)
    lines += _tagged(".SH ENVIRONMENT", ENVIRONMENT)
    lines += _tagged(".SH FILES", FILES)
    if each.words != NAME:
        lines += [".SH SEE ALSO", f".BR {NAME} (1)"]
    return "\n".join(line for line in lines if line) + "\n"


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if number:
            yield ".PP"
        yield _roff(text)


def _tagged(heading: str | None, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for number, (tag, text) in enumerate(rows):
        if number == 0 and heading is not None:
            yield heading
        yield ".TP"
        yield f".B {_roff(tag)}"
        yield _roff(text)


def _examples(lines: Iterable[str], heading: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if number == 0:
            yield heading
        call, *comment = _EXAMPLE_GAP.split(line, maxsplit=1)
        yield ".TP"
        yield f".B {_roff(call)}"
        yield _roff(comment[0]) if comment else "\\&"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _quoted(text: str) -> str:
    return '"{}"'.format(_roff(text).replace('"', "\\(dq"))


def _roff(text: str) -> str:
    """Text as roff reads it: its own signs escaped, and no line that looks like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "\\&...")
    escaped = escaped.replace("\n", " ")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped
