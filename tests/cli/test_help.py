"""Every command says in its help what it does, and shows how it is called."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from halton_meter.cli import _COMMANDS, main


def all_commands() -> Iterator[tuple[str, ...]]:
    """Every command and, of the groups, every command in them."""
    for name in _COMMANDS:
        yield (name,)
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group):
            yield from ((name, each) for each in command.commands)


@pytest.mark.parametrize("words", [(), *all_commands()], ids=" ".join)
def test_every_command_has_a_first_sentence_and_examples(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0
    usage, said, *_ = done.stdout.split("\n\n")
    assert usage.startswith("Usage: ")
    first = " ".join(said.split())
    assert first[0].isupper()
    assert first.split()[0].rstrip(",") not in ("Examples:", "Options:", "The")
    assert ". " in f"{first} "
    examples = done.stdout.split("Examples:\n")[1].split("\n\n")[0].splitlines()
    called = " ".join(("halton-meter", *words))
    assert any(called in line for line in examples)


def test_run_says_what_it_does_and_when_sudo_is_needed() -> None:
    said = CliRunner().invoke(main, ["run", "--help"]).stdout
    assert "Meter one command and print what it cost" in said
    assert "sudo halton-meter run -- " in said
