"""Decode one function of x86-64 or aarch64 code: its flow, its calls, the constants it passes.

`boringssl.py` and `openssl.py` ask what a function does, not which bytes it has, so that another
compiler or another version changes nothing for them. This file refuses to guess: a function whose
stack does not balance at every return, or that runs into bytes that are no code, is None. Capstone
decodes; it is imported late because only the finder needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from capture.functions.elf import Elf, Segment
from capture.functions.finder.instruction_sets import X86, Aarch64, Flow, Step
from capture.functions.finder.references import (
    ADRP_DISTANCE_MAX,
    ARM_CONDITIONAL_BYTES,
    CALL_OR_BRANCH,
    LEA,
    SHORT_BYTES,
    aarch64_adds,
    aarch64_branches,
    aarch64_calls,
    aarch64_page,
    clusters,
    x86_calls,
    x86_is_branched_to,
    x86_relatives,
    x86_short_branches,
)
from capture.functions.finder.scanning import Buffer
from capture.functions.x86_lengths import may_end_with

FUNCTION_BYTES_MAX = 0x6000
"""From start to the farthest instruction followed; TLS functions are under 8 KiB."""
INSTRUCTIONS_MAX = 6000
CONSTANTS_MAX = 16
"""Different values remembered for one register; more is "unknown"."""
PAGE_BYTES = 1 << 14
PAGES_MAX = 512
INSTRUCTION_BYTES_MAX = 15
DECODED_AT_ONCE = 8
STEPS_MAX = 1 << 18
"""Instructions remembered; some 5,000 are looked at in a real program."""
PIECE_BYTES = 1 << 20
"""Code is searched this much at a time: it stays in the processor's cache."""
NEAR_BYTES = 16 << 20
"""How far apart the code of one library's files may lie in a program: OpenSSL has 1 MB of it."""
REFERENCES_MAX = 4096
"""References to one address that are listed; 30 to 200 name a file in the builds seen."""
BLOCKS_BYTES_MAX = 0x1000
"""How far from a function's start its blocks may lie that look like functions themselves."""

_CALLS = (b"\xe8", b"\xe9")

Constants = Mapping[str, frozenset[int]]
Line = tuple[int, int, str, str]
"""An instruction: address, size, mnemonic, operands."""


@dataclass(frozen=True, slots=True)
class Routine:
    """A function's reachable instructions by address, from `start`."""

    start: int
    steps: Mapping[int, Step]

    @property
    def calls(self) -> Iterator[Step]:
        """Its call instructions, in address order."""
        return (self.steps[at] for at in sorted(self.steps) if self.steps[at].flow is Flow.CALL)

    @property
    def stores(self) -> bool:
        """True when it writes memory other than its own stack frame."""
        return any(step.stores for step in self.steps.values())


