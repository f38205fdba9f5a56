"""What rustls' probes are told arrives where the kernel program looks for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture import loader
from capture.functions.library import Library, Probe
from capture.functions.rustls_layer import (
    Kind,
    Pointer,
    Receive,
    Received,
    RecordLayer,
    Send,
    ServerName,
)
from capture.functions.stacks import Stack
from capture.helper.files.cookies import Unfit, assumed_name, cookies

SOURCE = Path(loader.SOURCE).read_text()
COMMON = 0x1ABCD
# In the order of their numbers in instructions.
REGISTERS = "ax cx dx bx sp bp si di r8 r9 r10 r11 r12 r13 r14 r15".split()


def words() -> list[str]:
    """The names of `struct registers` of x86-64, a word each."""
    match = re.search(r"#else\nstruct registers \{\s*u64 (.*?);\s*\};", SOURCE, re.S)
    assert match
    return [name.strip() for name in match[1].split(",")]


def shift(name: str) -> int:
    match = re.search(rf"\b{name} = (\d+)", SOURCE)
    assert match
    return int(match[1])


def signed(cookie: int, start: int, bits: int) -> int:
    value = cookie >> start & (1 << bits) - 1
    return value - (value >> bits - 1 << bits)


def library(send: Send, receive: Receive, received: Received, encrypter: int = 0x10) -> Library:
    layer = RecordLayer(
        *(None, encrypter, encrypter + 0x10, encrypter + 0x28, encrypter + 0x30, 255),
        *(ServerName(904, 16), (send,), (receive,), (received,)),
    )
    probes = (
        Probe("enter_rustls_send", send.offset),
        Probe("enter_rustls_receive", receive.offset),
        Probe("leave_rustls_receive", received.offset),
    )
    return Library(Stack.RUSTLS, probes, None, unproved=True, layer=layer)


NUMBERS = st.integers(0, 15)
OBJECTS = st.builds(Pointer, NUMBERS, st.integers(-0x7FFF, 0x7FFF))
LAYERS = st.builds(Pointer, NUMBERS, st.integers(-1000, 1000).map(lambda each: each * 8))


@given(LAYERS, OBJECTS, st.booleans(), LAYERS, OBJECTS, st.sampled_from([0x10, 0x18, 0x40]))
def test_each_place_is_told_what_it_needs(
    sends: Pointer, message: Pointer, counted: bool, receives: Pointer, result: Pointer, at: int
) -> None:
    made = library(
        Send(100, Kind.BRANCH, 90, sends, message, counted),
        Receive(200, Kind.BRANCH, 190, receives),
        Received(210, Kind.BRANCH, 190, result, 200),
        at,
    )
    told = {probe.offset: cookie for probe, cookie in cookies(made, COMMON, "x86_64")}
    names = words()
    for cookie in told.values():
        assert cookie & 0x1FFFF == COMMON
        assert cookie < 1 << 56
    for offset, pointer in ((100, sends), (200, receives)):
        register = names[told[offset] >> shift("RUSTLS_LAYER") & 31]
        away = 8 * signed(told[offset], shift("RUSTLS_REST"), 12)
        assert (register, away) == (
            REGISTERS[pointer.register],
            pointer.displacement + at - 0x10,
        )
    for offset, pointer in ((100, message), (210, result)):
        register = names[told[offset] >> shift("RUSTLS_OBJECT") & 31]
        away = signed(told[offset], shift("RUSTLS_OFFSET"), 16)
        assert (register, away) == (REGISTERS[pointer.register], pointer.displacement)
    assert told[100] >> shift("RUSTLS_COUNTED") & 1 == counted
    assert told[210] >> shift("RUSTLS_REST") & 0xFF == 255


PLACE = Pointer(3)


@pytest.mark.parametrize("layer", [Pointer(3, 4), Pointer(3, 8 * 3000), Pointer(16)])
def test_what_no_cookie_can_tell_is_refused(layer: Pointer) -> None:
    made = library(
        Send(100, Kind.BRANCH, 90, layer, PLACE, False),
        Receive(200, Kind.BRANCH, 190, PLACE),
        Received(210, Kind.BRANCH, 190, PLACE, 200),
    )
    with pytest.raises(Unfit):
        list(cookies(made, COMMON, "x86_64"))


def test_a_probe_that_nothing_is_known_of_is_refused() -> None:
    made = library(
        Send(100, Kind.BRANCH, 90, PLACE, PLACE, False),
        Receive(200, Kind.BRANCH, 190, PLACE),
        Received(210, Kind.BRANCH, 190, PLACE, 200),
    )
    with pytest.raises(Unfit):
        list(cookies(replace(made, probes=(Probe("enter_rustls_send", 101),)), COMMON, "x86_64"))


def test_the_place_of_names_is_told_from_the_encrypter_on() -> None:
    made = library(
        Send(100, Kind.BRANCH, 90, PLACE, PLACE, False),
        Receive(200, Kind.BRANCH, 190, PLACE),
        Received(210, Kind.BRANCH, 190, PLACE, 200),
        0x18,
    )
    assert made.layer is not None
    assert assumed_name(made.layer) == (904 - 8) << 16 | 16
    assert assumed_name(replace(made.layer, server_name=None)) == 0
