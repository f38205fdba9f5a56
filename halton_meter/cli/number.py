"""Whole numbers as people type them: help calls one N, and bounds are told in words."""

from __future__ import annotations

from typing import Any

import click


class Whole(click.ParamType[int]):
    """An option's whole number from `low` on, up to `high` where there is a most."""

    name = "n"

    def __init__(self, low: int, high: int | None = None) -> None:
        self._low, self._high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; wrong usage for anything else."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if number < self._low or (self._high is not None and number > self._high):
            bounds = f"of {self._low} or more"
            if self._high is not None:
                bounds = f"from {self._low} to {self._high:,}"
            self.fail(f"write a number {bounds}, not {value}", param, ctx)
        return number
