"""How long Claude Code waits for its status line: a whole process, with a snapshot of full size.

    python -m bench statusline

The promise: under 50 ms warm, under 100 ms cold. "Cold" is after the kernel was asked to forget the
files that the process reads (what other processes have mapped, such as Python itself on a machine
that runs it, stays). An editable install takes some 12 ms more than an installed wheel, as every
Python process there imports the finder of editable packages; so `python -c pass` stands beside it.
`python -X importtime -m halton_meter statusline` shows where the rest goes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

from bench.report_bench import show
from halton_meter.live.snapshot_document import PENDING_MAX, SESSIONS_MAX
from halton_meter.live.snapshot_writer import SnapshotWriter
from halton_meter.model import (
    Basis,
    Caller,
    Certainty,
    LimitKind,
    LimitReading,
    Outcome,
    PricedEvent,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)
from halton_meter.statusline.snapshot import NAME

RUNS, TOY_RUNS = 20, 1
WARM_S, COLD_S = 0.050, 0.100
S = 1_000_000_000
# The files that the process opens.
_FILES = (
    "import sys; from halton_meter import entry; from halton_meter.statusline import quick\n"
    "for module in list(sys.modules.values()):\n"
    "    for name in (getattr(module, '__file__', 0), getattr(module, '__cached__', 0)):\n"
    "        print(name) if name else None\n"
    "print(sys.executable)"
)


def main(toy: bool = False) -> None:
    """Print the figures, and each as a multiple of what Python alone takes."""
    program = str(Path(sys.executable).with_name("halton-meter"))
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        writer = fill(home)
        size = (home / NAME).stat().st_size
        print(f"snapshot of {SESSIONS_MAX} sessions, {PENDING_MAX} pending events: {size:,} bytes")
        runs = TOY_RUNS if toy else RUNS
        python = best([sys.executable, "-c", "pass"], home, runs)
        show("python -c pass", python)
        for name in ("statusline", "prompt"):
            warm = best([program, name], home, runs)
            show(f"{name}, warm", warm, _against(warm, python, WARM_S))
        names = subprocess.run(
            [sys.executable, "-c", _FILES], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        cold = best([program, "statusline"], home, max(runs // 4, 1), lambda: forget(names))
        show("statusline, cold", cold, _against(cold, python, COLD_S))
        writer.end()


def _against(taken: tuple[float, float], python: tuple[float, float], aim_s: float) -> str:
    return f"{taken[1] / python[1]:.2f} x python, aim: {aim_s * 1000:.0f} ms"


def fill(home: Path) -> SnapshotWriter:
    """A snapshot with all that it can hold."""
    writer = SnapshotWriter(home)
    writer.add([_event(number) for number in range(PENDING_MAX + 100)])
    writer.tick(time.monotonic() + 60)
    budgets = {"budgets": [{"name": f"b{n}", "limit_usd": "9", "spent_usd": "1"} for n in range(9)]}
    (home / "budget-status.json").write_text(json.dumps(budgets))
    return writer


def said(number: int) -> bytes:
    """What Claude Code pipes in."""
    return json.dumps(
        {
            "session_id": f"session-{number % SESSIONS_MAX:032}",
            "transcript_path": "/home/ada/.claude/projects/-src-web/session.jsonl",
            "cwd": "/src/web",
            "model": {"id": "claude-opus-5-5", "display_name": "Opus"},
            "workspace": {"current_dir": "/src/web", "project_dir": "/src/web"},
            "version": "2.1.332",
            "cost": {"total_cost_usd": 0.42, "total_duration_ms": 45_000},
            "context_window": {"context_window_size": 200_000, "used_percentage": 8},
            "rate_limits": {"five_hour": {"used_percentage": 62, "resets_at": time.time() + 9000}},
        }
    ).encode()


def _event(number: int) -> PricedEvent:
    at_ns = time.time_ns() - S
    limits = tuple(
        LimitReading(
            window,
            LimitKind.PLAN,
            at_ns,
            Decimal(number % 100) / 100,
            Decimal("0.01"),
            at_ns + 9000 * S,
            length_s,
        )
        for window, length_s in (("5h", 18_000), ("7d", 604_800))
    )
    usage = UsageEvent(
        id=f"{number:032}",
        provider="anthropic",
        host=None,
        endpoint="messages",
        kind="chat",
        model="claude-opus-5-5",
        request_model=None,
        response_id=None,
        streaming=True,
        http_status=200,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.UPROBES,
        parts=(Usage("claude-opus-5-5", Tokens(input=9, cache_write_5m=900, output=90)),),
        certainty=Certainty.REPORTED,
        at_ns=at_ns,
        ttft_ms=9,
        duration_ms=90,
        project=f"project-{number % 60}",
        conditions={"plan": "claude"},
        caller=Caller(
            session_id=f"session-{number % SESSIONS_MAX:032}", account=f"account-{number % 16:08}"
        ),
        limits=limits,
    )
    usd = Decimal("0.0123456789")
    return PricedEvent(usage, usd, usd, None, Basis.COMPUTED)


def best(
    command: list[str], home: Path, runs: int, before: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """(wall-clock, processor) seconds of a new process, the least of `runs` each."""
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    walls, processor = [], []
    for number in range(runs + 1):
        before()
        began = time.perf_counter()
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        out, _ = child.communicate(said(number))
        walls.append(time.perf_counter() - began)
        if child.returncode or ("pass" not in command and out.count(b"\n") != 1):
            raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}: {out!r}")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(used.ru_utime + used.ru_stime)
    return min(walls[1:]), min(after - before for before, after in pairwise(processor))


def forget(names: list[str]) -> None:
    """Ask the kernel to drop files from its page cache."""
    for name in filter(None, names):
        try:
            fd = os.open(name, os.O_RDONLY)
        except OSError:
            continue
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


if __name__ == "__main__":
    main()
