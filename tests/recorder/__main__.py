"""Record fixtures: `python -m tests.recorder [NAME…]`; without names, those that are missing."""

from __future__ import annotations

import sys

from tests.recorder.scenario import FOLDER
from tests.recorder.scenarios import every


def main(names: list[str]) -> None:
    """Record the named scenarios, `all`, or those without a file."""
    for scenario in every():
        missing = not (FOLDER / f"{scenario.name}.pcapng").exists()
        if names == ["all"] or scenario.name in names or (not names and missing):
            path = scenario.save()
            print(f"{path.name}: {path.stat().st_size:,} bytes, {len(scenario.expected)} events")


main(sys.argv[1:])
