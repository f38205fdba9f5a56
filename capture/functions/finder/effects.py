"""What single instructions of x86-64 and aarch64 do to registers and memory, for `symbolic.py`.

Richer than `instruction_sets.py`, which asks for constants only: loads and stores with their
addresses, whole 64-bit words. Whatever is not listed here has the effect "unknown" on all that it
may write, never "none". Capstone decodes; it is imported late because only the finder needs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from capture.functions.finder.instruction_sets import arm_wide, x86_wide


class Register(NamedTuple):
    """A register's value, plus a constant. No register: just the constant."""

    name: str | None
    plus: int = 0


class Memory(NamedTuple):
    """What memory holds at a register's value plus `at`: `size` bytes, plus a constant."""

    base: str
    at: int
    size: int = 8
    plus: int = 0


Source = Register | Memory | None
"""Where a value comes from; None: from anything else."""


class Put(NamedTuple):
    """A register gets a value."""

    register: str
    source: Source


class Insert(NamedTuple):
    """Some bits of a register get a value, the others stay."""

    register: str
    mask: int
    bits: int


class Store(NamedTuple):
    """Memory gets a value; `base` None: at an address that is not known."""

    base: str | None
    at: int
    size: int
    source: Source


class Compare(NamedTuple):
    """A value is compared to another, and the flags are set: equal or not."""

    source: Register | Memory
    other: Source


class Call(NamedTuple):
    """A call through a pointer; None: of a known function."""

    callee: Source


Effect = Put | Insert | Store | Compare | Call


@dataclass(frozen=True, slots=True)
class Abi:
    """Registers by role, for Rust's virtual calls that return a large value."""

    stack: str
    result: str
    box: str
    message: str
    sequence: str
    volatile: frozenset[str]
    kept: tuple[str, ...]
    """Registers that a call leaves as they were; the stack pointer as well."""
    numbers: dict[str, int]


_X86_NAMES = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    *(f"r{n}" for n in range(8, 16)),
)
X86 = Abi(
    stack="rsp",
    result="rdi",
    box="rsi",
    message="rdx",
    sequence="rcx",
    volatile=frozenset(("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")),
    kept=("rbx", "rbp", "r12", "r13", "r14", "r15"),
    numbers={name: number for number, name in enumerate(_X86_NAMES)},
)
AARCH64 = Abi(
    stack="sp",
    result="x8",
    box="x0",
    message="x1",
    sequence="x2",
    volatile=frozenset((*(f"x{n}" for n in range(19)), "x30")),
    kept=tuple(f"x{n}" for n in range(19, 30)),
    numbers={**{f"x{n}": n for n in range(31)}, "sp": 31},
)


