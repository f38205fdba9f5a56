"""Find crypto/tls in a Go program, stripped or not: where plaintext enters and leaves.

Go keeps its function table (`.gopclntab`) in every program, because panics and the garbage
collector need it; `-ldflags "-s -w"` and `strip` leave it. From it come the start and the end of
`crypto/tls.(*Conn).Read` and `.Write`, and by decoding them every RET. A uretprobe must never be
used on Go: stacks move, and the return address that the kernel swaps in then crashes the program.
Probe the start and each RET instead. This file attaches nothing and refuses programs whose table
it does not know (before Go 1.18, when arguments came on the stack), whose text does not decode, or
whose functions do not begin as Go functions do.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from capture.functions.elf import Elf, ElfError
from capture.functions.finder.not_found import Absent, Ambiguous, NotFound
from capture.functions.go_functions import BEGINS
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import INSTEAD, STACKS, Stack

PACKAGE = "crypto/tls"
READ, WRITE = f"{PACKAGE}.(*Conn).Read", f"{PACKAGE}.(*Conn).Write"

_HANDSHAKE = re.compile(rb"\0([\w./%~+-]{1,200})\.\(\*Conn\)\.clientHandshake\0")
"""What every fork of crypto/tls has, under its own package."""
FORKS_MAX = 3
"""Of one program; each may have two kinds of connections."""

FUNCTIONS_MAX = 2 << 20
"""Kubernetes has about 120,000."""
TABLE_BYTES_MAX = 512 << 20
FUNCTION_BYTES_MAX = 64 << 10
RETURNS_MAX = 64
BUILD_INFO_MAGIC = b"\xff Go buildinf:"

# The table's magic by Go version; its fields have been where they are since 1.18.
_MAGICS = {0xFFFFFFF0: "1.18", 0xFFFFFFF1: "1.20"}
_HEADER = struct.Struct("<IBBBBQQQQQQQQ")
_TEXT_START = 24
# runtime.moduledata (runtime/symtab.go), the same in 1.26 and 1.27.
_MODULE_LOWEST, _MODULE_TEXT = 160, 176
MODULES_MAX = 64
"""Places that point to the table; one of them is the module's data."""


@dataclass(frozen=True, slots=True)
class GoFunction:
    """A Go function: file offsets of its first instruction and of each of its RETs.

    `row` is the file offset of its row in the function table: two numbers, then the next one's.
    """

    name: str
    address: int
    offset: int
    size_bytes: int
    returns: tuple[int, ...]
    row: int


@dataclass(frozen=True, slots=True)
class ServerName:
    """Where a connection keeps the host: `*(*(conn + config) + name)` is a pointer, then a length.

    Both are unset while `config` is nil; servers have no name there.
    """

    config: int
    name: int


# Of a fork nobody knows which version of crypto/tls it was made of, nor what it put into Config
# (utls: ApplicationSettings, before the name). The kernel tries the places of 1.21, those one
# pointer further and those of older ones, for a text that may be a host (GO_FORK, GO_WRAPPED in
# probe.bpf.c).
FORK_COOKIE = 1 << 48 | 80 << 32 | 128
WRAPPED = 1 << 49


@dataclass(frozen=True, slots=True)
class Found:
    """crypto/tls was found.

    Arguments are in registers (ABIInternal): at the start the *Conn, the slice's pointer and its
    length are in RAX, RBX and RCX (aarch64: X0, X1, X2); at a RET the count n is in the first of
    them, the error's type word in the second. R14 (aarch64: X28) is the goroutine, which identifies
    a call from its start to its RET (threads do not: a goroutine moves between them).
    """

    all_functions: tuple[GoFunction, ...]  # Read, Write, and Close if it was found
    go_version: str | None
    server_name: ServerName | None
    build_id: str | None
    size_bytes: int
    machine: str

    @property
    def read(self) -> GoFunction:
        """`(*Conn).Read`."""
        return self.all_functions[0]

    @property
    def write(self) -> GoFunction:
        """`(*Conn).Write`."""
        return self.all_functions[1]

    @property
    def functions(self) -> Mapping[str, int]:
        """Name to file offset of the first instruction."""
        return MappingProxyType({f.name: f.offset for f in self.all_functions})


