"""Find SSL_read and SSL_write in BoringSSL that is linked statically and stripped.

`find_boringssl(file)` says where they are, or why it does not know. It goes by what the code does:
BoringSSL's functions report errors as `ERR_put_error(16, 0, reason, ".../ssl/ssl_lib.cc", line)`,
and which reasons a function can report, whom it calls and whether it writes memory tells three
functions from all others, in every build seen: Bun, Claude Code, opencode, gRPC, x86-64 and
aarch64. This file refuses to guess: exactly one candidate a function, whose start is known by the
unwind table or by an instruction that calls it, or none at all. It attaches nothing. The last
proof, that the first bytes passed are HTTP, is the kernel's (`proved` in probe.bpf.c).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from capture.elf import Elf, ElfError, Segment
from capture.instructions import Code, Flow, Function, Step

READ, WRITE, SET_HOST = "SSL_read", "SSL_write", "SSL_set_tlsext_host_name"

_LIBRARY_SSL = 16  # ERR_LIB_SSL
# Reasons of ssl.h and err.h; they are part of BoringSSL's interface and do not change.
_NOT_TO_BE_CALLED, _BAD_LENGTH, _SHUT_DOWN, _INVALID_SERVER_NAME = 66, 111, 194, 213
_HANDSHAKE_FAILURE, _UNINITIALIZED = 215, 226
_NO_MEMORY = 65  # not reported any more since 2023
# What only SSL_write says of all that wait for a handshake: since 2023 the first, until 2021 the
# second, between them neither.
_OF_WRITE = frozenset((_BAD_LENGTH, _SHUT_DOWN))

_MARKER, _AFTER_MARKER = b"ssl/ssl_lib.c", re.compile(rb"c?\0")
_OPENSSL_ONLY = ("SSL_read_ex", "OPENSSL_version_major")
_PRINTABLE = re.compile(rb"[ -~]*\Z")  # data without a NUL may come before a string
PATH_BYTES_MAX = 512
"""Longest source path before the marker: a build directory."""
REFERENCES_MAX = 4096
"""References to the file name: 30 to 60 in the builds seen."""


@dataclass(frozen=True, slots=True)
class Place:
    """A function in a file. `attach` is how far past the start a uprobe is cheapest and safe.

    `offset` is the file offset, `address` the virtual address, both of the function's start.
    `attach` steps over `endbr64` only (the stack is untouched there, so a uretprobe is safe too).
    """

    name: str
    address: int
    offset: int
    attach: int


@dataclass(frozen=True, slots=True)
class Found:
    """BoringSSL was recognised. `set_host` is None where the build lacks it: read the request."""

    read: Place
    write: Place
    set_host: Place | None
    build_id: str | None
    size_bytes: int
    machine: str

    @property
    def places(self) -> tuple[Place, ...]:
        """All functions found."""
        found = (self.read, self.write)
        return (*found, self.set_host) if self.set_host is not None else found

    @property
    def functions(self) -> Mapping[str, int]:
        """Symbol name to the file offset of its first instruction."""
        return MappingProxyType({place.name: place.offset for place in self.places})

    @property
    def reason(self) -> None:
        """Nothing is wrong."""
        return None


@dataclass(frozen=True, slots=True)
class NotRecognised:
    """Nothing to attach to; `reason` is for people."""

    reason: str
    build_id: str | None = None

    @property
    def functions(self) -> Mapping[str, int]:
        """None of them."""
        return MappingProxyType({})


def prepare() -> None:
    """Import all that a search needs: call it before giving up the right to read our own files."""
    for name in ("capstone", "capstone.x86", "capstone.arm64"):
        with suppress(ImportError):
            import_module(name)


def find_boringssl(file: str | Path | int) -> Found | NotRecognised:
    """Where BoringSSL's functions are in the file, or why not; never an exception.

    `file` is a path or an open descriptor.
    """
    build_id = None
    try:
        with Elf(file) as elf:
            build_id = elf.build_id
            return _find(elf)
    except ElfError as error:
        return NotRecognised(str(error), build_id)
    except ImportError as error:
        return NotRecognised(f"no disassembler: {error}", build_id)


# --- the search ---------------------------------------------------------------------------------


class _Doubt(Exception):
    """Why the search gave up; becomes NotRecognised."""


@dataclass(frozen=True, slots=True)
class _Reporter:
    """A function that reports errors of ssl_lib.cc, and the reasons it can give."""

    function: Function
    reasons: frozenset[int]
    calls: frozenset[int]


def _find(elf: Elf) -> Found | NotRecognised:
    try:
        names = _file_names(elf)
        if not names:
            return NotRecognised("no BoringSSL: nothing names ssl/ssl_lib.cc", elf.build_id)
        if elf.symbols(_OPENSSL_ONLY):
            return NotRecognised("OpenSSL, not BoringSSL: its symbols say so", elf.build_id)
        code = Code(elf)
        reporters = _reporters(code, names)
        write = _the_one(WRITE, _writers(reporters), code)
        read = _find_read([r for r in reporters if r.function.start != write.address], code)
        hosts = _setters_of_the_host(reporters)
        set_host = _place(SET_HOST, hosts[0], code) if len(hosts) == 1 else None
        places = {place.address for place in (read, write, set_host) if place is not None}
        if len(places) != (2 if set_host is None else 3):
            raise _Doubt("two functions share one address")
    except _Doubt as doubt:
        return NotRecognised(str(doubt), elf.build_id)
    return Found(read, write, set_host, elf.build_id, elf.size_bytes, elf.machine)


def _file_names(elf: Elf) -> tuple[int, ...]:
    """Addresses of the strings that name ssl_lib.cc, in segments that are never written."""
    constant = [segment for segment in elf.loads if not segment.writable]
    # Linkers that keep constants apart from code leave little to search; older ones mix them.
    return tuple(
        _names_in(elf, [s for s in constant if not s.executable])
        or _names_in(elf, [s for s in constant if s.executable])
    )


def _names_in(elf: Elf, segments: list[Segment]) -> list[int]:
    found = []
    for segment in segments:
        for at in elf.find(_MARKER, (segment,)):
            left = segment.address + segment.size_bytes - at - len(_MARKER)
            if not _AFTER_MARKER.match(elf.read_at(at + len(_MARKER), min(2, left))):
                continue
            before = min(PATH_BYTES_MAX, at - segment.address)
            directory = _PRINTABLE.search(elf.read_at(at - before, before))
            found.append(at - (len(directory[0]) if directory else 0))
    return found


def _reporters(code: Code, names: tuple[int, ...]) -> list[_Reporter]:
    """Every function that reports an error in ssl_lib.cc and whose bounds are certain."""
    functions: dict[int, Function] = {}
    count = 0
    for name in names:
        for at in code.loads_of(name):
            count += 1
            if count > REFERENCES_MAX:
                raise _Doubt(f"more than {REFERENCES_MAX} references to ssl_lib.cc")
            function = code.function_around(at)
            if function is not None:
                functions[function.start] = function
    if not count:
        raise _Doubt("nothing refers to the ssl_lib.cc string")
    return [_reporter(code, function, frozenset(names)) for function in _whole(functions.values())]


def _whole(functions: Iterable[Function]) -> list[Function]:
    """Without those that are only blocks of another. Raises _Doubt where two share code."""
    functions, blocks = list(functions), set()
    owners: dict[int, Function] = {}
    for function in functions:
        for step in function.steps:
            other = owners.setdefault(step, function)
            if other is function:
                continue
            if function.start in other.steps:
                blocks.add(function.start)
            elif other.start in function.steps:
                blocks.add(other.start)
            else:
                raise _Doubt(f"two functions share the code at {step:#x}")
    return [function for function in functions if function.start not in blocks]


def _reporter(code: Code, function: Function, names: frozenset[int]) -> _Reporter:
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


def _writers(reporters: list[_Reporter]) -> list[Function]:
    waits = {_HANDSHAKE_FAILURE, _UNINITIALIZED}
    known = waits | _OF_WRITE | {_NOT_TO_BE_CALLED}
    waiting = [r for r in reporters if waits <= r.reasons <= known and _calls_by_table(r.function)]
    telling = [r.function for r in waiting if r.reasons & _OF_WRITE]
    return telling or [r.function for r in waiting if _NOT_TO_BE_CALLED in r.reasons]


def _setters_of_the_host(reporters: list[_Reporter]) -> list[Function]:
    known = {_INVALID_SERVER_NAME, _NO_MEMORY}
    return [r.function for r in reporters if {_INVALID_SERVER_NAME} <= r.reasons <= known]


def _calls_by_table(function: Function) -> bool:
    """Both ends of the record layer are reached through the connection's method table."""
    return any(step.target is None for step in function.calls)