class X86Effects:
    """What x86-64 instructions do."""

    def __init__(self) -> None:
        capstone: Any = import_module("capstone")
        self._x86: Any = import_module("capstone.x86")
        self._write = capstone.CS_AC_WRITE
        self._jumps = (capstone.CS_GRP_JUMP, capstone.CS_GRP_RET)
        self._wide: dict[int, str] = {}

    def of(self, i: Any) -> tuple[Effect, ...]:
        """Of a capstone instruction with details."""
        name, operands = i.mnemonic, i.operands
        if name == "call":
            return (Call(self._source(i, operands[0])),)
        if name in ("nop", "endbr64", "ud2", "int3") or any(
            each in i.groups for each in self._jumps
        ):
            return ()
        if name in _MOVES_STACK or (name in ("push", "pop") and operands[0].size != 8):
            return Put("rsp", None), Put("rbp", None), *self._unknown(i, operands)
        if name == "push":
            return Put("rsp", Register("rsp", -8)), Store("rsp", 0, 8, self._source(i, operands[0]))
        if name == "pop":
            into = self._register(i, operands[0].reg)
            return Put(into, Memory("rsp", 0)), Put("rsp", Register("rsp", 8))
        if name in ("cmp", "test"):
            return self._compared(i, name, operands)
        if name in ("inc", "dec") and operands[0].size == 1:
            source = self._source(i, operands[0])
            if operands[0].type == self._x86.X86_OP_REG:
                source = Register(self._register(i, operands[0].reg))
            zero = Register(None, -1 if name == "inc" else 1)
            return (*((Compare(source, zero),) if source else ()), *self._unknown(i, operands))
        if len(operands) in (1, 2) and operands[0].size == 8 and name in _CHANGES:
            return self._changed(i, name, operands)
        if name in ("mov", "movzx", "movabs", "lea") and len(operands) == 2:
            return self._moved(i, name, operands)
        return self._unknown(i, operands)

    def _moved(self, i: Any, name: str, operands: Any) -> tuple[Effect, ...]:
        into, source = operands
        if into.type == self._x86.X86_OP_REG:
            register = self._register(i, into.reg)
            if name == "lea":
                return (Put(register, self._address(i, source) if into.size == 8 else None),)
            if into.size == 8 or name == "movzx":
                return (Put(register, self._source(i, source)),)
            if into.size == 4 and source.type == self._x86.X86_OP_IMM:
                return (Put(register, Register(None, source.imm & 0xFFFFFFFF)),)
            if into.size == 1 and source.type == self._x86.X86_OP_MEM:
                return (Put(register, self._source(i, source)),)  # compared as one byte, or not
            return (Put(register, None),)
        value = self._source(i, source) if into.size == 8 else None
        return (self._store(i, into, value),)

    def _changed(self, i: Any, name: str, operands: Any) -> tuple[Effect, ...]:
        """`inc`, `dec`, and `add` or `sub` of a constant, on 64 bits."""
        amount = 1 if name == "inc" else -1
        if len(operands) == 2:
            if operands[1].type != self._x86.X86_OP_IMM:
                return self._unknown(i, operands)
            amount = operands[1].imm * (-1 if name == "sub" else 1)
        into = operands[0]
        before = self._source(i, into)
        after = None if before is None else before._replace(plus=before.plus + amount)
        if into.type == self._x86.X86_OP_REG:
            return (Put(self._register(i, into.reg), after),)
        return (self._store(i, into, after),)

    def _compared(self, i: Any, name: str, operands: Any) -> tuple[Effect, ...]:
        left, right = operands
        source = self._source(i, left)
        if left.type == self._x86.X86_OP_REG and left.size < 8:
            source = Register(self._register(i, left.reg))
        if source is None:
            return ()
        if name == "cmp":
            return (Compare(source, self._source(i, right)),)
        same = left.type == right.type == self._x86.X86_OP_REG and left.reg == right.reg
        return (Compare(source, Register(None, 0)),) if same else ()

    def _unknown(self, i: Any, operands: Any) -> tuple[Effect, ...]:
        effects: list[Effect] = []
        for place, operand in enumerate(operands):
            written = operand.access & self._write or place == 0
            if operand.type == self._x86.X86_OP_MEM and written and i.mnemonic not in _READERS:
                effects.append(self._store(i, operand, None, repeated=i.mnemonic.startswith("rep")))
        _, written_registers = i.regs_access()
        names = {self._register(i, number) for number in written_registers}
        effects += [Put(register, None) for register in sorted(names & X86.numbers.keys())]
        return tuple(effects)

    def _store(self, i: Any, operand: Any, source: Source, *, repeated: bool = False) -> Store:
        found = self._memory(i, operand)
        if found is None or repeated:
            return Store(None, 0, 0, None)
        return Store(found.base, found.at, found.size, source)

    def _source(self, i: Any, operand: Any) -> Source:
        x86 = self._x86
        if operand.type == x86.X86_OP_IMM:
            return Register(None, operand.imm)
        if operand.type == x86.X86_OP_REG:
            name = self._register(i, operand.reg)
            return Register(name) if operand.size == 8 and name in X86.numbers else None
        return self._memory(i, operand) if operand.size in (1, 8) else None

    def _memory(self, i: Any, operand: Any) -> Memory | None:
        memory = operand.mem
        if memory.index or memory.segment or memory.base in (0, self._x86.X86_REG_RIP):
            return None
        return Memory(self._register(i, memory.base), memory.disp, operand.size)

    def _address(self, i: Any, operand: Any) -> Source:
        memory = operand.mem
        if memory.base == self._x86.X86_REG_RIP and not memory.index:
            return Register(None, i.address + i.size + memory.disp)
        found = self._memory(i, operand)
        return None if found is None else Register(found.base, found.at)

    def _register(self, i: Any, number: int) -> str:
        if number not in self._wide:
            self._wide[number] = x86_wide(i.reg_name(number) or "")
        return self._wide[number]


_MOVES_STACK = frozenset(("enter", "leave", "pushfq", "popfq", "pushf", "popf"))
_CHANGES = frozenset(("inc", "dec", "add", "sub"))
_READERS = frozenset(
    ("bt", "ucomiss", "ucomisd", "comiss", "comisd", "vptest", "ptest", "prefetcht0")
)


