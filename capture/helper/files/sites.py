"""Root's check of probes in the middle of functions, as rustls has them (`rustls_layer.py`).

Each must be on an instruction that begins where those before it end, counted from its function's
start, and that is of the kind said: a conditional jump, a load of 64 bits through a register, a
call through a pointer, or what follows such a call. What the registers hold there nobody can tell
from outside: bytes must prove that, in the kernel. The function's own start is `placement.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from capture.functions.elf import Elf
from capture.functions.library import Function, Library
from capture.functions.rustls_layer import Kind, Pointer, Receive, Received, RecordLayer, Send
from capture.functions.stacks import STACKS, Stack
from capture.functions.x86_lengths import boundaries

SITE_PROGRAMS = STACKS[Stack.RUSTLS].programs
_X86_REGISTERS_MAX = 15
Site = Send | Receive | Received


class Misplaced(Exception):
    """What does not fit; the text is for people."""


def check_sites(elf: Elf, library: Library) -> None:
    """Raises Misplaced unless each probe is a site of the layer, and each site belongs there."""
    layer = library.layer
    probes = sorted((program, offset) for program, offset, _ in library.probes)
    if layer is None or probes != sorted(_probes(layer)):
        raise Misplaced("the probes are not those of its record layer")
    functions = {function.offset: function for function in library.functions}
    code = {offset: _Instructions(elf, each) for offset, each in functions.items()}
    sites: tuple[Site, ...] = (*layer.sends, *layer.receives, *layer.received)
    for site in sites:
        if site.function not in code:
            raise Misplaced(f"{site.offset:#x} is in no known function")
        code[site.function].check(site)
    pairs = {each.offset: each.function for each in layer.receives}
    for site in layer.received:
        if pairs.get(site.receive) != site.function:
            raise Misplaced(f"nothing is received before {site.offset:#x}")


def _probes(layer: RecordLayer) -> list[tuple[str, int]]:
    kinds: tuple[Sequence[Site], ...] = (layer.sends, layer.receives, layer.received)
    return [
        (program, site.offset)
        for program, sites in zip(SITE_PROGRAMS, kinds, strict=True)
        for site in sites
    ]


class _Instructions:
    """Where a function's instructions begin, as far as it is probed."""

    def __init__(self, elf: Elf, function: Function) -> None:
        self._arm = elf.machine == "aarch64"
        self._start = function.offset
        self._code = elf.read(function.offset, function.size_bytes)
        ends = len(self._code)
        starts = list(range(0, ends - 3, 4) if self._arm else boundaries(self._code))
        self._before: Mapping[int, int] = {0: 0, **{after: at for at, after in pairwise(starts)}}

    def check(self, site: Site) -> None:
        at = site.offset - self._start
        if at not in self._before:
            raise Misplaced(f"no instruction begins at {site.offset:#x}")
        kind, where = site.kind, at
        if kind is Kind.AFTER:
            kind, where = Kind.CALL, self._before[at]
        is_one = _is_arm(kind, self._code, where) if self._arm else _is_x86(kind, self._code, where)
        if not is_one:
            raise Misplaced(f"the instruction at {site.offset:#x} is no {site.kind.value}")
        registers = [each.register for each in site if isinstance(each, Pointer)]
        if not self._arm and max(registers) > _X86_REGISTERS_MAX:
            raise Misplaced(f"no such register at {site.offset:#x}")


def _is_x86(kind: Kind, code: bytes, at: int) -> bool:
    first, second, third = code[at : at + 3].ljust(3, b"\0")
    if kind is Kind.BRANCH:
        return first & 0xF0 == 0x70 or (first == 0x0F and second & 0xF0 == 0x80)
    if kind is Kind.LOAD:  # mov r64, [r64 + distance]
        return first & 0xF8 == 0x48 and second == 0x8B and third >> 6 in (1, 2)
    if first & 0xF0 == 0x40:
        first, second = second, third
    return first == 0xFF and second >> 3 & 7 == 2


def _is_arm(kind: Kind, code: bytes, at: int) -> bool:
    word = int.from_bytes(code[at : at + 4], "little")
    if kind is Kind.BRANCH:  # b.cond; cbz, cbnz; tbz, tbnz
        return word & 0xFF000010 == 0x54000000 or word & 0x7C000000 == 0x34000000
    if kind is Kind.LOAD:  # ldr, ldur, ldp
        plain = word & 0xFFC00000 in (0xF9400000, 0xA9400000)
        return plain or word & 0xFFE00C00 == 0xF8400000
    return word & 0xFFFFFC1F == 0xD63F0000  # blr
