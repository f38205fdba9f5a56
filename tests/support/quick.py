"""Which of a test's many cases `make test` runs; the others are slow, for `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

SHARE = 9


def slow(*case: Any, id: str | None = None) -> Any:
    """A case for `make test-all` only."""
    return pytest.param(*case, marks=pytest.mark.slow, id=id)


def first(cases: Sequence[Any], count: int = 1) -> list[Any]:
    """The first cases; the others are slow."""
    return [*cases[:count], *map(slow, cases[count:])]


def every(count: int, cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The first of each `count` cases; the others are slow."""
    return [slow(*case) if at % count else pytest.param(*case) for at, case in enumerate(cases)]


def spread(*axes: Iterable[Any]) -> list[Any]:
    """Every combination, one of SHARE not slow, so chosen that each value meets most others."""
    combined = itertools.product(*(enumerate(axis) for axis in axes))
    return [
        pytest.param(
            *(value for _, value in each),
            id="-".join(str(value) for _, value in each),
            marks=[pytest.mark.slow] if sum(index for index, _ in each) % SHARE else [],
        )
        for each in combined
    ]
