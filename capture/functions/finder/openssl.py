"""Find SSL_read, SSL_write and their _ex forms in OpenSSL that is linked statically and stripped.

`find_openssl(file)` returns where they are, or why not. OpenSSL's functions give their own names
where they report an error: since 3.0 `ERR_set_debug("ssl/ssl_lib.c", line, "SSL_read")`, in 1.1.1
`ERR_put_error(20, <the function's number>, reason, "ssl/ssl_lib.c", line)`. The _ex functions
report nothing, but hand their arguments on to ssl_read_internal and ssl_write_internal, which do.
Every caller of those two must be known, each by exactly one candidate, or nothing is attached:
a caller that is missed would be traffic that is missed. The host comes from ssl3_ctrl, to which
SSL_ctrl hands it on. Seen: 1.1.1 to 3.6, x86-64 and aarch64, by GCC and clang. As with BoringSSL
(`boringssl.py`), the last proof, that the first bytes passed are HTTP, is the kernel's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from capture.functions.elf import Elf, ElfError
from capture.functions.finder import boringssl
from capture.functions.finder.code import Code, Routine
from capture.functions.finder.error_reporters import (
    PRINTABLE,
    Location,
    endings_of,
    functions_around,
    functions_with,
    library_of,
    loads_of,
    located,
    starts_of,
    the_one,
)
from capture.functions.finder.instruction_sets import Flow
from capture.functions.finder.not_found import Absent, Ambiguous, NotFound
from capture.functions.library import Library
from capture.functions.stacks import Stack

_SSL_LIB, _S3_LIB = b"ssl/ssl_lib.c", b"ssl/s3_lib.c"
_LIBRARY_SSL = 20  # ERR_LIB_SSL
# The numbers of functions in 1.1.1 (sslerr.h); they are part of its interface.
_NUMBERS = {
    208: "SSL_write",
    213: "ssl3_ctrl",
    223: "SSL_read",
    523: "ssl_read_internal",
    524: "ssl_write_internal",
}
_EARLY = frozenset(("SSL_read_early_data", "SSL_write_early_data"))
"""Some compilers have SSL_read_ex and SSL_write_ex, which these call, in them as well."""
_INNER = frozenset(("ssl_read_internal", "ssl_write_internal"))
_FOLDERS = (PRINTABLE, re.compile(rb"[\w.+/-]*\Z"), re.compile(rb"(?:\.\./)*\Z"))
NAME_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class Found:
    """OpenSSL was recognised. Without a location of "SSL_ctrl" the host is read in requests."""

    locations: tuple[Location, ...]
    build_id: str | None

    @property
    def functions(self) -> Mapping[str, int]:
        """Symbol name to the file offset of its first instruction; ssl3_ctrl goes as SSL_ctrl."""
        return MappingProxyType({each.name: each.offset for each in self.locations})


def library(fd: int) -> Library:
    """What to probe of OpenSSL in the file, or why it was not found.

    BoringSSL named its files as OpenSSL does until 2023: where it is not the one, it is the other.
    """
    found = find_openssl(fd)
    if isinstance(found, NotFound) and found.absent:
        return boringssl.library(fd)
    # Codex speaks HTTP through OpenSSL and WebSocket through rustls.
    return library_of(Stack.OPENSSL, fd, found)


def find_openssl(file: str | Path | int) -> Found | NotFound:
    """Where OpenSSL's functions are in the file, or why not; never an exception.

    `file` is a path or an open descriptor.
    """
    build_id = None
    try:
        with Elf(file) as elf:
            build_id = elf.build_id
            return Found(_locations(elf), build_id)
    except (ElfError, Ambiguous) as error:
        return NotFound(str(error), build_id, absent=isinstance(error, Absent))
    except ImportError as error:
        return NotFound(f"no disassembler: {error}", build_id)


def _locations(elf: Elf) -> tuple[Location, ...]:
    code = Code(elf)
    files, loads = _loads(code, _SSL_LIB)
    if not loads:
        raise Absent("no OpenSSL: nothing refers to ssl/ssl_lib.c")
    named = {
        function.start: (function, _own_names(code, function, files))
        for function in functions_around(code, loads)
    }
    if not any(_INNER & names for _, names in named.values()):
        raise Absent("no OpenSSL: no function gives its name as ssl_read_internal")
    code.callers(*(_internal(named, name).start for name in sorted(_INNER)))  # in one pass
    locations = _reading(code, named) + _writing(code, named)
    host = _control(code, locations[0].address)
    if host is not None:
        locations.append(host)
    if len({each.address for each in locations}) != len(locations):
        raise Ambiguous("two functions share one address")
    return tuple(locations)


def _loads(code: Code, file: bytes, around: int | None = None) -> tuple[frozenset[int], list[int]]:
    """(the addresses of the file's name, the instructions that load one of them).

    What comes before the name without a NUL, a Rust string or a jump table, may look like its
    folder: nothing loads that. All ways to tell its folder are searched in one pass.
    """
    endings = endings_of(code.elf, file)
    ways = [starts_of(code.elf, endings, folder) for folder in _FOLDERS]
    if endings:
        code.loads_of({at for way in ways for at in way}, around)
    for way in ways:
        if way and (loads := loads_of(code, way, file.decode())):
            return frozenset(way), loads
    return frozenset(), []


_Named = Mapping[int, tuple[Routine, frozenset[str]]]


def _own_names(code: Code, function: Routine, files: frozenset[int]) -> frozenset[str]:
    """The names, or numbers, that it gives as its own where it reports errors of these files."""
    names: set[str] = set()
    for registers in code.constants_at_calls(function).values():
        first, second, third, fourth = (
            registers.get(register, frozenset()) for register in code.arguments[:4]
        )
        if first & files:  # ERR_set_debug(file, line, function)
            names.update(text for at in third if (text := _text_at(code.elf, at)))
        elif first == {_LIBRARY_SSL} and fourth & files:  # ERR_put_error(library, function, …, file
            names.update(_NUMBERS.get(number, f"function {number}") for number in second)
    return frozenset(names)


def _text_at(elf: Elf, address: int) -> str | None:
    for segment in elf.loads:
        left = segment.address + segment.size_bytes - address
        if 0 < left <= segment.size_bytes and not segment.writable:
            text, end, _ = elf.read_at(address, min(NAME_BYTES_MAX, left)).partition(b"\0")
            return text.decode("ascii", "replace") if end else None
    return None


# --- reading and writing ------------------------------------------------------------------------


def _reading(code: Code, named: _Named) -> list[Location]:
    plain, others = _callers(code, named, "SSL_read", "ssl_read_internal")
    return _at_least_one("SSL_read", plain + [("SSL_read_ex", each[0]) for each in others], code)


def _writing(code: Code, named: _Named) -> list[Location]:
    """As for reading, where 3.3 put flags between the length and where to tell what was written."""
    internal = _internal(named, "ssl_write_internal").start
    plain, others = _callers(code, named, "SSL_write", "ssl_write_internal")
    flags_register = code.arguments[3]
    without_flags = [each for each in others if each[1]]
    flags = [_constant(code, function, internal, flags_register) for _, function in plain]
    takes_flags = bool(without_flags) or 0 in flags
    if not takes_flags and not flags and others:
        raise Ambiguous("whether SSL_write_ex takes flags is not certain")
    found = list(plain)
    for function, zero_flags in others:
        extended = "SSL_write_ex2" if takes_flags and not zero_flags else "SSL_write_ex"
        found.append((extended, function))
    return _at_least_one("SSL_write", found, code)


def _internal(named: _Named, name: str) -> Routine:
    candidates = [function for function, names in named.values() if name in names]
    if len(candidates) != 1:
        raise Ambiguous(f"{len(candidates)} functions may be {name}")
    if named[candidates[0].start][1] != {name}:
        raise Ambiguous(f"{name} is part of another function")
    return candidates[0]


def _callers(
    code: Code, named: _Named, plain_name: str, internal_name: str
) -> tuple[list[tuple[str, Routine]], list[tuple[Routine, bool]]]:
    """(the plain function, the functions that hand their arguments on): all that call the inner.

    Of each of the latter: whether it passes 0 as flags. Those for early data are met through what
    they call themselves, or not at all. Raises Ambiguous about the rest.
    """
    internal = _internal(named, internal_name).start
    plain: list[tuple[str, Routine]] = []
    others: list[tuple[Routine, bool]] = []
    calls = [at for at in code.callers(internal)[internal] if not _is_early(code, named, at)]
    for function in functions_with(calls, code):
        names = named.get(function.start, (function, frozenset()))[1]
        if sum(step.target == internal for step in function.calls) > 1:
            raise Ambiguous(f"two functions in one: it calls {internal_name} twice")
        if names == {plain_name}:
            plain.append((plain_name, function))
        elif names:
            raise Ambiguous(f"{', '.join(sorted(names))} calls {internal_name} itself")
        else:
            others.append((function, _hands_on(code, function, internal)))
    say_so = {start for start, (_, names) in named.items() if plain_name in names}
    if say_so != {function.start for _, function in plain}:
        raise Ambiguous(f"{len(say_so)} functions may be {plain_name}")
    return plain, others


def _is_early(code: Code, named: _Named, at: int) -> bool:
    """Whether an instruction is in a function for data that is sent before a handshake ends."""
    start, _ = code.elf.unwind_range_of(at) or (0, 0)
    return start in named and bool(named[start][1]) and named[start][1] <= _EARLY


def _hands_on(code: Code, function: Routine, internal: int) -> bool:
    """Whether it puts 0 between its own arguments. Raises Ambiguous if it does not hand them on."""
    first, second, third, fourth, fifth = code.arguments[:5]
    moved = zero = False
    step = function.steps[function.start]
    while step.flow is Flow.NEXT:
        for register, value in step.sets.items():
            if register in (first, second, third):
                raise Ambiguous("a function without a name changes what it hands on")
            if register == fifth:
                moved = value == (fourth, 0) and not zero
            if register == fourth:
                zero = value == 0
                if not zero or not moved:
                    raise Ambiguous("a function without a name changes what it hands on")
        following = function.steps.get(step.after)
        if following is None:
            break
        step = following
    if step.flow not in (Flow.CALL, Flow.JUMP) or step.target != internal:
        raise Ambiguous("a function without a name does not hand its arguments on")
    return zero


def _constant(code: Code, function: Routine, internal: int, register: str) -> int | None:
    """What is in the register where the function calls the inner one; None if not one constant."""
    for at, registers in code.constants_at_calls(function).items():
        if function.steps[at].target == internal:
            values = registers.get(register, frozenset())
            return next(iter(values)) if len(values) == 1 else None
    return None


def _at_least_one(name: str, found: list[tuple[str, Routine]], code: Code) -> list[Location]:
    if not found:
        raise Ambiguous(f"no function may be {name}")
    return [
        the_one(each, [function for other, function in found if other == each], code)
        for each in dict(found)
    ]


# --- the host -----------------------------------------------------------------------------------


def _control(code: Code, around: int) -> Location | None:
    """ssl3_ctrl, which is given SSL_ctrl's own arguments; None when it is not certain.

    Most of it lies behind a jump table: only the unwind table has its bounds. It is searched near
    the library's other functions: where it lies far off, the host is read in requests.
    """
    files, loads = _loads(code, _S3_LIB, around)
    bounds = {found for at in loads if (found := code.elf.unwind_range_of(at)) is not None}
    controls = []
    for start, end in bounds:
        function = code.every_instruction(start, end)
        if function and "ssl3_ctrl" in _own_names(code, function, files):
            controls.append(function)
    return located("SSL_ctrl", controls[0], code) if len(controls) == 1 else None
