"""Run every benchmark in this folder, or those named: `python -m bench [wire report …]`.

Each is a module `<name>_bench.py` with a `main() -> None` that prints its own lines. One that
cannot run here says why and the others go on; the exit code tells whether all ran.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the benchmarks in alphabetical order and return 1 if one failed."""
    names = sorted(
        path.stem.removesuffix("_bench") for path in Path(__file__).parent.glob("*_bench.py")
    )
    wanted = sys.argv[1:] or names
    failed = []
    for name in wanted:
        if name not in names:
            print(f"no benchmark called {name!r}; there are: {', '.join(names)}", file=sys.stderr)
            return 2
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        try:
            importlib.import_module(f"bench.{name}_bench").main()
        except Exception as error:  # one broken benchmark must not hide the others' figures
            failed.append(name)
            print(f"FAILED: {type(error).__name__}: {error}")
        print(f"   ({time.perf_counter() - started:.1f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
