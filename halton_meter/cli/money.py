"""Dollars as people type them: 20, 12.50, $20."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import click

from halton_meter.settings.budgets import NotMoney, money


class Dollars(click.ParamType[Decimal]):
    """An option's or an argument's amount, exact to the cent."""

    name = "usd"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        """The amount; wrong usage for anything else."""
        if isinstance(value, Decimal):
            return value
        try:
            return money(str(value))
        except NotMoney as error:
            self.fail(f"it {error}", param, ctx)
