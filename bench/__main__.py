"""Run every benchmark in this folder, or those named: `python -m bench [--toy] [wire report …]`.

Each is a module `<name>_bench.py` with a `main(toy: bool) -> None` that prints its own lines. With
`--toy` each measures little, in seconds: its figures mean nothing, but CI learns that it still
runs. One that fails says why and the others go on; the exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run the benchmarks in alphabetical order and return 1 if one failed."""
    names = sorted(
        path.stem.removesuffix("_bench") for path in Path(__file__).parent.glob("*_bench.py")
    )
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--toy", action="store_true", help="measure little, to see that all run")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    options = parser.parse_args()
    failed = []
    for name in options.names or names:
        if name not in names:
            print(f"no benchmark called {name!r}; there are: {', '.join(names)}", file=sys.stderr)
            return 2
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        try:
            importlib.import_module(f"bench.{name}_bench").main(options.toy)
        except Exception as error:  # one broken benchmark must not hide the others' figures
            failed.append(name)
            traceback.print_exc()
            print(f"FAILED: {type(error).__name__}: {error}")
        print(f"   ({time.perf_counter() - started:.1f} s)")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
