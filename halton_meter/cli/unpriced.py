"""Why a request has no price, read from its flags, and the command that would give it one.

A flag is "unpriced:NAME" or "unpriced:NAME=VALUE", as `pricing.bill` writes it: NAME is "model",
"usage", "date", a condition such as "service_tier", or what is billed, such as "pages".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from halton_meter.cli.output import cells, shown

PREFIX = "unpriced:"
COMMAND_CELLS_MAX = 200


class Reason(NamedTuple):
    """One reason: its name, and a value where the flag has one."""

    name: str
    value: str = ""

    def __str__(self) -> str:
        """The reason as the flag has it, without the prefix."""
        return f"{self.name}={self.value}" if self.value else self.name

    def words(self, model: str | None) -> str:
        """The reason as people read it."""
        if self.name == "model":
            if not self.value:
                return "no model is named; if you know it: halton-meter pricing explain --model M"
            return f"the model {self.value!r} is not in the price book"
        if self.name == "usage":
            return "no usage is stated"
        if self.name == "date":
            return f"{model} had no price on {self.value}"
        return f"{model} has no price {'under' if self.value else 'for'} {self}"

    def set_command(self, provider: str, model: str | None) -> str | None:
        """The command that sets the price; None where a price would not help."""
        from halton_meter.model import TOKEN_NAMES
        from halton_meter.report import set_price_command

        if self.name == "usage" or (self.name == "model" and not self.value):
            return None
        command = set_price_command(provider, self.value if self.name == "model" else model)
        if command is None or self.value:
            return command
        head, _, _ = command.partition(" --rate ")
        rate = self.name if self.name in TOKEN_NAMES else f"{self.name}_each"
        return f"{head} --rate {rate}=USD"


def reason_of(flag: str) -> Reason | None:
    """The reason that a flag states; None for a flag about something else."""
    if not flag.startswith(PREFIX):
        return None
    name, _, value = flag.removeprefix(PREFIX).partition("=")
    return Reason(name, value)


def reasons_of(flags: Iterable[str]) -> list[Reason]:
    """Every reason among an event's flags."""
    return [reason for flag in flags if (reason := reason_of(flag)) is not None]


def set_price_lines(commands: Iterable[str | None]) -> list[str]:
    """A line with the first of these commands that has room in it, if one has: what is cut off
    would set the price of another model.
    """
    whole = (each for each in commands if each and cells(each) <= COMMAND_CELLS_MAX)
    command = next(whole, None)
    return [f"  Set a price: {shown(command, COMMAND_CELLS_MAX)}"] if command else []