class Aarch64Effects:
    """What aarch64 instructions do."""

    def __init__(self) -> None:
        self._arm: Any = import_module("capstone.arm64")

    def of(self, i: Any) -> tuple[Effect, ...]:
        """Of a capstone instruction with details."""
        name, operands = i.mnemonic, i.operands
        if name == "bl":
            return (Call(None),)
        if name == "blr":
            return (Call(Register(self._register(i, operands[0].reg))),)
        if name in ("b", "br", "ret", "nop", "cbz", "cbnz", "tbz", "tbnz") or name.startswith("b."):
            return ()
        if name in ("cmp", "cmn", "tst"):
            return self._compared(i, name, operands)
        loads, stores = _LOADS.match(name), _STORES.match(name)
        if loads or stores:
            return self._transferred(i, name, operands, is_store=stores is not None)
        if name in ("mov", "add", "sub", "adr", "adrp", "movz"):
            return self._set(i, name, operands)
        if name == "movk":
            shift = operands[1].shift.value if operands[1].shift.type else 0
            into = self._register(i, operands[0].reg)
            return (Insert(into, 0xFFFF << shift, operands[1].imm << shift),)
        return self._unknown(i)

    def _set(self, i: Any, name: str, operands: Any) -> tuple[Effect, ...]:
        arm = self._arm
        into = self._register(i, operands[0].reg)
        narrow = i.reg_name(operands[0].reg).startswith("w")
        last = operands[-1]
        amount = 0
        if last.type == arm.ARM64_OP_IMM:
            amount = last.imm << (last.shift.value if last.shift.type else 0)
            if len(operands) == 2:
                return (Put(into, Register(None, amount & (0xFFFFFFFF if narrow else -1))),)
        elif len(operands) != 2 or last.reg in (arm.ARM64_REG_WZR, arm.ARM64_REG_XZR):
            return (Put(into, Register(None, 0) if len(operands) == 2 else None),)
        if narrow or operands[1].type != arm.ARM64_OP_REG:
            return (Put(into, None),)
        return (
            Put(
                into,
                Register(self._register(i, operands[1].reg), -amount if name == "sub" else amount),
            ),
        )

    def _compared(self, i: Any, name: str, operands: Any) -> tuple[Effect, ...]:
        left, right = operands[:2]
        if name != "cmp":
            return ()
        other: Source = None
        if right.type == self._arm.ARM64_OP_IMM:
            other = Register(None, right.imm << (right.shift.value if right.shift.type else 0))
        elif right.type == self._arm.ARM64_OP_REG and not right.shift.type:
            other = Register(self._register(i, right.reg))
        return (Compare(Register(self._register(i, left.reg)), other),)

    def _transferred(
        self, i: Any, name: str, operands: Any, *, is_store: bool
    ) -> tuple[Effect, ...]:
        """Loads and stores of one register or two; what is no plain one is unknown."""
        arm = self._arm
        memory = next((o.mem for o in operands if o.type == arm.ARM64_OP_MEM), None)
        plain = name in _PLAIN and memory is not None and not memory.index
        if memory is None or not plain:
            stored = (Store(None, 0, 0, None),) if is_store else ()
            return (*stored, *self._unknown(i))
        registers = [o.reg for o in operands if o.type == arm.ARM64_OP_REG]
        base = self._register(i, memory.base)
        size = _PLAIN[name] or self._size(i, registers[0])
        after = operands[-1].imm if operands[-1].type == arm.ARM64_OP_IMM else 0
        moved: tuple[Effect, ...] = ()
        at = memory.disp
        if i.writeback and not after:
            moved, at = (Put(base, Register(base, memory.disp)),), 0
        elif after:
            moved = (Put(base, Register(base, after)),)
        effects: list[Effect] = []
        for place, register in enumerate(registers):
            where = at + place * size
            wide = size == 8 and arm_wide(i.reg_name(register))[0] == "x"
            if is_store:
                effects.append(
                    Store(base, where, size, self._stored(i, register) if wide else None)
                )
            else:
                name_ = self._register(i, register)
                known = wide or size == 1
                effects.append(Put(name_, Memory(base, where, size) if known else None))
        if is_store:
            return (*effects, *moved) if after else (*moved, *effects)
        if (
            len(registers) == 2
            and effects
            and isinstance(effects[0], Put)
            and effects[0].register == base
        ):
            effects.reverse()  # the base is overwritten last
        return (*effects, *moved) if after else (*moved, *effects)

    def _stored(self, i: Any, register: int) -> Source:
        if register == self._arm.ARM64_REG_XZR:
            return Register(None, 0)
        return Register(self._register(i, register))

    def _size(self, i: Any, register: int) -> int:
        name = i.reg_name(register)
        letter = name[0] if name[0] == "w" else arm_wide(name)[0]
        return {"x": 8, "w": 4, "q": 16, "d": 8, "s": 4, "h": 2, "b": 1}[letter]

    def _unknown(self, i: Any) -> tuple[Effect, ...]:
        _, written = i.regs_access()
        names = {self._register(i, number) for number in written}
        return tuple(Put(register, None) for register in sorted(names & AARCH64.numbers.keys()))

    def _register(self, i: Any, number: int) -> str:
        return arm_wide(i.reg_name(number) or "")


_LOADS, _STORES = re.compile(r"ld|prfm"), re.compile(r"st|cas|swp")
# Size of each register's part; 0: that of the register.
_PLAIN = {
    **{"ldr": 0, "ldur": 0, "ldp": 0, "str": 0, "stur": 0, "stp": 0},
    **{"ldrb": 1, "ldurb": 1, "strb": 1, "sturb": 1, "ldrh": 2, "ldurh": 2, "strh": 2, "sturh": 2},
}
