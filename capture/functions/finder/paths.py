"""A function's instructions in order, and which of them can follow which.

`Paths` answers who may come before an instruction, so that `rustls_sites.py` can tell what is
certain at it. Jump tables are read, too: a path that came out of one unseen would make a certainty
of what is none.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property

from capture.functions.elf import ElfError
from capture.functions.finder.code import Code, Line
from capture.functions.finder.effects import (
    Aarch64Effects,
    Abi,
    Effect,
    Insert,
    Memory,
    Put,
    Register,
    X86Effects,
)
from capture.functions.finder.instruction_sets import Flow

TABLE_ENTRIES_MAX = 4096
OUTLINED_MAX = 16
SOUGHT_MAX = 2000
"""Instructions and registers that are looked at for where one register was set."""
_DIRECT = re.compile(r"(?:.*, )?#?(0x[0-9a-f]+)")
_ADDRESS_LOADED = re.compile(r"(\w+), \[rip ([+-]) (0x[0-9a-f]+)\]")
_X86_ENDS = frozenset(("ret", "ud2", "int3", "hlt"))
_ARM_ENDS = frozenset(("ret", "retaa", "retab", "brk", "udf", "hlt"))
_ARM_KEPT = frozenset(("sp", "x29", "x30"))
_ARM_BRANCHES = frozenset(("cbz", "cbnz", "tbz", "tbnz"))


class Paths:
    """The code between two addresses, in which some functions may lie one behind the other."""

    def __init__(self, code: Code, lines: list[Line], reader: X86Effects | Aarch64Effects) -> None:
        self.lines = lines
        self.start, self.end = lines[0][0], lines[-1][0] + lines[-1][1]
        self.index = {line[0]: number for number, line in enumerate(lines)}
        self.entered: frozenset[int] = frozenset()
        """Addresses to which code elsewhere goes: who looks for that says so here."""
        self.relied_on: set[int] = set()
        """Addresses of which somebody was told all that comes before them."""
        self._code, self._reader = code, reader
        self._effects: dict[int, tuple[Effect, ...]] = {}
        self._outlines: dict[int | None, tuple[Effect, ...]] = {}

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    @cached_property
    def is_whole(self) -> bool:
        """Whether each jump in it leads to an instruction, or out of it."""
        return all(at in self.index or at not in self for at in self._sources)

    @cached_property
    def frame_pointer(self) -> str | None:
        """The register that points into the frame all along, if the functions keep one."""
        if self._code.arm:
            return "x29"
        kept = ("mov", "rbp, rsp")
        return "rbp" if any(line[2:] == kept for line in self.lines) else None

    def flow(self, number: int) -> Flow:
        """What an instruction, by its number, does to the flow."""
        name = self.lines[number][2]
        if self._code.arm:
            flow = _arm_flow(name)
            return Flow.NEXT if flow is Flow.CALL and self._outlined(number) else flow
        if name[0] == "j" or name.startswith(("loop", "notrack jmp")):
            return Flow.JUMP if name.endswith("jmp") else Flow.BRANCH
        if name == "call":
            return Flow.CALL
        return Flow.STOP if name in _X86_ENDS else Flow.NEXT

    def calls(self, address: int) -> bool:
        """Whether one of its instructions is there, and is a call."""
        return address in self.index and self.flow(self.index[address]) is Flow.CALL

    def target(self, number: int) -> int | None:
        """Where it calls or jumps; None when that is computed, or nowhere."""
        match = _DIRECT.fullmatch(self.lines[number][3])
        return int(match[1], 16) if match else None

    def effects(self, number: int) -> tuple[Effect, ...]:
        """What it does to registers and memory."""
        if number not in self._effects:
            address = self.lines[number][0]
            self._effects[number] = self._outlined(number) or self._effects_at(address)
        return self._effects[number]

    def _effects_at(self, address: int) -> tuple[Effect, ...]:
        instruction = self._code.instruction(address)
        return self._reader.of(instruction) if instruction else ()

    def _outlined(self, number: int) -> tuple[Effect, ...]:
        """What is done by a call of a few instructions that do nothing but return; else nothing.

        Where size matters LLVM has functions for what often comes in a row on aarch64 (Deno).
        """
        if not self._code.arm or self.lines[number][2] != "bl":
            return ()
        target = self.target(number)
        if target not in self._outlines:
            self._outlines[target] = self._straight(target) if target is not None else ()
        return self._outlines[target]

    def _straight(self, start: int) -> tuple[Effect, ...]:
        effects: list[Effect] = []
        code = self._code.bytes_at(start, 4 * OUTLINED_MAX)
        for address, _, name, _ in self._code.lines_in(code, start):
            if name == "ret":
                return tuple(effects)
            if _arm_flow(name) is not Flow.NEXT:
                return ()
            done = self._effects_at(address)
            if any(isinstance(each, Put | Insert) and each.register in _ARM_KEPT for each in done):
                return ()
            effects += done
        return ()

    def successors(self, number: int) -> Iterator[int]:
        """The instructions that may follow, by number; what leaves the function is left out."""
        flow = self.flow(number)
        if flow in (Flow.NEXT, Flow.CALL, Flow.BRANCH) and number + 1 < len(self.lines):
            yield number + 1
        if flow in (Flow.JUMP, Flow.BRANCH):
            target = self.target(number)
            if target is not None and target in self.index:
                yield self.index[target]

    def predecessors(self, number: int) -> tuple[int, ...] | None:
        """The instructions that it may follow; None when others may come before it as well."""
        address = self.lines[number][0]
        if address in self._table_targets or address in self.entered or not number:
            return None
        found = (*self._sources.get(address, ()), *((number - 1,) if self._falls(number) else ()))
        if found:
            self.relied_on.add(address)
        return found or None

    def _falls(self, number: int) -> bool:
        """Whether the flow comes from the instruction before; what only aligns is not run."""
        before = number - 1
        while self.lines[before][2] == "nop" and before and not self._is_target(before):
            before -= 1
        return self.flow(before) in (Flow.NEXT, Flow.CALL, Flow.BRANCH)

    def stores_to_frame(self, at: int) -> Iterator[int]:
        """The instructions, by number, that may store 64 bits at the stack pointer plus `at`."""
        into = re.compile(rf"(?:.*, )?(?:qword ptr )?\[[rs]s?p(?:, #| \+ ){at:#x}\](?:, .*)?")
        for number, (_, _, name, operands) in enumerate(self.lines):
            if name in ("mov", "str", "stp", "stur") and into.fullmatch(operands):
                yield number

    def frame_address(self, number: int, register: str, abi: Abi) -> int | None:
        """What a register is ahead of the stack pointer before an instruction, on every way there.

        None where one way has it from elsewhere, or the stack pointer moves.
        """
        found: set[int] = set()
        pending = [(number, register)]
        seen: set[tuple[int, str]] = set()
        while pending and len(seen) < SOUGHT_MAX:
            number, register = pending.pop()
            if (number, register) in seen:
                continue
            seen.add((number, register))
            before = self.predecessors(number)
            if before is None:
                return None
            for each in before:
                source = self._source_of(each, register, abi)
                if source is None or source.name is None:
                    return None
                if source.name == abi.stack:
                    found.add(source.plus)
                elif source.plus:
                    return None
                else:
                    pending.append((each, source.name))
        return found.pop() if len(found) == 1 and not pending else None

    def may_be_loaded(self, number: int, register: str, at: int, abi: Abi) -> bool:
        """Whether on some way there a register was loaded from a struct's field at that offset."""
        pending = [(number, register)]
        seen: set[tuple[int, str]] = set()
        while pending and len(seen) < SOUGHT_MAX:
            number, register = pending.pop()
            if (number, register) in seen:
                continue
            seen.add((number, register))
            for each in self.predecessors(number) or ():
                for effect in self.effects(each):
                    if isinstance(effect, Put) and effect.register == register:
                        loaded = effect.source
                        if isinstance(loaded, Memory) and (loaded.at, loaded.plus) == (at, 0):
                            return loaded.base != abi.stack
                source = self._source_of(each, register, abi)
                if source is not None and source.name is not None and not source.plus:
                    pending.append((each, source.name))
        return False

    def _source_of(self, number: int, register: str, abi: Abi) -> Register | None:
        """What a register is behind an instruction, by registers before it."""
        if self.flow(number) is Flow.CALL and register in abi.volatile:
            return None
        source: Register | None = Register(register)
        for effect in self.effects(number):
            if isinstance(effect, Put):
                if effect.register == abi.stack:
                    return None
                if effect.register == register:
                    source = effect.source if isinstance(effect.source, Register) else None
        return source

    def _is_target(self, number: int) -> bool:
        address = self.lines[number][0]
        return address in self._sources or address in self._table_targets

    @cached_property
    def _sources(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for number in range(len(self.lines)):
            if self.flow(number) in (Flow.JUMP, Flow.BRANCH):
                target = self.target(number)
                if target is not None:
                    found[target].append(number)
        return found

    @cached_property
    def _table_targets(self) -> frozenset[int]:
        """Where jump tables may lead: tables of 4-byte distances from their own start (LLVM)."""
        computed = any(
            self.flow(number) is Flow.JUMP and self.target(number) is None
            for number in range(len(self.lines))
        )
        if not computed or self._code.arm:
            return frozenset()
        tables: set[int] = set()
        for address, size, name, operands in self.lines:
            if name == "lea" and (match := _ADDRESS_LOADED.fullmatch(operands)):
                distance = int(match[3], 16) * (-1 if match[2] == "-" else 1)
                tables.add(address + size + distance)
        return frozenset(target for table in tables for target in self._table(table, tables))

    def _table(self, table: int, others: Collection[int]) -> Iterator[int]:
        """The targets of a table: how long it is nobody says, so until one is no instruction."""
        segments = (s for s in self._code.elf.loads if not s.executable)
        segment = next((s for s in segments if 0 <= table - s.address < s.size_bytes), None)
        if segment is None or table % 4:
            return
        size = min(segment.address + segment.size_bytes - table, 4 * TABLE_ENTRIES_MAX) & ~3
        try:
            entries = struct.iter_unpack("<i", self._code.elf.read_at(table, size))
        except ElfError:
            return
        for number, (distance,) in enumerate(entries):
            target = table + distance
            if target not in self.index or (number and table + 4 * number in others):
                return
            yield target


def _arm_flow(name: str) -> Flow:
    if name in ("b", "br") or name.startswith("bra"):
        return Flow.JUMP
    if name.startswith("b.") or name in _ARM_BRANCHES:
        return Flow.BRANCH
    if name in ("bl", "blr") or name.startswith("blra"):
        return Flow.CALL
    return Flow.STOP if name in _ARM_ENDS else Flow.NEXT