def library(fd: int) -> Library | None:
    """What to probe of crypto/tls and its forks in a Go program, or why not.

    None when it uses none of them.
    """
    found, forks = find_go_tls(fd), forks_in(fd)
    libraries = [fork for fork in forks if fork.probes]
    beside = Stack.GO_FORK if len(libraries) < len(forks) else None
    if isinstance(found, Found):
        name_at = found.server_name
        cookie = name_at.config << 32 | name_at.name if name_at else 0
        libraries.insert(0, _library(Stack.GO, found.all_functions, found.build_id, cookie))
    elif not found.absent:
        libraries.append(Library(Stack.GO, (), found.build_id, f"{found.reason}; {INSTEAD}"))
    first, *others = libraries or forks[:1] or (None,)
    if first is None:
        return None
    return replace(first, beside=beside if first.probes else None, others=tuple(others))


def _library(
    stack: Stack, found: Iterable[GoFunction], build_id: str | None, cookie: int
) -> Library:
    probes: list[Probe] = []
    functions = tuple(found)
    # The order in which they are attached: a client's first bytes are its request.
    for function in sorted(functions, key=lambda each: not each.name.endswith("Write")):
        name = function.name.rpartition(".")[2].lower()
        probes.append(Probe(f"enter_go_{name}", function.offset))
        if name != "close":
            probes += [Probe(f"leave_go_{name}", offset) for offset in function.returns]
    proved = tuple(Function(each.offset, Proof.GO, each.row, each.size_bytes) for each in functions)
    return Library(stack, tuple(probes), build_id, cookie=cookie, functions=proved)


def forks_in(fd: int) -> list[Library]:
    """The forks of crypto/tls in a Go program; those without probes have a reason.

    A fork has the functions of crypto/tls under its own package. Its clients may have methods of
    their own on a `UConn`, which begins with a pointer to the `Conn` (utls): a library of its own,
    as its probes must be told so. A fork of crypto/tls for QUIC is none: it passes no plaintext.
    """
    libraries: list[Library] = []
    with suppress(ElfError), Elf(fd) as elf:
        for table in _tables(elf):
            for package in islice(table.forks(), FORKS_MAX):
                libraries += _fork(table, package, elf.build_id)
    return libraries


def _fork(table: _Table, package: str, build_id: str | None) -> list[Library]:
    try:
        own = table.methods(f"{package}.(*Conn)", ("Read", "Write", "Close"))
    except (Ambiguous, ImportError) as problem:
        why = "" if isinstance(problem, Absent) else f"{problem}; "
        reason = f"{package}: {why}{STACKS[Stack.GO_FORK].advice}"
        return [Library(Stack.GO_FORK, (), build_id, reason)]
    found = [_library(Stack.GO_FORK, own, build_id, FORK_COOKIE)]
    with suppress(Ambiguous):  # it has none, or calls those of Conn
        clients = table.methods(f"{package}.(*UConn)", ("Write", "Read", "Close"), needed=1)
        found.append(_library(Stack.GO_FORK, clients, build_id, FORK_COOKIE | WRAPPED))
    return found


def find_go_tls(file: str | Path | int) -> Found | NotFound:
    """Where a Go program's TLS plaintext passes, or why not; never an exception.

    `file` is a path or an open descriptor.
    """
    build_id = version = None
    try:
        with Elf(file) as elf:
            build_id = elf.build_id
            version = go_version(elf)
            return Found(
                _find(elf, version),
                version,
                _server_name(version),
                build_id,
                elf.size_bytes,
                elf.machine,
            )
    except (ElfError, Ambiguous) as problem:
        absent = isinstance(problem, Absent)
        return NotFound(str(problem), build_id, absent, version)
    except ImportError as error:
        return NotFound(f"no disassembler: {error}", build_id, go_version=version)


def go_version(elf: Elf) -> str | None:
    """The toolchain, such as "go1.22.3", from the build information; None when there is none."""
    section = elf.section(".go.buildinfo")
    places: Iterator[int] | tuple[int, ...] = (section.address,) if section else ()
    for at in places or elf.find(BUILD_INFO_MAGIC, (s for s in elf.loads if not s.executable)):
        try:
            header = elf.read_at(at, 34)
            if header[:14] != BUILD_INFO_MAGIC:
                continue
            if header[15] & 2:  # the string follows
                text = elf.read_at(at + 33, min(header[32], 127))
            else:  # until 1.17: a pointer to a Go string, which is a pointer and a length
                text = _pointed_at(elf, at + 16)
        except ElfError:
            continue
        if text.startswith((b"go", b"devel")):
            return text.decode("ascii", "replace").split(" ")[0]
    return None


