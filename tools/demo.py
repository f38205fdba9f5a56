"""`make demo`: the main job once, end to end, on real recorded traffic, ending in a priced report.

As root on a Linux with eBPF it first meters a real client live, inside the lab (a network
namespace with local stand-ins for the providers; nothing leaves the machine). Then, for everybody,
it replays fixtures/pcaps into a store of its own under --home and shows the report. It never
touches ~/.halton-meter.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HALTON_METER = [sys.executable, "-m", "halton_meter"]


def step(title: str) -> None:
    """Print a heading between the commands' own output."""
    print(f"\n\033[1m== {title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def run(arguments: list[str], home: Path) -> int:
    """Run halton-meter in the demo's own data folder, and show the command as a user types it."""
    print("$ halton-meter " + " ".join(arguments), flush=True)
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    command = [*HALTON_METER, *arguments]
    return subprocess.run(command, env=environment, check=False, cwd=ROOT).returncode


def live(home: Path) -> int:
    """Meter a real client in the lab when this process may load probes; say why when it may not."""
    if sys.platform != "linux" or os.geteuid() != 0:
        print("Skipped: metering live needs root on Linux. Try: sudo make demo")
        return 0
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "tests.support.lab", "demo"], env=environment, check=False, cwd=ROOT
    ).returncode


def main() -> int:
    """Run the steps; the first that fails ends the demo with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=ROOT / ".cache" / "demo")
    parser.add_argument("--recorded-only", action="store_true", help="meter nothing live")
    options = parser.parse_args()
    home = options.home.resolve()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)

    code = 0
    if not options.recorded_only:
        step("A client, metered live")
        if live(home) != 0:
            print("This machine cannot meter live (the reason is above); what follows can.")
    if code == 0:
        step("Recorded traffic, metered and stored")
        code = run(["replay", "fixtures/pcaps", "--store", "--quiet"], home)
    if code == 0:
        step("What it cost")
        code = run(["report", "--by", "provider"], home)
    if code == 0:
        print(f"\nFor scripts: HALTON_METER_HOME={shlex.quote(str(home))} {typed()} report --json")
    return code


def typed() -> str:
    """The command by its whole path: this environment's folder is not on the PATH."""
    path = Path(sys.executable).parent / "halton-meter"
    return shlex.join([str(path)] if path.exists() else HALTON_METER)


if __name__ == "__main__":
    raise SystemExit(main())
