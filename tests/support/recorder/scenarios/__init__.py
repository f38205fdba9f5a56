"""Every scenario, one file a family; bodies are made up for this project."""

from __future__ import annotations

import importlib

from tests.support.recorder.scenario import Scenario

FAMILIES = ("anthropic", "openai", "google", "others", "damaged")


def every() -> list[Scenario]:
    """All scenarios; names are unique."""
    found: list[Scenario] = []
    for family in FAMILIES:
        found += importlib.import_module(f"{__name__}.{family}").scenarios()
    names = [scenario.name for scenario in found]
    assert len(names) == len(set(names)), "two scenarios share a name"
    return found