def _pointed_at(elf: Elf, pointer: int) -> bytes:
    string = elf.pointer_at(pointer)
    data = elf.pointer_at(string) if string else None
    if not string or not data:
        return b""
    length = int.from_bytes(elf.read_at(string + 8, 8), "little")
    return elf.read_at(data, min(length, 127))


def _find(elf: Elf, version: str | None) -> tuple[GoFunction, ...]:
    if version is not None and (_minor(version) or 18) < 18:
        if not any(elf.find(READ.encode() + b"\0")):
            raise Absent(f"the program has no {READ}: it does not use crypto/tls")
        raise Ambiguous(f"{version} passes arguments on the stack; 1.18 is the first one probed")
    problems: list[Ambiguous] = []
    for table in _tables(elf):
        try:
            return table.methods(f"{PACKAGE}.(*Conn)", ("Read", "Write", "Close"))
        except Ambiguous as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    raise Ambiguous("no Go function table" if version else "not a Go program")


def _minor(version: str) -> int | None:
    match = re.match(r"go1\.(\d+)", version)
    return int(match[1]) if match else None


def _server_name(version: str | None) -> ServerName | None:
    """Offsets of Conn.config and Config.ServerName by Go version; None for one not checked.

    From crypto/tls/conn.go and common.go: 1.21 put `quic *quicState` before `config`.
    """
    minor = _minor(version) if version else None
    if minor is None or not 18 <= minor <= SERVER_NAME_MINOR_MAX:
        return None
    return ServerName(config=72 if minor <= 20 else 80, name=128)


SERVER_NAME_MINOR_MAX = 27
"""Later releases may have moved the fields: the first request's head then has the host."""


# --- the function table -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """A pclntab: where its parts are, as addresses; names and functions are read once."""

    elf: Elf
    text: int
    names: tuple[int, int]
    functions: int
    count: int

    def function(self, name: str) -> GoFunction:
        """The one function of that name, its bounds and its returns. Raises Ambiguous."""
        wanted = struct.pack("<i", self._name_offset(name))
        entries, where, records = self._functions
        rows: list[tuple[int, int, int]] = []
        at = records.find(wanted)
        while at >= 0:  # a record is its function's start, then its name: search for the name
            index = where.get(at - 4, -1)
            if index >= 0 and struct.unpack_from("<I", records, at - 4)[0] == entries[2 * index]:
                rows.append((entries[2 * index], entries[2 * index + 2], index))
            at = records.find(wanted, at + 1)
        if len(rows) != 1:
            raise Ambiguous(f"{len(rows)} functions are called {name}")
        return self._checked(name, *rows[0])

    @cached_property
    def _functions(self) -> tuple[memoryview, dict[int, int], bytes]:
        """Rows (start and record), the row of each record, and the records. Raises Ambiguous."""
        entries = memoryview(self.elf.read_at(self.functions, 8 * self.count + 4)).cast("I")
        where = {entries[2 * index + 1]: index for index in range(self.count)}
        last = max(where)
        if last > TABLE_BYTES_MAX:
            raise Ambiguous("the function table is larger than any known")
        return entries, where, self.elf.read_at(self.functions, last + 8)

    @cached_property
    def _name_bytes(self) -> bytes:
        start, end = self.names
        return self.elf.read_at(start, end - start)

    def methods(self, of: str, names: Sequence[str], needed: int = 2) -> tuple[GoFunction, ...]:
        """Methods of a type; those past the first `needed` only where they are found.

        Without Close a connection ends with its process. Raises Ambiguous.
        """
        found = [self.function(f"{of}.{name}") for name in names[:needed]]
        for name in names[needed:]:
            with suppress(Ambiguous):
                found.append(self.function(f"{of}.{name}"))
        return tuple(found)

    def forks(self) -> Iterator[str]:
        """The packages of forks of crypto/tls."""
        for match in _HANDSHAKE.finditer(self._name_bytes):
            package = match[1].decode("ascii")
            if package != PACKAGE and "qtls" not in package:
                yield package

    def _name_offset(self, name: str) -> int:
        data = self._name_bytes
        needle = b"\0" + name.encode() + b"\0"
        at = data.find(needle)
        if at < 0:
            raise Absent(f"the program has no {name}: it does not use crypto/tls")
        if data.find(needle, at + 1) >= 0:
            raise Ambiguous(f"two names {name}")
        return at + 1

    def _checked(self, name: str, start: int, end: int, index: int) -> GoFunction:
        if not 16 <= end - start <= FUNCTION_BYTES_MAX:
            raise Ambiguous(f"{name} is {end - start} bytes long")
        address = self.text + start
        offset = self.elf.offset_of(address)
        row = self.elf.offset_of(self.functions + 8 * index)
        if offset is None or row is None or not _is_code(self.elf, address):
            raise Ambiguous(f"{name} is not in the program's code")
        code = self.elf.read_at(address, end - start)
        if not BEGINS[self.elf.machine].match(code):
            raise Ambiguous(f"{name} does not begin as a Go function does")
        returns = tuple(offset + at for at in _returns(code, self.elf.machine, name))
        if not 0 < len(returns) <= RETURNS_MAX:
            raise Ambiguous(f"{name} has {len(returns)} returns")
        return GoFunction(name, address, offset, len(code), returns, row)