class Code:
    """The code of an ELF file, decoded on demand and remembered."""

    def __init__(self, elf: Elf) -> None:
        capstone: Any = import_module("capstone")
        self.elf = elf
        self.arm = elf.machine == "aarch64"
        if self.arm:
            self._decoder = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
        else:
            self._decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._plain_decoder = capstone.Cs(self._decoder.arch, self._decoder.mode)
        self._decoder.detail = True
        self._reader = Aarch64() if self.arm else X86()
        self._pages: dict[int, bytes] = {}
        self._steps: dict[int, Step | None] = {}
        self._piece = Buffer(PIECE_BYTES + INSTRUCTION_BYTES_MAX)
        self._loads: dict[int, list[int]] = {}
        self._callers: dict[int, list[int]] = {}

    def bytes_at(self, address: int, length: int) -> bytes:
        """Up to `length` bytes of executable code at `address`; fewer at a segment's end."""
        for segment in self.elf.executables:
            start = address - segment.address
            if 0 <= start < segment.size_bytes:
                return self._cached(segment, start, min(length, segment.size_bytes - start))
        return b""

    def _cached(self, segment: Segment, start: int, length: int) -> bytes:
        data = b""
        for base in range(start - start % PAGE_BYTES, start + length, PAGE_BYTES):
            key = segment.address + base
            if key not in self._pages:
                if len(self._pages) >= PAGES_MAX:
                    self._pages.clear()
                size = min(PAGE_BYTES, segment.size_bytes - base)
                self._pages[key] = self.elf.read(segment.offset + base, size)
            data += self._pages[key]
        skip = start % PAGE_BYTES
        return data[skip : skip + length]

    def step(self, address: int) -> Step | None:
        """The instruction at `address`, None when there is none."""
        if address not in self._steps:
            if len(self._steps) >= STEPS_MAX:
                self._steps.clear()
            self._decode_from(address)
        return self._steps[address]

    def _decode_from(self, address: int) -> None:
        """Decode it, and what follows up to where the flow goes elsewhere: it is asked for next."""
        self._steps[address] = None
        code = self.bytes_at(address, INSTRUCTION_BYTES_MAX * DECODED_AT_ONCE)
        decoded = self._decoder.disasm(code, address, DECODED_AT_ONCE) if code else ()
        for instruction in decoded:
            step = self._reader.step(instruction)
            self._steps[step.address] = step
            ends = step.flow in (Flow.JUMP, Flow.RETURN, Flow.STOP)
            if ends or self._steps.get(step.after) is not None:
                return

    def listing(self, start: int, end: int) -> list[Line] | None:
        """All instructions from an address to another, as text; None where not all is code.

        Twenty times as quick as `step`, of each byte once.
        """
        lines = self.lines_in(self.bytes_at(start, end - start), start)
        whole = lines and lines[-1][0] + lines[-1][1] == end
        return lines if whole else None

    def lines_in(self, code: bytes, address: int) -> list[Line]:
        """The instructions in some bytes from an address on, up to what is none."""
        return list(self._plain_decoder.disasm_lite(code, address))

    def instruction(self, address: int) -> Any:
        """The instruction at an address as the disassembler has it, with all details."""
        code = self.bytes_at(address, INSTRUCTION_BYTES_MAX)
        return next(self._decoder.disasm(code, address, 1), None)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The registers of a C function's first six arguments."""
        return self._reader.arguments

    def loads_of(
        self, addresses: Collection[int], around: int | None = None
    ) -> dict[int, list[int]]:
        """For each address, the instructions that put it into a register: one pass over the code,
        or over what lies less than NEAR_BYTES `around` an address.

        x86-64: `mov reg, imm` and `lea reg, [rip+x]`. aarch64: the `add` behind an `adrp`. What was
        asked for before is remembered. Of each no more than `REFERENCES_MAX` + 1 are listed.
        """
        if missing := set(addresses) - self._loads.keys():
            found = (
                self._arm_loads(missing, around) if self.arm else self._x86_loads(missing, around)
            )
            self._loads |= {address: sorted(found.get(address, ())) for address in missing}
        return {address: self._loads[address] for address in addresses}

    def _arm_loads(self, addresses: Collection[int], around: int | None) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for base, piece in self._code_from(around or min(addresses), near=around is not None):
            for at, address, register in aarch64_adds(piece, base, addresses):
                before = self._before(at, 4 * ADRP_DISTANCE_MAX)
                page = aarch64_page(before, at, register)
                if page == address & ~0xFFF and self.step(at) is not None:
                    _note(found, address, at)
        return found

    def _before(self, address: int, length: int) -> bytes:
        """Up to so many bytes of code before an address."""
        for segment in self.elf.executables:
            into = address - segment.address
            if 0 <= into < segment.size_bytes:
                return self.bytes_at(address - min(length, into), min(length, into))
        return b""

    def _x86_loads(self, addresses: Collection[int], around: int | None) -> dict[int, set[int]]:
        """A library is compiled with absolute addresses or with relative ones, not with both."""
        absolute: dict[int, set[int]] = {}
        relative: dict[int, set[int]] = {}
        for base, piece in self._code_from(around or min(addresses), near=around is not None):
            for address in () if self.elf.position_independent else addresses:
                if address < 1 << 31:
                    for at in piece.all(address.to_bytes(4, "little")):
                        if (load := self._load_before(base + at, address)) is not None:
                            _note(absolute, address, load)
            for at, address in x86_relatives(piece, base, addresses, LEA):
                step = self.step(at)
                if step is not None and address in step.sets.values():
                    _note(relative, address, at)
        return relative | absolute

    def _load_before(self, at: int, address: int) -> int | None:
        """The instruction whose immediate at `at` is the address."""
        for opcode_bytes in (1, 2, 3):  # b8+r, 41 b8+r, 48 c7 c0+r before the immediate
            step = self.step(at - opcode_bytes)
            if step is not None and address in step.sets.values():
                return at - opcode_bytes
        return None

    # --- functions ---------------------------------------------------------------------------

    def function(self, start: int, end: int | None = None) -> Routine | None:
        """Follow every path from `start`; None when it cannot be a function's start.

        `end` bounds the function where the unwind table has it. A jump that leaves the bounds,
        or that reaches what follows padding with nothing on the stack, is a tail call.
        """
        limit = end if end is not None else start + FUNCTION_BYTES_MAX
        steps: dict[int, Step] = {}
        depths: dict[int, tuple[int, int | None]] = {}
        pending: list[tuple[int, int, int | None, bool]] = [(start, 0, None, False)]
        while pending:
            address, depth, frame, called = pending.pop()
            if address in depths:
                if depths[address][0] != depth:
                    return None
                continue
            if end is not None and address >= end:
                if called and address == end:
                    continue  # the function ends with a call that never returns
                return None
            step = self.step(address)
            if called and depth and (step is None or self._begins_behind_a_call(step)):
                continue  # the call before it never returns
            if step is None or len(steps) >= INSTRUCTIONS_MAX:
                return None
            if called and step.padding and step.flow is Flow.STOP:
                continue
            steps[address] = step
            depths[address] = (depth, frame)
            if step.flow is Flow.RETURN and depth != 0:
                return None
            after = _stack_after(step, depth, frame)
            if after is None or after[0] > 0:
                return None
            depth, frame = after
            inside = step.target is not None and start <= step.target < limit
            if step.flow in (Flow.NEXT, Flow.CALL, Flow.BRANCH):
                pending.append((step.after, depth, frame, step.flow is Flow.CALL))
            if step.flow in (Flow.BRANCH, Flow.JUMP) and inside and step.target is not None:
                tail = step.flow is Flow.JUMP and depth == 0 and end is None
                if not (tail and self._follows_padding(step.target)):
                    pending.append((step.target, depth, frame, False))
        return Routine(start, steps)

    def every_instruction(self, start: int, end: int) -> Routine | None:
        """All that lies between two bounds of the unwind table, also behind jump tables.

        None where not all of it is code. What reaches an instruction behind a jump table is not
        known: `constants_at_calls` takes nothing for granted there.
        """
        if end - start > FUNCTION_BYTES_MAX:
            return None
        steps: dict[int, Step] = {}
        address = start
        while address < end:
            step = self.step(address)
            if step is None:
                return None
            steps[address] = step
            address = step.after
        return Routine(start, steps) if address == end else None

    def _begins_behind_a_call(self, step: Step) -> bool:
        """Whether another function begins here, or behind the padding that begins here.

        Nops behind a call may as well align a loop of the same function: that one does not go on
        to build a frame.
        """
        following: Step | None = step
        for _ in range(INSTRUCTION_BYTES_MAX):
            if following is None or not following.padding:
                break
            following = self.step(following.after)
        if following is None or following.landing or self.arm:
            return following is not None and (following.landing or following.opens_frame)
        if following.address % 16:
            return False
        if following is not step:
            return following.stack < 0
        frame = self.step(step.after)
        return step.stack == -8 and frame is not None and frame.frame == ("save", 0)

    def _follows_padding(self, address: int) -> bool:
        if self.arm:
            step = self.step(address - 4)
            return step is None or step.padding
        return self.bytes_at(address - 1, 1) == b"\xcc"

    def function_around(self, address: int) -> Routine | None:
        """The function with the instruction at `address`; None when its start is in doubt.

        The unwind table decides where it covers the address. Elsewhere the start is the nearest
        address before it at which a function may begin, from which a path leads there, where the
        stack balances, and to which nothing near by branches.
        """
        bounds = self.elf.unwind_range_of(address)
        if bounds is not None:
            function = self.function(*bounds)
            return function if function is not None and address in function.steps else None
        likely: Routine | None = None
        for start in self._possible_starts(address):
            if likely is not None and likely.start - start > BLOCKS_BYTES_MAX:
                break
            function = self.function(start)
            if function is None or address not in function.steps:
                continue
            if likely is None or likely.start in function.steps:
                likely = function
            if likely is function and not self._is_branched_to(start):
                break
        return likely

    def _is_branched_to(self, start: int) -> bool:
        """Whether code near by seems to branch to `start`: then it is a block of a function.

        A compiler that builds the frame late (shrink-wrapping) leaves blocks that balance by
        themselves. Bytes that only look like a branch lead to a longer search, no more.
        """
        base, code = self._around(range(start, start), BLOCKS_BYTES_MAX)
        if self.arm:
            return any(base + at + step == start for at, step in aarch64_branches(code))
        return x86_is_branched_to(code, start - base)

    def _possible_starts(self, address: int) -> Iterator[int]:
        grain = 4 if self.arm else 16
        first = address - address % grain
        for start in range(first, max(first - FUNCTION_BYTES_MAX, 0), -grain):
            if self._may_begin(start):
                yield start

    def _may_begin(self, start: int) -> bool:
        """Padding, or an instruction that goes elsewhere, comes before a function's start."""
        if self.arm:
            before = self.step(start - 4)
            return before is None or before.padding or before.flow not in (Flow.NEXT, Flow.BRANCH)
        return may_end_with(self.bytes_at(start - 16, 16))

    def callers(self, *starts: int) -> dict[int, list[int]]:
        """For each, the instructions that call it, or jump to it as a tail call: one pass.

        What was asked for before is remembered.
        """
        if missing := set(starts) - self._callers.keys():
            self._callers |= {start: [] for start in missing}
            for base, piece in self._code_from(min(missing)):
                for at, target in self._calls_in(piece, base, missing):
                    self._callers[target].append(at)
        return {start: self._callers[start] for start in starts}

    def caller(self, start: int) -> int | None:
        """One that calls it, near by if there is one."""
        if start in self._callers:
            return next(iter(self._callers[start]), None)
        for base, piece in self._code_from(start):
            for at, _ in self._calls_in(piece, base, (start,)):
                return at
        return None

    def _calls_in(
        self, piece: Buffer, base: int, starts: Collection[int]
    ) -> Iterator[tuple[int, int]]:
        found = (aarch64_calls if self.arm else x86_calls)(piece, base, starts)
        for at, target in found:
            step = self.step(at)
            if step is not None and step.target == target:
                yield at, target

    def entries(self, addresses: Collection[int]) -> Iterator[tuple[int, int]]:
        """(address, target) of instructions that seem to go to one of some addresses.

        Bytes that only look like one are among them. Less than NEAR_BYTES away; on aarch64
        conditional branches reach no farther than ARM_CONDITIONAL_BYTES.
        """
        for near in clusters(addresses):
            inside = frozenset(near)
            for base, piece in self._code_from(near[0], near=True):
                if self.arm:
                    yield from aarch64_calls(piece, base, inside)
                else:
                    found = x86_relatives(piece, base, inside, CALL_OR_BRANCH)
                    # Before `call` and `jmp` stands another byte.
                    yield from ((at + (self.bytes_at(at + 1, 1) in _CALLS), to) for at, to in found)
            reach = ARM_CONDITIONAL_BYTES if self.arm else SHORT_BYTES
            base, code = self._around(range(near[0], near[-1] + 1), reach)
            if self.arm:
                branches = ((base + at, base + at + step) for at, step in aarch64_branches(code))
            else:
                found = x86_short_branches(code, range(near[0] - base, near[-1] - base + 1))
                branches = ((base + at, base + target) for at, target in found)
            yield from ((at, target) for at, target in branches if target in inside)

    def _around(self, bounds: range, reach: int) -> tuple[int, bytes]:
        """The code within the bounds and so much on both sides, and its address."""
        for segment in self.elf.executables:
            if segment.address <= bounds.start < segment.address + segment.size_bytes:
                base = max(bounds.start - reach, segment.address)
                return base, self.bytes_at(base, bounds.stop + reach - base)
        return bounds.start, b""

    def _code_from(self, address: int, *, near: bool = False) -> Iterator[tuple[int, Buffer]]:
        """All code in pieces, nearest to `address` first: callers are mostly near.

        There is one buffer for all of them.
        """
        pieces = [
            (segment.address + at, min(PIECE_BYTES, segment.size_bytes - at), segment)
            for segment in self.elf.executables
            for at in range(0, segment.size_bytes, PIECE_BYTES)
            if not near or abs(segment.address + at - address) < NEAR_BYTES
        ]
        for base, size, segment in sorted(pieces, key=lambda piece: abs(piece[0] - address)):
            within = base - segment.address
            length = min(size + INSTRUCTION_BYTES_MAX, segment.size_bytes - within)
            self.elf.read_into(self._piece.room(length), segment.offset + within)
            yield base, self._piece

    # --- constants ---------------------------------------------------------------------------

    def constants_at_calls(self, function: Routine) -> dict[int, Constants]:
        """For each call in the function, the constants that may be in each register there."""
        entries = [function.start, *_reached_from_nowhere(function)]
        states: dict[int, dict[str, frozenset[int]]] = {entry: {} for entry in entries}
        pending = entries
        while pending:
            address = pending.pop()
            step = function.steps[address]
            state = self._reader.apply(step, states[address])
            for following in _successors(step):
                if following not in function.steps:
                    continue
                merged = _merge(states.get(following), state)
                if merged != states.get(following):
                    states[following] = merged
                    pending.append(following)
        return {step.address: states.get(step.address, {}) for step in function.calls}


