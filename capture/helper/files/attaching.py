"""Attaches the probes of a file: all in one call where the kernel can, else one after the other.

A registration waits for a grace period of the kernel, 3 to 100 ms, unless another one came just
before. So in one call a file's functions are probed together, and a client whose library was mapped
a moment ago sends nothing in between; removing them takes one such time as well, not one a probe.
The kernel then runs the same program at every place, which carries on as the one that belongs
there: its number is the uppermost byte of the cookie (`carry_on` in probe.bpf.c). This file decides
nothing about files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence

from capture import bpf, loader
from capture.functions.library import Probe
from capture.functions.stacks import PROGRAMS

PROGRAM_SHIFT = 56  # 64 - COOKIE_PROGRAM_BITS
_OWN_PART = (1 << PROGRAM_SHIFT) - 1
_NUMBERS = {name: number for number, name in enumerate(PROGRAMS)}


def attach(
    programs: Mapping[str, int], path: str, probes: Sequence[tuple[Probe, int]]
) -> list[int]:
    """Attach these probes of a file, each with its cookie, or none; descriptors to hold.

    Raises OSError; EINVAL: this kernel has no cookies (before 5.15).
    """
    if loader.AT_ENTRY in programs:
        return _attach_at_once(programs, path, probes)
    held: list[int] = []
    try:
        for (program, offset, at_return), cookie in probes:
            held.append(
                bpf.attach_uprobe(
                    programs[program], path, offset, at_return=at_return, cookie=cookie
                )
            )
    except OSError:
        _close(held)
        raise
    return held


def _attach_at_once(
    programs: Mapping[str, int], path: str, probes: Sequence[tuple[Probe, int]]
) -> list[int]:
    """At ends first: a call is noted at its start, so that both or neither are seen."""
    held: list[int] = []
    for program, at_return in ((loader.AT_RETURN, True), (loader.AT_ENTRY, False)):
        places = [
            (probe.offset, cookie & _OWN_PART | _NUMBERS[probe.program] << PROGRAM_SHIFT)
            for probe, cookie in probes
            if probe.at_return is at_return
        ]
        if not places:
            continue
        try:
            held.append(bpf.attach_uprobes(programs[program], path, places, at_return=at_return))
        except OSError:
            _close(held)
            raise
    return held


def _close(held: Sequence[int]) -> None:
    for each in held:
        with contextlib.suppress(OSError):
            os.close(each)
