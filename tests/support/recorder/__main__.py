"""Record fixtures: `python -m tests.support.recorder [NAME…]`; without names, what is missing."""

from __future__ import annotations

import sys

from tests.support.recorder.scenario import FOLDER
from tests.support.recorder.scenarios import every


def main(names: list[str]) -> None:
    """Record the named scenarios, `all`, or those without a file."""
    for scenario in every():
        missing = not (FOLDER / f"{scenario.name}.pcapng").exists()
        if names == ["all"] or scenario.name in names or (not names and missing):
            path = scenario.save()
            print(f"{path.name}: {path.stat().st_size:,} bytes, {len(scenario.expected)} events")


main(sys.argv[1:])
