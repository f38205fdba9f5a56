"""How long a person waits before the program does anything: cold processes, two stores.

    python -m bench startup                               a thousand events, and three million
    HALTON_BENCH_EVENTS=100000 python -m bench startup    another number in the large store

The promise is 0.15 s over the small store and 0.4 s over the large one. Under load, wall-clock
time says little, so the processor time is printed beside it. `python -X importtime -m
halton_meter report` shows where it goes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.report_bench import EVENTS, TOY_EVENTS, best, fill, show

RUNS, TOY_RUNS = 10, 1
SMALL_STORE_EVENTS = 1_000
AIM_SECONDS, LARGE_AIM_SECONDS = 0.15, 0.4
COMMANDS = (
    ("report",),
    ("events", "--limit", "10"),
    ("tail",),
    ("session", "list"),
    ("session", "show", "latest"),
)


def main(toy: bool = False) -> None:
    """Print the figures, and each as a multiple of what Python alone takes."""
    large_events = TOY_EVENTS if toy else EVENTS[0]
    program, runs = str(Path(sys.executable).with_name("halton-meter")), TOY_RUNS if toy else RUNS
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "small"
        fill(home, SMALL_STORE_EVENTS)
        python = best([sys.executable, "-c", "pass"], home, runs)
        show("python -c pass", python)
        for words in (("--version",), *COMMANDS):
            taken = best([program, *words], home, runs)
            multiple = taken[1] / python[1]
            note = f"{multiple:.1f} x python, aim: {AIM_SECONDS} s"
            show(" ".join(("halton-meter", *words)), taken, note)
        home = Path(scratch) / "large"
        fill(home, large_events)
        for words in COMMANDS:
            taken = best([program, *words], home, runs)
            show(
                f"{' '.join(words)}, {large_events:,} events", taken, f"aim: {LARGE_AIM_SECONDS} s"
            )


if __name__ == "__main__":
    main()
