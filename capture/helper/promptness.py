"""Lets a thread run as soon as it has something to do, however busy the machine is.

A client's library is mapped some 5 ms before its first request: a helper that waits for its turn
on a busy machine comes too late. For runs alone, whose helper lives as long as a command and works
for some milliseconds at a time; the kernel keeps it below 95 % of a CPU, as all real-time work.
What it starts is ordinary.
"""

from __future__ import annotations

import contextlib
import os

HELPER, HOLDER = 1, 2
"""Who holds processes comes before who looks into their files."""
NICE = -10
"""Of any helper, among ordinary ones: a process may live 10 ms, be there before it is gone."""


def be_prompt(priority: int) -> None:
    """Put the calling thread before ordinary ones; without the right to, nothing changes."""
    with contextlib.suppress(OSError):
        policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(priority))


def be_ordinary() -> None:
    """The opposite."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
