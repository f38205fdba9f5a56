"""Attack every border for a while: `python -m tests.fuzz --minutes 5`; see `make fuzz`.

Prints a line a border, and for every fault where its traceback is kept and the command that
repeats it. The exit code is 1 when there was one.
"""

from __future__ import annotations

import argparse
import importlib
import secrets
import sys
from pathlib import Path

from tests.fuzz.attack import Fault, Findings

BORDERS = ("captures", "wire", "readers", "programs", "segments", "frames", "live")
FOLDER = Path(".cache") / "fuzz"


def run(
    border: str,
    seed: int,
    seconds: float | None = None,
    cases: int | None = None,
    only: int | None = None,
) -> Findings:
    """Attack one border."""
    attacked = importlib.import_module(f"tests.fuzz.{border}")
    findings: Findings = attacked.run(seed, seconds, cases, only)
    return findings


def keep(fault: Fault, folder: Path = FOLDER) -> Path:
    """Write down what it takes to repeat a fault; return where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fault.border}-{fault.seed}-{fault.number}.txt"
    path.write_text(f"{fault.command}\n\n{fault.what}", errors="backslashreplace")
    return path


def main() -> int:
    """Run, print, and say by the exit code whether all was well."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("border", nargs="?", choices=BORDERS, help="default: all of them")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all together (default 5)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--case", type=int, help="run this case only")
    options = parser.parse_args()
    borders = (options.border,) if options.border else BORDERS
    seconds = None if options.case is not None else options.minutes * 60 / len(borders)
    print(f"seed {options.seed}\n{'border':<10} {'inputs':>9} {'slowest':>9} {'faults':>7}")
    faults = 0
    for border in borders:
        found = run(border, options.seed, seconds, only=options.case)
        slowest = f"{found.slowest_seconds:.2f} s"
        print(f"{border:<10} {found.tried:>9,} {slowest:>9} {len(found.faults):>7}", flush=True)
        for fault in found.faults:
            print(f"  {fault.what.strip().splitlines()[-1][:150]}\n    {keep(fault)}")
            print(f"    again: {fault.command}")
        faults += len(found.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