def _note(found: dict[int, set[int]], address: int, at: int) -> None:
    known = found.setdefault(address, set())
    if len(known) <= REFERENCES_MAX:
        known.add(at)


def _reached_from_nowhere(function: Routine) -> Iterator[int]:
    """Instructions that none of the others goes on to: the targets of jump tables."""
    reached = {at for step in function.steps.values() for at in _successors(step)}
    return (at for at in function.steps if at != function.start and at not in reached)


def _successors(step: Step) -> Iterator[int]:
    if step.flow in (Flow.NEXT, Flow.CALL, Flow.BRANCH):
        yield step.after
    if step.flow in (Flow.BRANCH, Flow.JUMP) and step.target is not None:
        yield step.target


def _stack_after(step: Step, depth: int, frame: int | None) -> tuple[int, int | None] | None:
    """(depth, frame pointer's depth) after a step; None when it restores what was not saved."""
    if step.frame is not None:
        kind, addend = step.frame
        if kind == "save":
            return depth, depth + addend
        if frame is None:
            return None
        return frame + addend, frame
    return depth + step.stack, frame


def _merge(
    old: dict[str, frozenset[int]] | None, new: dict[str, frozenset[int]]
) -> dict[str, frozenset[int]]:
    """Values possible after either path; a register unknown on one path is unknown."""
    if old is None:
        return new
    merged = {}
    for register, values in old.items():
        if register in new:
            union = values | new[register]
            if len(union) <= CONSTANTS_MAX:
                merged[register] = union
    return merged
