"""Runs functions of an ELF file in an emulated processor, x86-64 or aarch64, and looks on.

For code that nobody should run: of another machine, or altered at random. The file must need no
other (`-nostdlib`): its segments are loaded and moved, then one function is called with numbers.
Each address can have somebody who looks on; where there is no code of the file somebody can take a
call and return. Whatever code does beyond the file, its stack and the caller's memory ends it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import unicorn
from unicorn import arm64_const, x86_const

from capture.functions.elf import Elf

BASE, STACK, MEMORY, CALLS = 0x10000000, 0x70000000, 0x60000000, 0x50000000
SIZE = 1 << 20
STEPS_MAX = 50_000
_PAGE = 0x1000
_X86 = "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()


class Halted(Exception):
    """The code did what it must not, or did not end."""


class Emulator:
    """A processor with one file loaded, memory at MEMORY, and calls taken from CALLS on."""

    def __init__(self, path: Path) -> None:
        with Elf(path) as elf:
            self.arm = elf.machine == "aarch64"
            self._cpu = self._processor()
            self._load(elf)
        for start in (STACK, MEMORY, CALLS):
            self._cpu.mem_map(start, SIZE)
        filler = b"\x1f\x20\x03\xd5" if self.arm else b"\x90"
        self._cpu.mem_write(CALLS, filler * (SIZE // len(filler)))
        self._taken: dict[int, Callable[[], None]] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._cpu.hook_add(unicorn.UC_HOOK_CODE, self._on_instruction)
        self._problem: BaseException | None = None

    def _processor(self) -> unicorn.Uc:
        if self.arm:
            cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
            cpu.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is used
            return cpu
        return unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)

    def _load(self, elf: Elf) -> None:
        last = max(s.address + s.size_bytes for s in elf.loads)
        self._cpu.mem_map(BASE, (last + 2 * SIZE) & ~(_PAGE - 1))
        for segment in elf.loads:
            self._cpu.mem_write(
                BASE + segment.address, elf.read(segment.offset, segment.size_bytes)
            )
        for where, kind, value in struct.iter_unpack("<QQQ", elf._relocations):
            if kind in (8, 1027):
                self._cpu.mem_write(BASE + where, struct.pack("<Q", BASE + value))

    # --- registers and memory -----------------------------------------------------------------

    def register(self, number: int) -> int:
        """By the number that instructions have for it; 31 is aarch64's stack pointer."""
        return int(self._cpu.reg_read(self._register(number)))

    def _register(self, number: int) -> int:
        if not self.arm:
            return int(getattr(x86_const, f"UC_X86_REG_{_X86[number]}"))
        return int(
            getattr(arm64_const, f"UC_ARM64_REG_X{number}" if number < 31 else "UC_ARM64_REG_SP")
        )

    def read(self, address: int, length: int) -> bytes:
        """Bytes of memory. Raises Halted where there is none."""
        try:
            return bytes(self._cpu.mem_read(address, length))
        except unicorn.UcError as error:
            raise Halted(str(error)) from None

    def number(self, address: int) -> int:
        """The 64 bits at an address."""
        return int.from_bytes(self.read(address, 8), "little")

    def write(self, address: int, data: bytes) -> None:
        """Put bytes into memory. Raises Halted where there is none."""
        try:
            self._cpu.mem_write(address, data)
        except unicorn.UcError as error:
            raise Halted(str(error)) from None

    # --- running ------------------------------------------------------------------------------

    def take(self, address: int, how: Callable[[], None]) -> None:
        """Have calls of an address from CALLS on answered, and return to the caller."""
        self._taken[address] = how

    def watch(self, address: int, how: Callable[[], None]) -> None:
        """Call `how` each time before an instruction of the file, by its address there."""
        self._watched[BASE + address] = how

    def _on_instruction(self, cpu: unicorn.Uc, address: int, size: int, _: object) -> None:
        try:
            if (how := self._watched.get(address)) is not None:
                how()
            if (how := self._taken.get(address)) is not None:
                how()
                self._return()
        except Exception as problem:  # it must not pass through the emulator's C code
            self._problem = problem
            cpu.emu_stop()

    def return_address(self) -> int:
        """Where a call that is taken returns to."""
        return self.register(30) if self.arm else self.number(self.register(4))

    def _return(self) -> None:
        to = self.return_address()
        if self.arm:
            self._cpu.reg_write(arm64_const.UC_ARM64_REG_PC, to)
        else:
            self._cpu.reg_write(x86_const.UC_X86_REG_RSP, self.register(4) + 8)
            self._cpu.reg_write(x86_const.UC_X86_REG_RIP, to)

    def call(self, address: int, *arguments: int) -> None:
        """Call a function of the file. Raises Halted, and whatever those who look on raise."""
        end, stack = CALLS + SIZE - 16, STACK + SIZE // 2
        numbers = range(len(arguments)) if self.arm else (7, 6, 2, 1, 8, 9)
        for number, value in zip(numbers, arguments, strict=False):
            self._cpu.reg_write(self._register(number), value)
        if self.arm:
            self._cpu.reg_write(arm64_const.UC_ARM64_REG_X30, end)
            self._cpu.reg_write(arm64_const.UC_ARM64_REG_SP, stack)
        else:
            self._cpu.mem_write(stack - 8, struct.pack("<Q", end))
            self._cpu.reg_write(x86_const.UC_X86_REG_RSP, stack - 8)
        self._problem = None
        reached = 0
        try:
            self._cpu.emu_start(BASE + address, end, count=STEPS_MAX)
            reached = self._cpu.reg_read(
                arm64_const.UC_ARM64_REG_PC if self.arm else x86_const.UC_X86_REG_RIP
            )
        except unicorn.UcError as error:
            self._problem = self._problem or Halted(str(error))
        if self._problem is not None:
            raise self._problem
        if reached != end:
            raise Halted("it did not return")
