"""Decode one function of x86-64 or aarch64 code: its flow, its calls, the constants it passes.

`boringssl.py` and `golang.py` ask what a function does, not which bytes it has, so that another
compiler or another version changes nothing for them. This file refuses to guess: a function whose
stack does not balance at every return, or that runs into bytes that are no code, is None. Capstone
decodes; it is imported late because only the finder needs it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import Any

from capture.elf import Elf, Segment

FUNCTION_BYTES_MAX = 0x6000
"""From start to the farthest instruction followed; TLS functions are under 8 KiB."""
INSTRUCTIONS_MAX = 6000
CONSTANTS_MAX = 16
"""Different values remembered for one register; more is "unknown"."""
PAGE_BYTES = 1 << 14
PAGES_MAX = 512
INSTRUCTION_BYTES_MAX = 15
STEPS_MAX = 1 << 18
"""Instructions remembered; some 5,000 are looked at in a real program."""
PIECE_BYTES = 4 << 20
"""Code is searched this much at a time."""
BLOCKS_BYTES_MAX = 0x1000
"""How far from a function's start its blocks may lie that look like functions themselves."""
ADRP_DISTANCE_MAX = 64
"""Instructions between an `adrp` and the `add` that completes it."""

Constants = Mapping[str, frozenset[int]]