def _find_read(reporters: list[_Reporter], code: Code) -> Place:
    """SSL_read, from the function that waits for application data.

    That one (ssl_read_impl) is called by SSL_peek, and by SSL_read if SSL_peek is inlined there.
    Only SSL_read consumes what it returns, so only SSL_read writes to the connection.
    """
    waits = {_HANDSHAKE_FAILURE, _UNINITIALIZED}
    core = [r for r in reporters if waits <= r.reasons and not _OF_WRITE & r.reasons]
    core = [r for r in core if _calls_by_table(r.function)]
    if len(core) != 1:
        raise _Doubt(f"{len(core)} functions may be ssl_read_impl")
    if _NOT_TO_BE_CALLED in core[0].reasons:
        raise _Doubt("ssl_read_impl is inlined: SSL_read cannot be told from SSL_peek")
    start = core[0].function.start
    known = {r.function.start for r in reporters if r.reasons}
    if not all(caller.start in known for caller in _callers_of(start, code)):
        raise _Doubt("a function that reports nothing calls ssl_read_impl")
    candidates = [r for r in reporters if start in r.calls and _NOT_TO_BE_CALLED in r.reasons]
    if any(sum(step.target == start for step in r.function.calls) != 1 for r in candidates):
        raise _Doubt("two functions in one: it calls ssl_read_impl twice")
    consuming = [r.function for r in candidates if r.function.stores]
    if not consuming and len(candidates) == 1:
        return _the_one(READ, _readers_by(candidates[0].function, code), code)
    if len(consuming) == 1:
        return _the_one(READ, consuming, code)
    raise _Doubt(f"{len(candidates)} functions may be SSL_read")


