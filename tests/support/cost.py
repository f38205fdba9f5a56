"""Limits of processor time that hold on a slow or busy machine, too.

Processor time grows when other programs share a core's caches and threads. So a limit is given
for a quiet core, and stretched by what a fixed loop takes just after the work that is measured.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

TRIES = 4
LOOP = range(150_000)
QUIET_LOOP_S = 0.014


@contextlib.contextmanager
def within(quiet_s: float, what: str = "it") -> Iterator[None]:
    """The block takes no more processor time of this process than `quiet_s` on a quiet core."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    if took > quiet_s:
        limit = quiet_s * max(1.0, max(_loop_s() for _ in range(5)) / QUIET_LOOP_S)
        assert took <= limit, f"{what} took {took:.2f} s of processor time, more than {limit:.2f} s"


def proportionate(
    small: Callable[[], object],
    large: Callable[[], object],
    *,
    times_max: float,
    least_s: float,
) -> None:
    """`large` takes at most `times_max` times the processor time of `small`.

    Other programs only ever add time. So the least of several tries counts, and there is a further
    one only where the last did not suffice. What takes less than `least_s` counts as `least_s`.
    """
    once = four_times = float("inf")
    for _ in range(TRIES):
        once = min(once, _cost_s(small))
        four_times = min(four_times, _cost_s(large))
        if four_times <= times_max * max(once, least_s):
            return
    raise AssertionError(f"{once:.3f} s became {four_times:.3f} s, more than {times_max} times")


def _cost_s(work: Callable[[], object]) -> float:
    gc.collect()
    began = time.process_time()
    work()
    return time.process_time() - began


def _loop_s() -> float:
    began = time.process_time()
    sum(i * i % 7 for i in LOOP)
    return time.process_time() - began