class Flow(Enum):
    """What an instruction does to the flow."""

    NEXT = "next"
    CALL = "call"
    JUMP = "jump"
    BRANCH = "branch"
    RETURN = "return"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction. `target` is where it calls or jumps, None when computed at run time.

    `sets` maps registers to a constant, to (register, addend), or to None for "something else".
    `stack` is the change of the stack pointer in bytes; `frame` says how the frame pointer and
    the stack pointer depend on each other: ("save", n) is fp = sp + n, ("restore", n) sp = fp + n.
    `stores` says that it writes memory through a register other than those two.
    """

    address: int
    size: int
    flow: Flow
    target: int | None = None
    sets: Mapping[str, int | tuple[str, int] | None] = field(default_factory=dict)
    stack: int = 0
    frame: tuple[str, int] | None = None
    stores: bool = False
    opens_frame: bool = False
    padding: bool = False
    landing: bool = False

    @property
    def after(self) -> int:
        """The address that follows."""
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class Function:
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
        self._decoder.detail = True
        self._reader = _Aarch64() if self.arm else _X86()
        self._pages: dict[int, bytes] = {}
        self._steps: dict[int, Step | None] = {}

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
            code = self.bytes_at(address, INSTRUCTION_BYTES_MAX)
            decoded = next(self._decoder.disasm(code, address, 1), None) if code else None
            if len(self._steps) >= STEPS_MAX:
                self._steps.clear()
            self._steps[address] = None if decoded is None else self._reader.step(decoded)
        return self._steps[address]

    @property
    def arguments(self) -> tuple[str, ...]:
        """The registers of a C function's first six arguments."""
        return self._reader.arguments

    def loads_of(self, address: int) -> Iterator[int]:
        """Addresses of the instructions that put `address` into a register.

        x86-64: `mov reg, imm` and `lea reg, [rip+x]`. aarch64: the `add` behind an `adrp`.
        """
        seen: set[int] = set()
        for at in self._possible_loads(address):
            step = self.step(at)
            if at in seen or step is None:
                continue
            seen.add(at)
            if self.arm or address in step.sets.values():
                yield at

    def _possible_loads(self, address: int) -> Iterator[int]:
        if self.arm:
            for segment in self.elf.executables:
                for base, data in self.elf.chunks(segment, INSTRUCTION_BYTES_MAX):
                    yield from _aarch64_loads(data, base, address)
            return
        # A library is compiled with absolute addresses or with relative ones, not with both.
        absolute = False
        if address < 1 << 31 and not self.elf.position_independent:
            for at in self.elf.find(address.to_bytes(4, "little"), self.elf.executables):
                for opcode_bytes in (1, 2, 3):  # b8+r, 41 b8+r, 48 c7 c0+r before the immediate
                    step = self.step(at - opcode_bytes)
                    if step is not None and address in step.sets.values():
                        absolute = True
                        yield at - opcode_bytes
                        break
        if not absolute:
            yield from self.relative_references(address, LEA)

    # --- functions ---------------------------------------------------------------------------

    def function(self, start: int, end: int | None = None) -> Function | None:
        """Follow every path from `start`; None when it cannot be a function's start.

        `end` bounds the function where the unwind table tells it. A jump that leaves the bounds,
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
            if called and end is not None and address >= end:
                continue  # the function ends with a call that never returns
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
        return Function(start, steps)

    def every_instruction(self, start: int, end: int) -> Function | None:
        """All that lies between two bounds which the unwind table tells, also behind jump tables.

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
        return Function(start, steps) if address == end else None

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

    def function_around(self, address: int) -> Function | None:
        """The function with the instruction at `address`; None when its start is in doubt.

        The unwind table decides where it covers the address. Elsewhere the start is the nearest
        address before it at which a function may begin, from which a path leads there, where the
        stack balances, and to which nothing near by branches.
        """
        bounds = self.elf.unwind_range_of(address)
        if bounds is not None:
            function = self.function(*bounds)
            return function if function is not None and address in function.steps else None
        likely: Function | None = None
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
        base = max(start - BLOCKS_BYTES_MAX, 0)
        for segment in self.elf.executables:
            if segment.address <= start < segment.address + segment.size_bytes:
                base = max(base, segment.address)
        code = self.bytes_at(base, start - base + BLOCKS_BYTES_MAX)
        if self.arm:
            return any(base + at + step == start for at, step in _aarch64_branches(code))
        return any(
            base + match.end() + displacement == start
            for match in _X86_BRANCH.finditer(code)
            for displacement in _displacements(match)
        )

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
        tail = self.bytes_at(start - 16, 16)
        if tail[-1:] in (b"\xcc", b"\xc3") or tail[-2:-1] == b"\xeb" or tail[-5:-4] in _AWAY:
            return True
        return any(tail.endswith(nop) for nop in _X86_NOPS) or tail[-2:] == b"\x0f\x0b"

    def is_called(self, address: int) -> bool:
        """True when some instruction in the file calls exactly `address`."""
        return next(self.callers(address), None) is not None

    def callers(self, address: int) -> Iterator[int]:
        """Addresses of the instructions that call, or jump as a tail call to, `address`."""
        for at in self.relative_references(address, CALL):
            step = self.step(at)
            if step is not None and step.target == address:
                yield at

    def relative_references(self, target: int, opcode: Opcode) -> Iterator[int]:
        """Addresses of instructions `opcode` whose distance reaches `target`, nearest first.

        On aarch64 `bl` and `b` to the target. Only the instruction's shape is checked.
        """
        for base, data in self._code_from(target):
            if self.arm:
                yield from _aarch64_calls(data, base, target)
            else:
                yield from _x86_relatives(data, base, target, opcode)

    def _code_from(self, address: int) -> Iterator[tuple[int, bytes]]:
        """All code in pieces, nearest to `address` first: callers are mostly near."""
        pieces = [
            (segment.address + at, min(PIECE_BYTES, segment.size_bytes - at), segment)
            for segment in self.elf.executables
            for at in range(0, segment.size_bytes, PIECE_BYTES)
        ]
        for base, size, segment in sorted(pieces, key=lambda piece: abs(piece[0] - address)):
            end = segment.address + segment.size_bytes
            yield base, self.elf.read_at(base, min(size + INSTRUCTION_BYTES_MAX, end - base))

    # --- constants ---------------------------------------------------------------------------

    def constants_at_calls(self, function: Function) -> dict[int, Constants]:
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


def _reached_from_nowhere(function: Function) -> Iterator[int]:
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


def _is_call(data: bytes, at: int) -> bool:
    return data[at] in (0xE8, 0xE9)


def _is_lea(data: bytes, at: int) -> bool:
    """`lea r64, [rip + disp32]`."""
    return data[at + 1] == 0x8D and data[at] in (0x48, 0x4C) and data[at + 2] & 0xC7 == 0x05


