"""docs/cli.md and the manual page are what the commands' own help says."""

from __future__ import annotations

import click

from halton_meter.cli import main
from halton_meter.cli.pages import NAME, pages
from tools.cli_reference import MANUAL, REFERENCE, manual, reference

CURRENT = "run: python tools/cli_reference.py"


def test_the_reference_is_current() -> None:
    assert REFERENCE.read_text() == reference(), CURRENT


def test_the_manual_page_is_current() -> None:
    assert MANUAL.read_text() == manual(), CURRENT


def test_every_command_and_option_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    for page in pages(NAME, main):
        section = text.split(f"# {page.words}\n")[1].split("\n#")[0]
        assert "Examples:" not in section
        assert section.count("```sh") == 1
        command: click.Command = main
        for word in page.words.split()[1:]:
            assert isinstance(command, click.Group)
            found = command.get_command(click.Context(command), word)
            assert found is not None
            command = found
        for option in command.params:
            if option.param_type_name == "option" and not getattr(option, "hidden", False):
                assert all(f"{name}" in section for name in option.opts), CURRENT