def _readers_by(peek: Function, code: Code) -> list[Function]:
    """Functions that hand their arguments to SSL_peek before all else, and then consume (GCC)."""
    return [
        function
        for function in _callers_of(peek.start, code)
        if function.stores and _begins_with(function, peek.start, code)
    ]


def _callers_of(start: int, code: Code) -> list[Function]:
    """All functions that call one. Raises _Doubt: a caller without bounds may be the one sought."""
    callers: dict[int, Function] = {}
    for at in code.callers(start):
        function = code.function_around(at)
        if function is None:
            raise _Doubt(f"where the function around {at:#x} begins is not certain")
        callers[function.start] = function
    return _whole(callers.values())


def _begins_with(function: Function, callee: int, code: Code) -> bool:
    """Whether it always calls `callee`, with its own first three arguments."""
    step: Step | None = function.steps[function.start]
    while step is not None and step.flow is Flow.NEXT:
        if not step.sets.keys().isdisjoint(code.arguments[:3]):
            return False
        step = function.steps.get(step.after)
    return step is not None and step.flow is Flow.CALL and step.target == callee


def _the_one(name: str, candidates: list[Function], code: Code) -> Place:
    if len(candidates) != 1:
        raise _Doubt(f"{len(candidates)} functions may be {name}")
    place = _place(name, candidates[0], code)
    if place is None:
        raise _Doubt(f"the start of {name} is not certain: nothing calls it")
    return place


def _place(name: str, function: Function, code: Code) -> Place | None:
    """The function as a place to attach; None unless its start is proved."""
    start = function.start
    bounds = code.elf.unwind_range_of(start)
    if bounds is not None and bounds[0] != start:
        return None
    if bounds is None and not code.is_called(start):
        return None
    offset = code.elf.offset_of(start)
    if offset is None:
        return None
    return Place(name, start, offset, _attach(function))


def _attach(function: Function) -> int:
    first = function.steps[function.start]
    following = function.steps.get(first.after)
    # Single-stepping endbr64 costs 4 us a call, emulating the push behind it 0.8 us.
    if first.landing and first.flow is Flow.NEXT and first.stack == 0 and following is not None:
        return first.size if following.stack == -8 else 0
    return 0
