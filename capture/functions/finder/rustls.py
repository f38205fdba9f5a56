"""Find rustls' record layer in a program, by the panics of two source files and by data flow.

`find_rustls(file)` returns one `Found` or `NotFound` for each rustls in the file: a program may
have two. Both virtual calls of the record layer (`rustls_sites.py`) are sought in the functions
whose panics name `record_layer.rs` (there is `encrypt`) and `conn.rs` (there `decrypt` is inlined,
or it is in a function that is called or loaded there). The way does not depend on symbols, on the
compiler's version, or on who encrypts (aws-lc, ring). Known to hold for 0.23.16 to 0.23.46.

This file refuses to guess. A rustls is refused, with a reason, unless one layout serves all sites,
every function with panics of `record_layer.rs` has as many sites as it has ways to panic, of the
functions with one panic of `conn.rs` all have or reach a `decrypt` or none does, and each site has
a place for a probe.
The last proof, records that count up one by one and bytes that are HTTP, is the kernel's.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from capture.functions.elf import Elf, ElfError
from capture.functions.finder.code import REFERENCES_MAX, Code
from capture.functions.finder.effects import AARCH64, X86, Aarch64Effects, X86Effects
from capture.functions.finder.instruction_sets import Flow
from capture.functions.finder.not_found import Ambiguous, NotFound
from capture.functions.finder.paths import Paths
from capture.functions.finder.rust_panics import PanicLocation, by_folder, locations_in, texts_with
from capture.functions.finder.rustls_sites import (
    RECEIVE_NUMBER,
    SEND_NUMBER,
    ReceivePlace,
    SendPlace,
    Site,
    sites_in,
)
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.rustls_layer import (
    SITES_MAX,
    Pointer,
    Receive,
    Received,
    RecordLayer,
    Send,
    ServerName,
)
from capture.functions.stacks import INSTEAD, STACKS, Stack
from capture.functions.x86_lengths import may_end_with

_RECORD_LAYER, _CONN = b"/src/record_layer.rs", b"/src/conn.rs"
_NEXT = b"/src/crypto/cipher/record_layer.rs"
"""Where 0.24 has it. As of 0.24.0-dev.1 (August 2026) encrypt writes into a buffer that it is given
and has no result of its own size, and sending and receiving have a struct each, so that neither
leads to the other: too much is in flux to build something to test against."""
_VERSION = re.compile(r"rustls-(\d+\.\d+\.\d+[\w.+-]*)$")
_MARKER, _LABEL = b"rustls", b"c ap traffic"
"""The second is in every implementation of TLS 1.3 (RFC 8446, section 7.1)."""
DECRYPTER = 0x10
"""How far behind the encrypter the decrypter's box is, in the layer."""
CALLEE_BYTES_MAX = 0x800
"""The function with `decrypt`, where it is not inlined: some 600 bytes."""
FUNCTION_BYTES_MAX = 0x20000
"""Of the functions with panics of conn.rs: 21 KB in uv."""
AROUND_BYTES = 0x1000
"""How far around an address the bounds of its function are looked for at first."""
FUNCTIONS_MAX = 512
STARTS_MAX = 4
BETWEEN_MAX, MEET_MAX = 4, 32
"""Who goes between instructions meets them within some three: how many are looked at, followed."""
SERVER_NAME = ServerName(state=0x388, name=0x10)
"""The same in 0.23.35 to 0.23.46 and in a fork, with both providers (rustc 1.91 to 1.100)."""
SERVER_NAME_SINCE = (0, 23, 35)
_PADDING = re.compile(rb"\xcc{2,}")
# A call through slot 3, or a load of it.
_MAY_CALL = {
    "x86_64": re.compile(rb"\xff[\x50-\x57]\x18|\x8b[\x40-\x7f]\x18"),
    "aarch64": re.compile(rb"[\x0c-\x0f]\x40\xf9"),
}