def _tables(elf: Elf) -> Iterator[_Table]:
    """Function tables: in the section of that name, else wherever the magic is followed by one."""
    sections = [s for s in elf.sections if s.name.endswith(".gopclntab")]
    if sections:
        places: Iterator[int] = (s.address for s in sections)
    else:
        places = (
            at
            for magic in _MAGICS
            # pc quantum 1 or 4, pointers of 8 bytes
            for quantum in (b"\x01", b"\x04")
            for at in elf.find(struct.pack("<I", magic) + b"\0\0" + quantum + b"\x08")
        )
    for address in places:
        table = _table_at(elf, address)
        if table is not None:
            yield table


def _table_at(elf: Elf, address: int) -> _Table | None:
    try:
        header = _HEADER.unpack(elf.read_at(address, _HEADER.size))
        magic, zero, zero_too, quantum, pointer = header[:5]
        count, _, _, names, units, _, _, functions = header[5:]
        if magic not in _MAGICS or zero or zero_too or quantum not in (1, 4) or pointer != 8:
            return None
        in_order = 0 < names < units <= functions <= TABLE_BYTES_MAX
        if not 0 < count <= FUNCTIONS_MAX or not in_order:
            return None
        start = _text_start(elf, address, address + functions)
    except ElfError:
        return None
    if start is None:
        return None
    return _Table(elf, start, (address + names, address + units), address + functions, count)


def _text_start(elf: Elf, table: int, functions: int) -> int | None:
    """What the table's function addresses count from; None when it is not certain.

    Up to 1.25 the table's header does. Since then only the module's data do, which begin with a
    pointer to the table, and hold the first function's address, too.
    """
    stated = elf.pointer_at(table + _TEXT_START)
    if stated is not None:
        return stated if _is_code(elf, stated) else None
    first = int.from_bytes(elf.read_at(functions, 4), "little")
    for module in islice(elf.pointers_to(table), MODULES_MAX):
        with suppress(ElfError):
            start = elf.pointer_at(module + _MODULE_TEXT)
            lowest = elf.pointer_at(module + _MODULE_LOWEST)
            if start is not None and lowest == start + first and _is_code(elf, start):
                return start
    return None


def _is_code(elf: Elf, address: int) -> bool:
    return any(0 <= address - s.address < s.size_bytes for s in elf.executables)


def _returns(code: bytes, machine: str, name: str) -> list[int]:
    """Offsets of every RET in the function. Raises Ambiguous when some byte does not decode."""
    capstone: Any = import_module("capstone")
    if machine == "aarch64":
        decoder = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    else:
        decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    found, reached = [], 0
    for at, size, mnemonic, _ in decoder.disasm_lite(code, 0):
        reached = at + size
        if mnemonic == "ret":
            found.append(at)
    if code[reached:].strip(b"\xcc\x00"):  # padding behind the last instruction
        raise Ambiguous(f"{name} does not decode at +{reached:#x}")
    return found
