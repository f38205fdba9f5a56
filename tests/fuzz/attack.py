"""Runs the cases of one border and notes what went wrong, with what it takes to repeat it.

A case gets a `random.Random` of its own and raises whatever it holds against the code under
attack: an exception that it does not name itself is a fault, and so are more CPU time or memory
than any input is worth.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

# CPU time of one case. Honest ones take some milliseconds; a machine that is busy adds none.
CASE_SECONDS_MAX = 10.0
# How much more memory this process may hold at its peak than when the attack began.
MEMORY_BYTES_MAX = 512 << 20
# Faults after which a border is broken enough.
FAULTS_MAX = 20

Case = Callable[[random.Random], None]


@dataclass(frozen=True)
class Fault:
    """One case that went wrong; `what` is its traceback."""

    border: str
    seed: int
    number: int
    what: str

    @property
    def command(self) -> str:
        """What runs this case alone."""
        return f"python -m tests.fuzz {self.border} --seed {self.seed} --case {self.number}"


@dataclass
class Findings:
    """What an attack came to."""

    border: str
    seed: int
    tried: int = 0
    slowest_seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)


class TooLong(BaseException):
    """A case used up its CPU time; no `except Exception` of the code under attack swallows it."""


def attack(
    border: str,
    case: Case,
    seed: int,
    *,
    seconds: float | None = None,
    cases: int | None = None,
    only: int | None = None,
) -> Findings:
    """Run cases until `seconds` of time or a number of `cases` is over, or `only` one."""
    findings = Findings(border, seed)
    until = time.monotonic() + seconds if seconds is not None else None
    began_bytes = _peak_bytes()
    for number in itertools.count() if only is None else (only,):
        if number == cases or (until is not None and time.monotonic() >= until):
            break
        before = time.process_time()
        what = _trouble(case, random.Random(f"{seed}/{number}"))
        took = time.process_time() - before
        findings.tried += 1
        findings.slowest_seconds = max(findings.slowest_seconds, took)
        if what is None and _peak_bytes() - began_bytes > MEMORY_BYTES_MAX:
            what = f"memory grew by more than {MEMORY_BYTES_MAX >> 20} MB"
        if what is not None:
            findings.faults.append(Fault(border, seed, number, what))
            if len(findings.faults) >= FAULTS_MAX or "memory grew" in what:
                break
    return findings


def _trouble(case: Case, dice: random.Random) -> str | None:
    try:
        with _limited_time():
            case(dice)
    except (Exception, TooLong):
        return traceback.format_exc(limit=-12)
    return None


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {CASE_SECONDS_MAX:.0f} s of CPU")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak_bytes() -> int:
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