def _arm_builds_frame(word: int) -> bool:
    """`sub sp, sp, #n`, `stp x, x, [sp, #-n]!`, `str x30, [sp, #-n]!`, `paciasp`."""
    return (
        word & 0xFF8003FF == 0xD10003FF
        or word & 0xFFE003E0 == 0xA9A003E0
        or word & 0xFFF00FFF == 0xF8100FFE
        or word == 0xD503233F
    )


def _arm_goes_elsewhere(word: int) -> bool:
    """`ret`, `b`, `br`, `brk`, `udf`."""
    return (
        word in (0xD65F03C0, 0)
        or word & 0xFC000000 == 0x14000000
        or word & 0xFFFFFC1F == 0xD61F0000
        or word & 0xFFE0001F == 0xD4200000
    )


_GOES = (Flow.JUMP, Flow.BRANCH)
_RELATIVE = re.compile(r"\[rip ([+-]) (0x[0-9a-f]+)\]")
_ARM_PAGE = re.compile(r"(x\d+), #(0x[0-9a-f]+)")
_ARM_ADD = re.compile(r"x\d+, (x\d+), #(0x[0-9a-f]+)")
_ARM_LOAD = re.compile(r"x\d+, \[(x\d+), #(0x[0-9a-f]+)\]")


@dataclass(frozen=True, slots=True)
class Found:
    """One rustls was found: its sites, and the functions that they are in."""

    layer: RecordLayer
    functions: tuple[Function, ...]
    build_id: str | None


def library(fd: int) -> Library | None:
    """What to probe of rustls in the file, or why not; the second one is among its `others`."""
    found = [_library(each) for each in find_rustls(fd) if not _is_absent(each)]
    found.sort(key=lambda each: not each.probes)
    if not found:
        return None
    first, *others = found
    return replace(first, others=tuple(others))


def _is_absent(found: Found | NotFound) -> bool:
    return isinstance(found, NotFound) and found.absent


def _library(found: Found | NotFound) -> Library:
    if isinstance(found, NotFound):
        return Library(Stack.RUSTLS, (), found.build_id, f"{found.reason}; {INSTEAD}")
    layer = found.layer
    send, receive, received = STACKS[Stack.RUSTLS].programs
    probes = (
        *(Probe(send, each.offset) for each in layer.sends),
        *(Probe(receive, each.offset) for each in layer.receives),
        *(Probe(received, each.offset) for each in layer.received),
    )
    return Library(
        Stack.RUSTLS,
        probes,
        found.build_id,
        unproved=True,
        functions=found.functions,
        layer=layer,
    )


def find_rustls(file: str | Path | int) -> tuple[Found | NotFound, ...]:
    """Each rustls in the file, or why it is refused; never an exception.

    `file` is a path or an open descriptor. In a file without rustls there is one that is absent.
    """
    build_id = None
    try:
        with Elf(file) as elf:
            build_id = elf.build_id
            return tuple(_find(elf))
    except ElfError as error:
        return (NotFound(str(error), build_id),)
    except ImportError as error:
        return (NotFound(f"no disassembler: {error}", build_id),)


def _find(elf: Elf) -> Iterator[Found | NotFound]:
    layers = by_folder(locations_in(elf, _RECORD_LAYER), _RECORD_LAYER)
    conns = by_folder(locations_in(elf, _CONN), _CONN)
    for folder in by_folder(locations_in(elf, _NEXT), _NEXT):
        reason = "its record layer has another shape, that of 0.24"
        yield NotFound(f"{_named(folder)}: {reason}", elf.build_id)
        if not layers:
            return
    if not layers:
        speaks = any(texts_with(elf, _CONN)) or any(texts_with(elf, _LABEL))
        speaks = speaks and any(texts_with(elf, _MARKER))
        reason = "rustls without the source locations of its panics"
        yield NotFound(reason, elf.build_id, absent=not speaks)
        return
    search = _Search(elf)
    panics = (each for folder in layers for each in (*layers[folder], *conns.get(folder, ())))
    search.code.loads_of([each.address for each in panics])  # in one pass
    for folder, named in layers.items():
        try:
            yield search.layer(_version(folder), named, conns.get(folder, []))
        except Ambiguous as problem:
            yield NotFound(f"{_named(folder)}: {problem}", elf.build_id)