Opcode = tuple[int, Callable[[bytes, int], bool]]
"""How many bytes precede the distance, and whether those at an offset are the opcode."""
CALL: Opcode = (1, _is_call)
LEA: Opcode = (3, _is_lea)
_AWAY = (b"\xe9", b"\xe8")
_X86_NOPS = (
    b"\x90",
    b"\x0f\x1f\x00",
    b"\x0f\x1f\x40\x00",
    b"\x0f\x1f\x44\x00\x00",
    b"\x0f\x1f\x80\x00\x00\x00\x00",
    b"\x0f\x1f\x84\x00\x00\x00\x00\x00",
)


_X86_BRANCH = re.compile(rb"(?s)(?=(?:[\x70-\x7f\xeb](.)|(?:\x0f[\x80-\x8f]|\xe9)(....)))")


def _displacements(match: re.Match[bytes]) -> Iterator[int]:
    """What to add to where the (empty) match ends to get the branch's target."""
    short, near = match.group(1), match.group(2)
    if short is not None:
        yield 2 + int.from_bytes(short, "little", signed=True)
    if near is not None:
        length = match.end(2) - match.start()
        yield length + int.from_bytes(near, "little", signed=True)


def _aarch64_branches(code: bytes) -> Iterator[tuple[int, int]]:
    """(offset, distance in bytes) of every conditional branch and `b`."""
    for index, word in enumerate(memoryview(code)[: len(code) & ~3].cast("I")):
        if word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:
            bits, value = 19, word >> 5 & 0x7FFFF  # b.cond; cbz, cbnz
        elif word & 0x7E000000 == 0x36000000:
            bits, value = 14, word >> 5 & 0x3FFF  # tbz, tbnz
        elif word & 0xFC000000 == 0x14000000:
            bits, value = 26, word & 0x3FFFFFF  # b
        else:
            continue
        sign = 1 << (bits - 1)
        yield 4 * index, ((value ^ sign) - sign) * 4


def _x86_relatives(data: bytes, base: int, target: int, opcode: Opcode) -> Iterator[int]:
    """Instructions `opcode disp32` that reach `target`, without decoding what lies between.

    The distance's two high bytes are the same over 64 KiB of code, so two literal bytes are
    searched in each, at memory speed; decoding every instruction of 100 MB takes minutes.
    """
    length, matches = opcode
    for high in range((target - base - len(data)) >> 16, ((target - base) >> 16) + 1):
        if not -0x8000 <= high < 0x8000:
            continue
        tail = (high & 0xFFFF).to_bytes(2, "little")
        last_end = target - (high << 16) - base  # of the instruction, as an offset in data
        low, stop = max(last_end - 0x10001, 0), min(last_end, len(data))
        at = data.find(tail, low, stop)
        while at >= 0:
            start = at - 2 - length
            if start >= 0 and matches(data, start):
                displacement = int.from_bytes(data[at - 2 : at + 2], "little", signed=True)
                if base + at + 2 + displacement == target:
                    yield base + start
            at = data.find(tail, at + 1, stop)


