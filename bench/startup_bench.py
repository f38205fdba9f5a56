"""How long a person waits before the program does anything: cold processes, a small store.

`--version`, `report` and `session` are the promise (0.15 s). Under load, wall-clock time says
little, so the processor time is printed beside it. `python -X importtime -m halton_meter report`
shows where it goes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.report_bench import best, fill, show

RUNS, TOY_RUNS = 10, 1
SMALL_STORE_EVENTS = 1_000
AIM_SECONDS = 0.15


def main(toy: bool = False) -> None:
    """Print the figures, and each as a multiple of what Python alone takes."""
    program = str(Path(sys.executable).with_name("halton-meter"))
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        fill(home, SMALL_STORE_EVENTS)
        runs = TOY_RUNS if toy else RUNS
        python_s = best([sys.executable, "-c", "pass"], home, runs)[1]
        for command in (
            [sys.executable, "-c", "pass"],
            [program, "--version"],
            [program, "report"],
            [program, "events", "--limit", "10"],
            [program, "tail"],
            [program, "session", "list"],
            [program, "session", "show", "latest"],
        ):
            name = " ".join([Path(command[0]).name, *command[1:]])
            taken = best(command, home, runs)
            show(name, taken, f"{taken[1] / python_s:.1f} x python, aim: {AIM_SECONDS} s")


if __name__ == "__main__":
    main()
