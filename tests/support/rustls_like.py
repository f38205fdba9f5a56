"""Builds `code/rustls_like.c`, and runs it in an emulator to see whether sites tell the truth.

`Trial` puts somebody on every site that a finder named and on the encrypter and decrypter that the
record layer calls. What a site says that a call will be given is compared with what it is given.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from capture.functions.elf import Elf
from capture.functions.finder.rustls import Found
from capture.functions.rustls_layer import Pointer, Receive, Received, Send
from tests.support.emulator import BASE, CALLS, MEMORY, Emulator, Halted

SOURCE = Path(__file__).with_name("code") / "rustls_like.c"
COMPILERS = {
    "clang": ("clang",),
    "gcc": ("gcc",),
    "clang-aarch64": ("clang", "--target=aarch64-linux-gnu"),
    "gcc-aarch64": ("aarch64-linux-gnu-gcc", "-fno-section-anchors"),
}
_ALONE = (
    *("-fPIC", "-shared", "-nostdlib", "-ffreestanding", "-w", "-fno-stack-protector"),
    *("-funwind-tables", "-Wl,--eh-frame-hdr", "-Wl,--build-id", "-Wl,-Bsymbolic"),
)
_ENCRYPT, _DECRYPT = CALLS + 0x100, CALLS + 0x200
_LAYER, _TABLES, _OBJECTS, _DATA = (
    MEMORY + 0x1000,
    MEMORY + 0x2000,
    MEMORY + 0x3000,
    MEMORY + 0x4000,
)
_MESSAGE_BYTES = 0x28
OK, FAILED = 0xFF, 6
WIDE_OK = 0x8000000000000029


class Wrong(AssertionError):
    """A site did not tell what a call was given, or a call had no site."""


def build_rustls(folder: Path, *flags: str, compiler: str, optimise: str = "-O2") -> Path:
    """A shared library with the stand-in, and its symbols."""
    target = folder / "subject.so"
    command = [*COMPILERS[compiler], optimise, *_ALONE, *flags, str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return target


def addresses(path: Path, prefix: str = "one") -> dict[str, int]:
    """Where its functions are, by symbol."""
    names = [f"{prefix}_{each}" for each in ("send_one", "send_all", "process_1", "process_2")]
    with Elf(path) as elf:
        return {each.name[len(prefix) + 1 :]: each.address for each in elf.symbols(names)}


class Trial:
    """One run of all its functions. Raises Wrong; what the code does wrong itself ends it."""

    def __init__(self, path: Path, found: Found, *, outer: int = 0, ok: int = OK) -> None:
        layer = found.layer
        self.emulator, self.layer, self.outer, self.ok = Emulator(path), layer, outer, ok
        self.sent = self.received = 0
        self._announced: tuple[int, ...] | None = None
        self._expected: tuple[int, ...] | None = None
        self._result: int | None = None
        self._tags: list[int] = []
        result, box, message, number = (8, 0, 1, 2) if self.emulator.arm else (7, 6, 2, 1)
        self._registers = result, box, message, number
        self.emulator.take(_ENCRYPT, self._encrypt)
        self.emulator.take(_DECRYPT, self._decrypt)
        with Elf(path) as elf:
            (code,) = elf.executables
        moved = code.address - code.offset
        for each in (*layer.sends, *layer.receives, *layer.received):
            self.emulator.watch(each.offset + moved, self._watcher(each))
        self._probed = [
            range(BASE + each.offset + moved, BASE + each.offset + moved + each.size_bytes + 16)
            for each in found.functions
        ]

    # --- what is looked at --------------------------------------------------------------------

    def _at(self, pointer: Pointer) -> int:
        return self.emulator.register(pointer.register) + pointer.displacement & (1 << 64) - 1

    def _watcher(self, site: Send | Receive | Received):
        def on_send() -> None:
            if self._announced is not None:
                raise Wrong("two records are announced, and one is sent")
            layer, message = self._at(site.layer), self._at(site.message)
            number = self.emulator.number(layer + self.layer.write_seq) - site.counted
            box = self.emulator.number(layer + self.layer.encrypter)
            content = self.emulator.read(message, _MESSAGE_BYTES)
            self._announced = box, message, number & (1 << 64) - 1, hash(content)

        def on_receive() -> None:
            layer = self._at(site.layer)
            number = self.emulator.number(layer + self.layer.read_seq)
            self._expected = self.emulator.number(layer + self.layer.decrypter), number

        def on_received() -> None:
            if self._result is None:
                return  # altered code came by another way: the kernel knows of no call
            if self._at(site.result) != self._result:
                raise Wrong("the result is elsewhere")
            self._result = None
            self.received += 1

        kinds = {Send: on_send, Receive: on_receive, Received: on_received}
        return kinds[type(site)]

    def _encrypt(self) -> None:
        result, box, message, number = map(self.emulator.register, self._registers)
        content = self.emulator.read(message, _MESSAGE_BYTES)
        if self._is_probed() and self._announced != (box, message, number, hash(content)):
            raise Wrong(f"sent {(box, message, number)}, announced {self._announced}")
        self._announced = None
        self.sent += 1
        length = struct.unpack_from("<Q", content, 0x10)[0]
        self._answer(result, self.ok, length)

    def _decrypt(self) -> None:
        result, box, message, number = map(self.emulator.register, self._registers)
        if self._result is not None:
            raise Wrong("a result was not seen")
        if self._is_probed():
            if self._expected != (box, number):
                raise Wrong(f"received {(box, number)}, announced {self._expected}")
            self._result = result
        self._expected = None
        length = struct.unpack_from("<Q", self.emulator.read(message, _MESSAGE_BYTES), 0x10)[0]
        self._answer(result, self._tags.pop(0) if self._tags else self.ok, length)

    def _is_probed(self) -> bool:
        """Whether a function with sites calls; of others the search knows nothing."""
        return any(self.emulator.return_address() in each for each in self._probed)

    def _answer(self, result: int, tag: int, length: int) -> None:
        self.emulator.write(result, struct.pack("<QQQQQ", tag, _DATA + 0x800, length, 3, 0))

    # --- what is run --------------------------------------------------------------------------

    def run(self, functions: dict[str, int]) -> None:
        """Everything, from a fresh record layer each time."""
        self._call(functions["send_one"], _LAYER, _DATA, 100, 3)
        self._call(functions["send_all"], _LAYER, _DATA, 1000, 300)
        for process in ("process_1", "process_2"):
            for tags in ([], [FAILED, self.ok], [1]):
                self._tags = list(tags)
                self._call(functions[process], _LAYER - self.outer, _DATA, 3, 50)

    def _call(self, function: int, *arguments: int) -> None:
        """Raises Halted as well, but not where a site was wrong before."""
        self._announced = self._expected = self._result = None
        boxes = (_OBJECTS, _TABLES, _OBJECTS + 0x100, _TABLES + 0x40)
        numbers = ((1 << 64) - 0x10000, 5, 7)
        fields = struct.pack("<QQQQQQQQQBBB", 1, 1000, *boxes, *numbers, 0, 2, 2)
        self.emulator.write(_LAYER - self.outer, bytes(self.outer) + fields + bytes(64))
        for table, run in ((_TABLES, _ENCRYPT), (_TABLES + 0x40, _DECRYPT)):
            self.emulator.write(table, struct.pack("<QQQQ", 0, 8, 8, run))
        self.emulator.call(function, *arguments)
        if self._announced is not None:
            raise Wrong("a record is announced that is not sent")
        if self._result is not None:
            raise Wrong("a result was not seen")


def what_is_wrong(path: Path, functions: dict[str, int], found: Found, **how: int) -> str | None:
    """Where sites did not tell the truth, as far as the code ran: altered code may not run far."""
    try:
        Trial(path, found, **how).run(functions)
    except Wrong as wrong:
        return str(wrong)
    except Halted:
        pass
    return None
