"""What single instructions of x86-64 and aarch64 mean, as far as the finders ask.

Capstone decodes, `X86` and `Aarch64` put its answer into a `Step`: where the flow goes, what is put
into registers, how the stack moves. Capstone is imported late because only the finder needs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import Any


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
    `stores`: it writes memory through a register other than those two.
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


class X86:
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
            self._wide[number] = x86_wide(name)
        return self._wide[number]

    def step(self, i: Any) -> Step:
        """What a capstone instruction means."""
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
        """What registers may hold after a step, of what they might before it."""
        return _apply(step, state, self._volatile)


class Aarch64:
    """What aarch64 instructions mean, as far as we ask."""

    arguments = ("x0", "x1", "x2", "x3", "x4", "x5")
    _volatile = frozenset(f"x{n}" for n in range(19)) | {"x30"}

    def __init__(self) -> None:
        self._arm: Any = import_module("capstone.arm64")

    def step(self, i: Any) -> Step:
        """What a capstone instruction means."""
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
            into = arm_wide(i.reg_name(o[0].reg))
            mask = 0xFFFFFFFF if i.reg_name(o[0].reg).startswith("w") else 0xFFFFFFFFFFFFFFFF
            if name in ("mov", "movz", "adr", "adrp") and o[1].type == arm.ARM64_OP_IMM:
                shift = o[1].shift.value if o[1].shift.type else 0
                return {into: (o[1].imm << shift) & mask}
            if name == "mov" and o[1].type == arm.ARM64_OP_REG:
                if o[1].reg in (arm.ARM64_REG_WZR, arm.ARM64_REG_XZR):
                    return {into: 0}
                return {into: (arm_wide(i.reg_name(o[1].reg)), 0)}
            if name in ("add", "sub") and len(o) == 3 and o[2].type == arm.ARM64_OP_IMM:
                shift = o[2].shift.value if o[2].shift.type else 0
                amount = (o[2].imm << shift) * (-1 if name == "sub" else 1)
                return {into: (arm_wide(i.reg_name(o[1].reg)), amount)}
        _, written = i.regs_access()
        return {arm_wide(i.reg_name(r)): None for r in written}

    def apply(self, step: Step, state: dict[str, frozenset[int]]) -> dict[str, frozenset[int]]:
        """What registers may hold after a step, of what they might before it."""
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


def x86_wide(name: str) -> str:
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


def arm_wide(name: str) -> str:
    """The 64-bit name of any part of an aarch64 register."""
    return (
        "x" + name[1:]
        if re.fullmatch(r"w\d+", name)
        else {"fp": "x29", "lr": "x30"}.get(name, name)
    )
