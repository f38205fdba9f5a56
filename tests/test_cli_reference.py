"""docs/cli.md is what the commands' own help says."""

from __future__ import annotations

from tools.cli_reference import REFERENCE, commands, halton_meter, reference

CURRENT = "run: python tools/cli_reference.py"


def test_the_reference_is_current() -> None:
    assert REFERENCE.read_text() == reference(), CURRENT


def test_every_command_and_option_is_in_the_reference() -> None:
    text = REFERENCE.read_text()
    for words, command in commands("halton-meter", halton_meter):
        section = text.split(f"# {words}\n")[1].split("\n#")[0]
        assert "Examples:" not in section
        assert section.count("```sh") == 1
        for option in command.params:
            if option.param_type_name == "option" and not getattr(option, "hidden", False):
                assert all(f"{name}" in section for name in option.opts), CURRENT
