"""Find SSL_read and SSL_write in BoringSSL that is linked statically and stripped.

`find_boringssl(file)` returns where they are, or why not. It goes by what the code does:
BoringSSL's functions report errors as `ERR_put_error(16, 0, reason, ".../ssl/ssl_lib.cc", line)`,
and the reasons that a function can report, its calls and whether it writes memory distinguish three
functions from all others, in every build seen: Bun, Claude Code, opencode, gRPC, x86-64 and
aarch64. This file refuses to guess: exactly one candidate a function, whose start is known by the
unwind table or by an instruction that calls it, or none at all. It attaches nothing. The last
proof, that the first bytes passed are HTTP, is the kernel's (`proved` in probe.bpf.c).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from capture.functions.elf import Elf, ElfError
from capture.functions.finder.code import Code, Routine
from capture.functions.finder.error_reporters import (
    Location,
    callers_of,
    file_names,
    functions_around,
    library_of,
    loads_of,
    located,
    the_one,
)
from capture.functions.finder.instruction_sets import Flow, Step
from capture.functions.finder.not_found import Ambiguous, NotFound
from capture.functions.library import Library
from capture.functions.stacks import Stack

READ, WRITE, SET_HOST = "SSL_read", "SSL_write", "SSL_set_tlsext_host_name"

_LIBRARY_SSL = 16  # ERR_LIB_SSL
# Reasons of ssl.h and err.h; they are part of BoringSSL's interface and do not change.
_NOT_TO_BE_CALLED, _BAD_LENGTH, _SHUT_DOWN, _INVALID_SERVER_NAME = 66, 111, 194, 213
_HANDSHAKE_FAILURE, _UNINITIALIZED = 215, 226
_NO_MEMORY = 65  # not reported any more since 2023
# What, of all functions that wait for a handshake, only SSL_write reports: since 2023 the first,
# until 2021 the second, between them neither.
_OF_WRITE = frozenset((_BAD_LENGTH, _SHUT_DOWN))

_MARKER, _AFTER_MARKER = b"ssl/ssl_lib.c", re.compile(rb"c?\0")
_OPENSSL_ONLY = ("SSL_read_ex", "OPENSSL_version_major")


@dataclass(frozen=True, slots=True)
class Found:
    """BoringSSL was recognised. `set_host` is None where the build lacks it: read the request."""

    read: Location
    write: Location
    set_host: Location | None
    build_id: str | None
    size_bytes: int
    machine: str

    @property
    def locations(self) -> tuple[Location, ...]:
        """All functions found."""
        found = (self.read, self.write)
        return (*found, self.set_host) if self.set_host is not None else found

    @property
    def functions(self) -> Mapping[str, int]:
        """Symbol name to the file offset of its first instruction."""
        return MappingProxyType({each.name: each.offset for each in self.locations})


def library(fd: int) -> Library:
    """What to probe of BoringSSL in the file, or why it was not found."""
    return library_of(Stack.BORINGSSL, fd, find_boringssl(fd))


def find_boringssl(file: str | Path | int) -> Found | NotFound:
    """Where BoringSSL's functions are in the file, or why not; never an exception.

    `file` is a path or an open descriptor.
    """
    build_id = None
    try:
        with Elf(file) as elf:
            build_id = elf.build_id
            return _find(elf)
    except ElfError as error:
        return NotFound(str(error), build_id)
    except ImportError as error:
        return NotFound(f"no disassembler: {error}", build_id)


# --- the search ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reporter:
    """A function that reports errors of ssl_lib.cc, and the reasons it can give."""

    function: Routine
    reasons: frozenset[int]
    calls: frozenset[int]


def _find(elf: Elf) -> Found | NotFound:
    try:
        names = file_names(elf, _MARKER, _AFTER_MARKER)
        if not names:
            return NotFound("no BoringSSL: nothing names ssl/ssl_lib.cc", elf.build_id)
        if elf.symbols(_OPENSSL_ONLY):
            return NotFound("OpenSSL, not BoringSSL: its symbols say so", elf.build_id)
        code = Code(elf)
        reporters = _reporters(code, names)
        write = the_one(WRITE, _writers(reporters), code)
        read = _find_read([r for r in reporters if r.function.start != write.address], code)
        hosts = _setters_of_the_host(reporters)
        set_host = located(SET_HOST, hosts[0], code) if len(hosts) == 1 else None
        locations = {each.address for each in (read, write, set_host) if each is not None}
        if len(locations) != (2 if set_host is None else 3):
            raise Ambiguous("two functions share one address")
    except Ambiguous as problem:
        return NotFound(str(problem), elf.build_id)
    return Found(read, write, set_host, elf.build_id, elf.size_bytes, elf.machine)


def _reporters(code: Code, names: tuple[int, ...]) -> list[_Reporter]:
    """Every function that reports an error in ssl_lib.cc and whose bounds are certain."""
    loads = loads_of(code, names, "ssl_lib.cc")
    if not loads:
        raise Ambiguous("nothing refers to the ssl_lib.cc string")
    functions = functions_around(code, loads)
    return [_reporter(code, function, frozenset(names)) for function in functions]


def _reporter(code: Code, function: Routine, names: frozenset[int]) -> _Reporter:
    library, *others = code.arguments[:4]
    reasons: set[int] = set()
    for registers in code.constants_at_calls(function).values():
        if registers.get(library) != frozenset((_LIBRARY_SSL,)):
            continue
        # Whole-program optimisation drops the unused second argument (Bun 1.2, 1.3, opencode):
        # the reason is whatever comes before the file.
        for reason, file in pairwise(others):
            if registers.get(file, frozenset()) & names:
                reasons |= registers.get(reason, frozenset())
    calls = frozenset(step.target for step in function.calls if step.target is not None)
    return _Reporter(function, frozenset(reasons), calls)


def _writers(reporters: list[_Reporter]) -> list[Routine]:
    waits = {_HANDSHAKE_FAILURE, _UNINITIALIZED}
    known = waits | _OF_WRITE | {_NOT_TO_BE_CALLED}
    waiting = [r for r in reporters if waits <= r.reasons <= known and _calls_by_table(r.function)]
    certain = [r.function for r in waiting if r.reasons & _OF_WRITE]
    return certain or [r.function for r in waiting if _NOT_TO_BE_CALLED in r.reasons]


def _setters_of_the_host(reporters: list[_Reporter]) -> list[Routine]:
    known = {_INVALID_SERVER_NAME, _NO_MEMORY}
    return [r.function for r in reporters if {_INVALID_SERVER_NAME} <= r.reasons <= known]


def _calls_by_table(function: Routine) -> bool:
    """Both ends of the record layer are reached through the connection's method table."""
    return any(step.target is None for step in function.calls)


