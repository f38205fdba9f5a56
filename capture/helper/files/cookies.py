"""What each probe of a library tells its program in the kernel: 64 bits, its cookie.

The uppermost byte is the number of the program (`attaching.py`). Below it, a library's number and
whether its functions are still to be proved; Go's probes have offsets of their own instead. Those
of rustls say besides in which registers what they need is (`rustls_cookie_shift` in probe.bpf.c).
This file knows no descriptors and no maps.
"""

from __future__ import annotations

from collections.abc import Iterator

from capture.functions.library import Library, Probe
from capture.functions.rustls_layer import Pointer, RecordLayer, ServerName

UNPROVED = 0x10000  # COOKIE_UNPROVED
_LAYER, _OBJECT, _OFFSET, _COUNTED, _REST = 17, 22, 27, 43, 44
_ENCRYPTER = 0x10  # RUSTLS_ENCRYPTER
_NAME_MAX = 0xFFFF
# Where `struct registers` has x86's registers, in the order of their numbers in instructions.
_WORDS = (10, 11, 12, 5, 19, 4, 13, 14, 9, 8, 7, 6, 3, 2, 1, 0)


class Unfit(Exception):
    """A place that no cookie can tell of; the text is for people."""


def cookies(library: Library, common: int, machine: str) -> Iterator[tuple[Probe, int]]:
    """Each probe with its cookie; `common` is what all of them say. Raises Unfit."""
    if library.layer is None:
        yield from ((probe, common) for probe in library.probes)
        return
    told = dict(_told(library.layer, machine))
    for probe in library.probes:
        if probe.offset not in told:
            raise Unfit(f"nothing is known of the place {probe.offset:#x}")
        yield probe, common | told[probe.offset]


def assumed_name(layer: RecordLayer) -> int:
    """Where this version keeps a connection's name, as the kernel writes it; 0: not known."""
    at: ServerName | None = layer.server_name
    if at is None:
        return 0
    state = at.state - (layer.encrypter - _ENCRYPTER)
    return state << 16 | at.name if 0 < state <= _NAME_MAX and at.name <= _NAME_MAX else 0


def _told(layer: RecordLayer, machine: str) -> Iterator[tuple[int, int]]:
    """By file offset, what is known of each place. Raises Unfit."""
    for send in layer.sends:
        rest = _layer_at(layer, send.layer, machine) | _object_at(send.message, machine)
        yield send.offset, rest | send.counted << _COUNTED
    for receive in layer.receives:
        yield receive.offset, _layer_at(layer, receive.layer, machine)
    for received in layer.received:
        yield received.offset, _object_at(received.result, machine) | layer.ok_tag << _REST


def _layer_at(layer: RecordLayer, pointer: Pointer, machine: str) -> int:
    away = pointer.displacement + layer.encrypter - _ENCRYPTER
    if away % 8:
        raise Unfit(f"a layer at {away:#x} from a register")
    return _word(pointer, machine) << _LAYER | _signed(away // 8, 12) << _REST


def _object_at(pointer: Pointer, machine: str) -> int:
    return _word(pointer, machine) << _OBJECT | _signed(pointer.displacement, 16) << _OFFSET


def _word(pointer: Pointer, machine: str) -> int:
    if machine == "aarch64":
        return pointer.register
    if pointer.register >= len(_WORDS):
        raise Unfit(f"register {pointer.register}")
    return _WORDS[pointer.register]


def _signed(value: int, bits: int) -> int:
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise Unfit(f"{value:#x} from a register")
    return value & (1 << bits) - 1