def _named(folder: str) -> str:
    version = _version(folder)
    return f"rustls {version}" if version else f"rustls of {folder.rpartition('/')[2] or folder}"


def _version(folder: str) -> str | None:
    match = _VERSION.search(folder)
    return match[1] if match else None


def _server_name(version: str | None) -> ServerName | None:
    """A fork's may be elsewhere: the kernel believes nothing that is no name."""
    if version is None:
        return SERVER_NAME
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return SERVER_NAME if numbers >= SERVER_NAME_SINCE else None


# --- the search ---------------------------------------------------------------------------------


class _Search:
    """The code of one file, of which each function is read once."""

    def __init__(self, elf: Elf) -> None:
        self.elf = elf
        self.code = Code(elf)
        self.abi = AARCH64 if self.code.arm else X86
        self._reader = Aarch64Effects() if self.code.arm else X86Effects()
        self._paths: dict[tuple[int, int], Paths | None] = {}

    def layer(
        self, version: str | None, panics: list[PanicLocation], conn: list[PanicLocation]
    ) -> Found:
        """The record layer of one copy of rustls. Raises Ambiguous."""
        layers, _ = self._functions_with(panics, sure=True)
        conns = [self._functions_with([each], sure=False) for each in conn]
        roots = [list(functions) for functions, _ in conns]
        if not layers:
            raise Ambiguous("nothing refers to the panics of record_layer.rs")
        if not any(roots):
            raise Ambiguous("nothing refers to panics of conn.rs")
        locations = [each.address for each in panics]
        found: dict[int, _Located] = {}
        everything = dict.fromkeys(chain(layers, *roots))
        for paths in everything:
            for site in sites_in(paths, self.abi, locations):
                found[site.call] = _Located(site, paths)
        reached = {root: self._mentioned(root) for root in chain(*roots)}
        starts = sorted(set().union(*reached.values()))
        for callee in dict.fromkeys(map(self._callee, starts)):
            if callee is not None and callee not in everything:
                for site in sites_in(callee, self.abi, locations):
                    found.setdefault(site.call, _Located(site, callee))
        for paths in {each.paths for each in found.values()}:
            while not self._is_known_well(paths):
                again = {site.call: site for site in sites_in(paths, self.abi, locations)}
                for call in [each.site.call for each in found.values() if each.paths is paths]:
                    del found[call]
                found |= {call: _Located(site, paths) for call, site in again.items()}
        sites = sorted(found.values(), key=lambda each: each.site.call)
        encrypter = _checked(sites)
        _check_complete(sites, layers)
        for functions, unknown in conns:
            _check_alike(sites, {root: reached[root] for root in functions}, unknown)
        return self._found(version, encrypter, sites)

    # --- functions ----------------------------------------------------------------------------

    def _functions_with(
        self, locations: list[PanicLocation], *, sure: bool
    ) -> tuple[dict[Paths, int], int]:
        """The functions with these panics, and in how many places at most each has one of them.

        Also how many places are in no function that is certain: none if they must be `sure`.
        """
        unknown = 0
        counts: dict[Paths, Counter[int]] = defaultdict(Counter)
        for location in locations:
            loads = self.code.loads_of([location.address])[location.address]
            if len(loads) > REFERENCES_MAX:
                raise Ambiguous(f"more than {REFERENCES_MAX} references to one panic")
            for at in loads:
                paths = self._around(at)
                if paths is None and sure:
                    raise Ambiguous(f"where the function around {at:#x} begins is not certain")
                if paths is None:
                    unknown += 1
                elif at in paths.index:
                    counts[paths][location.address] += 1
        if len(counts) > FUNCTIONS_MAX:
            raise Ambiguous(f"more than {FUNCTIONS_MAX} functions may panic there")
        return {paths: max(count.values()) for paths, count in counts.items()}, unknown

    def _around(self, address: int) -> Paths | None:
        """The function around an address, by the unwind table, or what lies between paddings."""
        bounds = self.elf.unwind_range_of(address) or self._between_paddings(address)
        if bounds is None or bounds[1] - bounds[0] > FUNCTION_BYTES_MAX:
            return None
        if bounds not in self._paths:
            lines = self.code.listing(*bounds)
            paths = Paths(self.code, lines, self._reader) if lines else None
            self._paths[bounds] = paths if paths and paths.is_whole else None
        return self._paths[bounds]

    def _between_paddings(self, address: int) -> tuple[int, int] | None:
        """From one likely start of a function to the next: some functions, in order."""
        for segment in self.elf.executables:
            if segment.address <= address < segment.address + segment.size_bytes:
                for reach in (AROUND_BYTES, FUNCTION_BYTES_MAX // 2):
                    base = max((address - reach) & ~15, segment.address)
                    code = self.code.bytes_at(base, address + reach - base)
                    starts = self._likely_starts(base, code)
                    before = max((at for at in starts if at <= address), default=None)
                    after = min((at for at in starts if at > address), default=None)
                    if before is not None and after is not None and after < base + len(code):
                        return before, after
        return None

    def _likely_starts(self, base: int, code: bytes) -> list[int]:
        """Behind padding; on aarch64, where a frame is built behind what goes elsewhere."""
        if not self.code.arm:
            ends = (base + match.end() for match in _PADDING.finditer(code))
            return [at for at in ends if at % 16 == 0]
        words = memoryview(code[: len(code) & ~3]).cast("I")
        return [
            base + 4 * number
            for number in range(1, len(words))
            if _arm_builds_frame(words[number]) and _arm_goes_elsewhere(words[number - 1])
        ]

    def _is_known_well(self, paths: Paths) -> bool:
        """False where others go to what was taken as certain: it is told so, to be looked at again.

        A part that was moved elsewhere comes back, as of code that is seldom run.
        """
        numbers = [paths.index[address] for address in paths.relied_on]
        paths.relied_on.clear()
        firsts = ((max(number - BETWEEN_MAX, 0), number) for number in numbers)
        looked_at = {
            address
            for first, number in firsts
            for address in range(paths.lines[first][0] + 1, paths.lines[number][0] + 1)
        }
        entries = (*self.code.entries(looked_at), *self._returns_from_parts(paths))
        came = {to for at, to in entries if at not in paths and self._is_instruction(at)}
        came |= {to for at, to in entries if paths.calls(at)}
        before = paths.entered
        paths.entered |= {met for to in came for met in self._met(paths, to)}
        return paths.entered == before

    def _met(self, paths: Paths, address: int) -> Iterator[int]:
        """Where what begins at an address, maybe between instructions, goes on as the function."""
        for _ in range(MEET_MAX):
            if address in paths.index:
                yield address
                return
            step = self.code.step(address)
            if step is None:
                return
            if step.target in paths.index:
                yield step.target
            if step.flow not in (Flow.NEXT, Flow.BRANCH, Flow.CALL):
                return
            address = step.after

    def _is_instruction(self, address: int) -> bool:
        """Whether the bytes there, which look like an instruction, may be one."""
        paths = self._around(address)
        return address in paths.index if paths else self.code.step(address) is not None

    def _returns_from_parts(self, paths: Paths) -> Iterator[tuple[int, int]]:
        """(address, target) of jumps into a function from where it jumps to, however far away."""
        for number in range(len(paths.lines)):
            target = paths.target(number) if paths.flow(number) in _GOES else None
            if target is not None and target not in paths:
                part = self._around(target)
                for each in range(len(part.lines)) if part else ():
                    to = part.target(each) if part and part.flow(each) in _GOES else None
                    if part and to is not None and to in paths and to != paths.start:
                        yield part.lines[each][0], to

    def _mentioned(self, paths: Paths) -> set[int]:
        """The functions that a function calls, or whose addresses it loads, maybe to call them."""
        found = set(self._called(paths))
        return {
            each
            for each in found
            if any(each - s.address in range(s.size_bytes) for s in self.elf.executables)
        }

    def _called(self, paths: Paths) -> Iterator[int]:
        pages: dict[str, int] = {}
        for number, (address, size, name, operands) in enumerate(paths.lines):
            flow = paths.flow(number)
            target = paths.target(number) if flow in (Flow.CALL, Flow.JUMP) else None
            if target is not None:
                if target not in paths or flow is Flow.CALL:
                    yield target
            elif self.code.arm:
                if match := _ARM_PAGE.fullmatch(operands) if name == "adrp" else None:
                    pages[match[1]] = int(match[2], 16)
                elif match := _ARM_ADD.fullmatch(operands) if name == "add" else None:
                    yield pages.get(match[1], 0) + int(match[2], 16)
                elif match := _ARM_LOAD.fullmatch(operands) if name == "ldr" else None:
                    yield self._pointer(pages.get(match[1], 0) + int(match[2], 16))
            elif "rip" in operands and (match := _RELATIVE.search(operands)):
                where = address + size + int(match[2], 16) * (-1 if match[1] == "-" else 1)
                yield where if name == "lea" else self._pointer(where)

    def _pointer(self, address: int) -> int:
        """What a pointer in memory that is relocated holds; 0 where there is none."""
        for segment in self.elf.loads:
            if segment.writable and 0 <= address - segment.address <= segment.size_bytes - 8:
                return self.elf.pointer_at(address) or 0
        return 0

    def _callee(self, start: int) -> Paths | None:
        """A function that may be the one with `decrypt`: small, and with a call like it."""
        bounds = self.elf.unwind_range_of(start)
        if bounds is not None and (bounds[0] != start or bounds[1] - start > CALLEE_BYTES_MAX):
            return None
        size = CALLEE_BYTES_MAX if bounds is None else bounds[1] - start
        if not _MAY_CALL[self.elf.machine].search(self.code.bytes_at(start, size)):
            return None
        return self._around(start)

    # --- the result ---------------------------------------------------------------------------

    def _found(self, version: str | None, encrypter: int, sites: list[_Located]) -> Found:
        functions = {each.paths: self._function(each.paths, sites) for each in sites}
        sends: list[Send] = []
        receives: list[Receive] = []
        received: list[Received] = []
        for site, paths in sites:
            start, place = functions[paths].offset, site.place
            if isinstance(place, SendPlace):
                at = self._offset(place.address)
                layer = _moved(place.layer, site.box - encrypter)
                sends.append(Send(at, place.kind, start, layer, place.message, place.counted))
            elif isinstance(place, ReceivePlace):
                at, after = self._offset(place.address), self._offset(place.after)
                layer = _moved(place.layer, site.box - encrypter - DECRYPTER)
                receives.append(Receive(at, place.kind, start, layer))
                received.append(Received(after, place.after_kind, start, place.result, at))
        (ok_tag,) = {each.site.ok_tag for each in sites if not each.site.sends}
        assert ok_tag is not None
        found = RecordLayer(
            version,
            encrypter,
            encrypter + DECRYPTER,
            encrypter + SEND_NUMBER,
            encrypter + DECRYPTER + RECEIVE_NUMBER,
            ok_tag,
            _server_name(version),
            tuple(sends),
            tuple(receives),
            tuple(received),
        )
        return Found(found, tuple(functions.values()), self.elf.build_id)

    def _offset(self, address: int) -> int:
        offset = self.elf.offset_of(address)
        if offset is None:
            raise Ambiguous(f"{address:#x} is not in the file")
        return offset

    def _function(self, paths: Paths, sites: list[_Located]) -> Function:
        """The function, as far as it has probes, and what proves its start. Raises Ambiguous."""
        places = [each.site.place for each in sites if each.paths is paths]
        probed = [each.address for each in places if each is not None]
        last = max(probed + [each.after for each in places if isinstance(each, ReceivePlace)])
        end = last + paths.lines[paths.index[last]][1]
        if self.elf.unwind_range_of(paths.start) is not None:
            return Function(self._offset(paths.start), Proof.UNWIND, 0, end - paths.start)
        start, called_at = self._called_start(paths, min(probed))
        return Function(self._offset(start), Proof.CALL, self._offset(called_at), end - start)

    def _called_start(self, paths: Paths, first: int) -> tuple[int, int]:
        """The nearest function that begins before an address and is called, and where it is."""
        if self.code.arm:  # each one is sought for itself: there are few
            numbers = [number for number, line in enumerate(paths.lines) if line[0] <= first]
            ends = (Flow.JUMP, Flow.STOP)
            near = [paths.lines[n][0] for n in numbers if not n or paths.flow(n - 1) in ends]
            sought = ((start, self.code.caller(start)) for start in near[: -STARTS_MAX - 1 : -1])
            called = next(((start, at) for start, at in sought if at is not None), None)
        else:
            aligned = (line[0] for line in paths.lines if not line[0] % 16 and line[0] <= first)
            near = [at for at in aligned if may_end_with(self.code.bytes_at(at - 16, 16))]
            callers = self.code.callers(*near)
            called = max(
                ((start, callers[start][0]) for start in near if callers[start]), default=None
            )
        if called is None:
            reason = "is not certain: nothing calls it"
            raise Ambiguous(f"the start of the function before {first:#x} {reason}")
        return called


def _moved(layer: Pointer, displacement: int) -> Pointer:
    """Where the layer is in what a register points to."""
    return Pointer(layer.register, layer.displacement + displacement)


class _Located(NamedTuple):
    """A site and the function that it is in."""

    site: Site
    paths: Paths


def _checked(sites: list[_Located]) -> int:
    """The one offset of the encrypter. Raises Ambiguous where sites disagree."""
    sends = {each.site.box for each in sites if each.site.sends and not each.site.in_frame}
    receives = {each.site.box for each in sites if not each.site.sends}
    if not sends or not receives:
        raise Ambiguous(f"no call of {'decrypt' if sends else 'encrypt'} was recognised")
    # The layer may lie in another struct, or in a frame: then all of it is elsewhere.
    first = min(sends)
    apart = {each - first for each in sends} | {each - first - DECRYPTER for each in receives}
    if first < 0 or 0 not in apart or any(each % 8 for each in apart):
        offsets = ", ".join(f"{each:#x}" for each in sorted(sends | receives))
        raise Ambiguous(f"the boxes are at offsets that do not belong together: {offsets}")
    if len(sites) > SITES_MAX:
        raise Ambiguous(f"{len(sites)} calls of encrypt and decrypt")
    tags = {each.site.ok_tag for each in sites if not each.site.sends}
    if len(tags) != 1 or None in tags:
        raise Ambiguous("how decrypt says that it succeeded is not certain")
    for site, _ in sites:
        if site.place is None:
            raise Ambiguous(f"no place for a probe at the call {site.call:#x} is certain")
    return first


def _check_complete(sites: list[_Located], layers: Mapping[Paths, int]) -> None:
    """Raises Ambiguous where a function with panics of record_layer.rs should have more sites."""
    for paths, panics in layers.items():
        count = sum(each.paths is paths for each in sites)
        if count < panics:
            where = f"in the function at {paths.start:#x}"
            raise Ambiguous(f"{count} of {panics} calls were recognised {where}")


def _check_alike(sites: list[_Located], reached: Mapping[Paths, set[int]], unknown: int) -> None:
    """Raises Ambiguous where some functions with one panic of conn.rs reach `decrypt`, some not.

    They are one function, compiled for some types. Another panic's may have no part in it.
    `unknown`: so many more may have that panic.
    """
    receives = [each for each in sites if not each.site.sends]
    without = [
        root
        for root, starts in reached.items()
        if not any(
            each.paths is root or any(_is_in(each, start) for start in starts) for each in receives
        )
    ]
    missing = len(without) + unknown
    if missing and len(without) < len(reached):
        where = f"{missing} of {len(reached) + unknown} functions with one panic of conn.rs"
        raise Ambiguous(f"no decrypt was recognised in {where}")


def _is_in(located: _Located, start: int) -> bool:
    """Whether a site is in the function that starts there."""
    return start in located.paths.index and 0 <= located.site.call - start < CALLEE_BYTES_MAX