def _find_read(reporters: list[_Reporter], code: Code) -> Location:
    """SSL_read, from the function that waits for application data.

    That one (ssl_read_impl) is called by SSL_peek, and by SSL_read if SSL_peek is inlined there.
    Only SSL_read consumes what it returns, so only SSL_read writes to the connection.
    """
    waits = {_HANDSHAKE_FAILURE, _UNINITIALIZED}
    core = [r for r in reporters if waits <= r.reasons and not _OF_WRITE & r.reasons]
    core = [r for r in core if _calls_by_table(r.function)]
    if len(core) != 1:
        raise Ambiguous(f"{len(core)} functions may be ssl_read_impl")
    if _NOT_TO_BE_CALLED in core[0].reasons:
        raise Ambiguous("ssl_read_impl is inlined: SSL_read and SSL_peek look the same")
    start = core[0].function.start
    known = {r.function.start for r in reporters if r.reasons}
    if not all(caller.start in known for caller in callers_of(start, code)):
        raise Ambiguous("a function that reports nothing calls ssl_read_impl")
    candidates = [r for r in reporters if start in r.calls and _NOT_TO_BE_CALLED in r.reasons]
    if any(sum(step.target == start for step in r.function.calls) != 1 for r in candidates):
        raise Ambiguous("two functions in one: it calls ssl_read_impl twice")
    consuming = [r.function for r in candidates if r.function.stores]
    if not consuming and len(candidates) == 1:
        return the_one(READ, _readers_by(candidates[0].function, code), code)
    if len(consuming) == 1:
        return the_one(READ, consuming, code)
    raise Ambiguous(f"{len(candidates)} functions may be SSL_read")


def _readers_by(peek: Routine, code: Code) -> list[Routine]:
    """Functions that hand their arguments to SSL_peek before all else, and then consume (GCC)."""
    return [
        function
        for function in callers_of(peek.start, code)
        if function.stores and _begins_with(function, peek.start, code)
    ]


def _begins_with(function: Routine, callee: int, code: Code) -> bool:
    """Whether it always calls `callee`, with its own first three arguments."""
    step: Step | None = function.steps[function.start]
    while step is not None and step.flow is Flow.NEXT:
        if not step.sets.keys().isdisjoint(code.arguments[:3]):
            return False
        step = function.steps.get(step.after)
    return step is not None and step.flow is Flow.CALL and step.target == callee