def _aarch64_calls(data: bytes, base: int, target: int) -> Iterator[int]:
    words = memoryview(data)[: len(data) & ~3].cast("I")
    if base % 4:
        return
    # `bl`/`b` hold a signed 26-bit word distance: it changes by one per instruction, so search
    # 256 KiB at a time for its high bytes.
    window = 1 << 18
    for low in range(0, len(words) * 4, window):
        for op in (0x94, 0x14):
            high_low = ((target - (base + low + window)) >> 2) & 0x3FFFFFF
            high_high = ((target - (base + low)) >> 2) & 0x3FFFFFF
            for high in {high_low >> 16, high_high >> 16}:
                tail = bytes((high & 0xFF, op | high >> 8))
                at = data.find(tail, low, low + window)
                while at >= 0:
                    place = at - 2
                    if place % 4 == 0 and place >= 0:
                        word = words[place // 4] & 0x3FFFFFF
                        distance = (word ^ 0x2000000) - 0x2000000
                        if base + place + distance * 4 == target:
                            yield base + place
                    at = data.find(tail, at + 1, low + window)


def _aarch64_loads(data: bytes, base: int, address: int) -> Iterator[int]:
    """`add xd, xn, #low` whose xn the nearest `adrp` before it set to the address's page."""
    low = address & 0xFFF
    # 91 | imm12 | Rn | Rd: the immediate fixes byte 2 and six bits of byte 1.
    tail = bytes((low >> 6, 0x91))
    at = data.find(tail) - 2
    while at >= -1:
        if at >= 0 and (base + at) % 4 == 0 and data[at + 1] >> 2 == low & 0x3F:
            register = struct.unpack_from("<I", data, at)[0] >> 5 & 0x1F
            if _page_before(data, base, at, register) == address & ~0xFFF:
                yield base + at
        at = data.find(tail, at + 3) - 2


def _page_before(data: bytes, base: int, at: int, register: int) -> int | None:
    """The page that the nearest `adrp` before offset `at` puts into the register."""
    for back in range(at - 4, max(at - 4 * ADRP_DISTANCE_MAX, -1), -4):
        (word,) = struct.unpack_from("<I", data, back)
        if word & 0x9F00001F == 0x90000000 | register:
            pages: int = (word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3
            pages = (pages ^ 0x100000) - 0x100000
            return ((base + back) & ~0xFFF) + (pages << 12)
    return None


# --- one instruction ----------------------------------------------------------------------------


class _X86:
    """What x86-64 instructions mean, as far as we ask."""

    arguments = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
    _volatile = frozenset(("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"))

    def __init__(self) -> None:
        capstone: Any = import_module("capstone")
        self._x86: Any = import_module("capstone.x86")
        self._group_call = capstone.CS_GRP_CALL
        self._group_jump = capstone.CS_GRP_JUMP
        self._group_return = capstone.CS_GRP_RET
        self._write = capstone.CS_AC_WRITE
        self._wide: dict[int, str] = {}

    def _register(self, number: int, name: str) -> str:
        if number not in self._wide:
            self._wide[number] = _wide_name(name)
        return self._wide[number]

    def step(self, i: Any) -> Step:
        x86 = self._x86
        name = i.mnemonic
        operands = i.operands
        flow, target = self._flow(i, name, operands)
        if flow is not Flow.NEXT:
            return Step(i.address, i.size, flow, target, padding=name == "int3")
        stores = any(
            o.type == x86.X86_OP_MEM
            and o.access & self._write
            and o.mem.base not in (x86.X86_REG_RSP, x86.X86_REG_RBP, x86.X86_REG_RIP, 0)
            for o in operands
        )
        stack, frame = self._stack(i, name, operands)
        return Step(
            i.address,
            i.size,
            flow,
            None,
            self._sets(i, name, operands),
            stack,
            frame,
            stores and name not in ("nop", "endbr64"),
            padding=name in ("nop", "int3"),
            landing=name == "endbr64",
        )

    def _flow(self, i: Any, name: str, operands: Any) -> tuple[Flow, int | None]:
        x86 = self._x86
        if name in ("int3", "ud2", "hlt"):
            return Flow.STOP, None
        groups = i.groups
        if self._group_return in groups:
            return Flow.RETURN, None
        direct = len(operands) == 1 and operands[0].type == x86.X86_OP_IMM
        target = operands[0].imm if direct else None
        if self._group_call in groups:
            return Flow.CALL, target
        if self._group_jump in groups:
            return (Flow.JUMP if name in ("jmp", "notrack jmp") else Flow.BRANCH), target
        return Flow.NEXT, None

    def _stack(self, i: Any, name: str, operands: Any) -> tuple[int, tuple[str, int] | None]:
        x86 = self._x86
        if name == "push":
            return -8, None
        if name == "pop":
            return 8, None
        if name == "leave":
            return 0, ("restore", 8)
        if len(operands) != 2 or operands[0].type != x86.X86_OP_REG:
            return 0, None
        into, source = operands[0].reg, operands[1]
        if into == x86.X86_REG_RSP:
            if source.type == x86.X86_OP_IMM and name in ("add", "sub"):
                return (source.imm if name == "add" else -source.imm), None
            if source.type == x86.X86_OP_REG and source.reg == x86.X86_REG_RBP:
                return 0, ("restore", 0)
            if name == "lea" and source.type == x86.X86_OP_MEM:
                if source.mem.base == x86.X86_REG_RBP and not source.mem.index:
                    return 0, ("restore", source.mem.disp)
                if source.mem.base == x86.X86_REG_RSP and not source.mem.index:
                    return source.mem.disp, None
        copies = name == "mov" and source.type == x86.X86_OP_REG
        if copies and into == x86.X86_REG_RBP and source.reg == x86.X86_REG_RSP:
            return 0, ("save", 0)
        return 0, None

    def _sets(self, i: Any, name: str, operands: Any) -> dict[str, int | tuple[str, int] | None]:
        x86 = self._x86
        if len(operands) == 2 and operands[0].type == x86.X86_OP_REG and operands[0].size >= 4:
            into = self._register(operands[0].reg, i.reg_name(operands[0].reg))
            source = operands[1]
            mask = 0xFFFFFFFF if operands[0].size == 4 else 0xFFFFFFFFFFFFFFFF
            if name in ("mov", "movabs") and source.type == x86.X86_OP_IMM:
                return {into: source.imm & mask}
            if name == "mov" and source.type == x86.X86_OP_REG:
                return {into: (self._register(source.reg, i.reg_name(source.reg)), 0)}
            if name == "xor" and source.type == x86.X86_OP_REG and source.reg == operands[0].reg:
                return {into: 0}
            if name == "lea" and source.mem.base == x86.X86_REG_RIP and not source.mem.index:
                return {into: i.address + i.size + source.mem.disp}
            if name == "lea" and source.mem.base and not source.mem.index:
                base = self._register(source.mem.base, i.reg_name(source.mem.base))
                return {into: (base, source.mem.disp)}
            if name == "or" and source.type == x86.X86_OP_IMM and source.imm in (-1, mask):
                return {into: mask}
        _, written = i.regs_access()
        return {self._register(r, i.reg_name(r)): None for r in written}

    def apply(self, step: Step, state: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
        return _apply(step, state, self._volatile)


class _Aarch64:
    """What aarch64 instructions mean, as far as we ask."""

    arguments = ("x0", "x1", "x2", "x3", "x4", "x5")
    _volatile = frozenset(f"x{n}" for n in range(19)) | {"x30"}

    def __init__(self) -> None:
        self._arm: Any = import_module("capstone.arm64")

    def step(self, i: Any) -> Step:
        name = i.mnemonic
        flow, target = self._flow(i, name)
        padding = name in ("nop", "udf") or (name == "brk" and flow is Flow.STOP)
        if flow is not Flow.NEXT:
            return Step(i.address, 4, flow, target, padding=padding)
        stack, frame = self._stack(i, name)
        opens = stack < 0 or name in ("paciasp", "pacibsp")
        return Step(
            i.address,
            4,
            flow,
            None,
            self._sets(i, name),
            stack,
            frame,
            self._stores(i, name),
            opens_frame=opens,
            padding=padding,
            landing=name in ("paciasp", "pacibsp") or (name == "bti" and i.op_str in ("c", "jc")),
        )

    def _flow(self, i: Any, name: str) -> tuple[Flow, int | None]:
        if name in ("ret", "retaa", "retab"):
            return Flow.RETURN, None
        if name in ("brk", "udf", "hlt"):
            return Flow.STOP, None
        operands = i.operands
        if name == "bl":
            return Flow.CALL, operands[0].imm
        if name.startswith("blr"):
            return Flow.CALL, None
        if name == "b":
            return Flow.JUMP, operands[0].imm
        if name == "br" or name.startswith("bra"):
            return Flow.JUMP, None
        if name.startswith("b.") or name in ("cbz", "cbnz", "tbz", "tbnz"):
            return Flow.BRANCH, operands[-1].imm
        return Flow.NEXT, None

    def _stack(self, i: Any, name: str) -> tuple[int, tuple[str, int] | None]:
        arm = self._arm
        o = i.operands
        if i.writeback and o and o[-1].type in (arm.ARM64_OP_IMM, arm.ARM64_OP_MEM):
            memory = next((x for x in o if x.type == arm.ARM64_OP_MEM), None)
            if memory is not None and memory.mem.base == arm.ARM64_REG_SP:
                post = o[-1].type == arm.ARM64_OP_IMM
                return (o[-1].imm if post else memory.mem.disp), None
            return 0, None
        if name not in ("add", "sub", "mov") or not o or o[0].type != arm.ARM64_OP_REG:
            return 0, None
        into = o[0].reg
        source = o[1].reg if len(o) > 1 and o[1].type == arm.ARM64_OP_REG else None
        amount = 0
        if len(o) == 3:
            if o[2].type != arm.ARM64_OP_IMM:
                return 0, None
            shift = o[2].shift.value if o[2].shift.type else 0
            amount = (o[2].imm << shift) * (-1 if name == "sub" else 1)
        if into == arm.ARM64_REG_SP and source == arm.ARM64_REG_SP:
            return amount, None
        if into == arm.ARM64_REG_SP and source == arm.ARM64_REG_X29:
            return 0, ("restore", amount)
        if into == arm.ARM64_REG_X29 and source == arm.ARM64_REG_SP:
            return 0, ("save", amount)
        return 0, None

    def _stores(self, i: Any, name: str) -> bool:
        arm = self._arm
        return name.startswith("st") and any(
            o.type == arm.ARM64_OP_MEM
            and o.mem.base not in (arm.ARM64_REG_SP, arm.ARM64_REG_X29, 0)
            for o in i.operands
        )

    def _sets(self, i: Any, name: str) -> dict[str, int | tuple[str, int] | None]:
        arm = self._arm
        o = i.operands
        if len(o) >= 2 and o[0].type == arm.ARM64_OP_REG:
            into = _wide_arm(i.reg_name(o[0].reg))
            mask = 0xFFFFFFFF if i.reg_name(o[0].reg).startswith("w") else 0xFFFFFFFFFFFFFFFF
            if name in ("mov", "movz", "adr", "adrp") and o[1].type == arm.ARM64_OP_IMM:
                shift = o[1].shift.value if o[1].shift.type else 0
                return {into: (o[1].imm << shift) & mask}
            if name == "mov" and o[1].type == arm.ARM64_OP_REG:
                if o[1].reg in (arm.ARM64_REG_WZR, arm.ARM64_REG_XZR):
                    return {into: 0}
                return {into: (_wide_arm(i.reg_name(o[1].reg)), 0)}
            if name in ("add", "sub") and len(o) == 3 and o[2].type == arm.ARM64_OP_IMM:
                shift = o[2].shift.value if o[2].shift.type else 0
                amount = (o[2].imm << shift) * (-1 if name == "sub" else 1)
                return {into: (_wide_arm(i.reg_name(o[1].reg)), amount)}
        _, written = i.regs_access()
        return {_wide_arm(i.reg_name(r)): None for r in written}

    def apply(self, step: Step, state: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
        return _apply(step, state, self._volatile)


def _apply(
    step: Step, state: dict[str, frozenset[int]], volatile: Iterable[str]
) -> dict[str, frozenset[int]]:
    if step.flow is Flow.CALL:
        return {r: values for r, values in state.items() if r not in volatile}
    if not step.sets:
        return state
    after = dict(state)
    for register, value in step.sets.items():
        after.pop(register, None)
        if isinstance(value, int):
            after[register] = frozenset((value,))
        elif value is not None and value[0] in state:
            after[register] = frozenset(known + value[1] for known in state[value[0]])
    return after


def _wide_name(name: str) -> str:
    """The 64-bit name of any part of an x86 register."""
    if re.fullmatch(r"r\d+[dwb]", name):
        return name[:-1]
    if name in ("al", "ah", "bl", "bh", "cl", "ch", "dl", "dh"):
        return f"r{name[0]}x"
    if name in ("sil", "dil", "bpl", "spl"):
        return f"r{name[:2]}"
    if re.fullmatch(r"e?(ax|bx|cx|dx|si|di|bp|sp)", name):
        return "r" + name[-2:]
    return name


def _wide_arm(name: str) -> str:
    return (
        "x" + name[1:]
        if re.fullmatch(r"w\d+", name)
        else {"fp": "x29", "lr": "x30"}.get(name, name)
    )
