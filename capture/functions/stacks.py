"""The TLS stacks that we know: ONE row each, for root and for the finder alike.

A row has what a file with the stack is recognised by, which BPF programs belong at which of its
functions, which module of the finder searches for them where the file has no symbols, and what a
person can do where the stack cannot be metered. Root reads this table, so it is data: a finder is
a name, which only the finder's process imports. To add a stack, add a row (and its finder).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

INSTEAD = "use `halton-meter run --via proxy`"

LINKER_FUNCTION = "_dl_debug_state"
"""Called when libraries were mapped: for debuggers. glibc and musl both have it, empty."""


class Stack(Enum):
    """A TLS stack, by the name that people see; the linker is none, but is probed as they are."""

    OPENSSL = "OpenSSL"
    BORINGSSL = "BoringSSL"
    GO = "Go crypto/tls"
    RUSTLS = "rustls"
    JSSE = "JSSE"
    LINKER = "dynamic linker"


@dataclass(frozen=True, slots=True)
class Row:
    """What there is to know about one stack.

    `symbols` maps a function's symbol to the programs at its entry and at its return (None: only
    the entry matters), `programs` are those attached without a symbol. `marker` is in every file
    that holds the stack without symbols; `finder` is the module that then looks for its functions
    (None: it is not probed, and `advice` is what to do). `library` is the name of the file that
    holds it, where that alone is a sure sign. `partly_known`: some builds are not recognised.
    `ahead`: worth probing before anybody runs the file.
    """

    symbols: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    marker: bytes | None = None
    finder: str | None = None
    advice: str | None = None
    library: str | None = None
    partly_known: bool = False
    ahead: bool = True


_SSL: Mapping[str, tuple[str, str | None]] = {
    # The order in which they are attached: a client's first bytes are its request.
    "SSL_write": ("enter_write", "leave_plain"),
    "SSL_write_ex": ("enter_write_ex", "leave_ex"),
    "SSL_write_ex2": ("enter_write_ex2", "leave_ex"),
    "SSL_read": ("enter_read", "leave_plain"),
    "SSL_read_ex": ("enter_read_ex", "leave_ex"),
    "SSL_ctrl": ("enter_ctrl", None),
    "SSL_set_tlsext_host_name": ("enter_set_host", None),
    "SSL_free": ("enter_free", None),
    "SSL_clear": ("enter_clear", None),
    "SSL_shutdown": ("enter_shutdown", None),
}

# Markers are looked for in this order; what is not probed is reported only if nothing else is.
STACKS: Mapping[Stack, Row] = {
    Stack.BORINGSSL: Row(
        symbols=_SSL,
        marker=b"ssl/ssl_lib.cc\0",
        finder="capture.functions.finder.boringssl",
        partly_known=True,
    ),
    Stack.OPENSSL: Row(
        symbols=_SSL,
        marker=b"ssl/ssl_lib.c\0",  # or BoringSSL of 2023 and before
        finder="capture.functions.finder.openssl",
        partly_known=True,
    ),
    Stack.GO: Row(
        programs=(
            "enter_go_read",
            "enter_go_write",
            "leave_go_read",
            "leave_go_write",
            "enter_go_close",
        ),
        marker=b"\xff Go buildinf:",
        finder="capture.functions.finder.golang",
        ahead=False,  # a machine has many Go programs, of some twenty probes each
    ),
    Stack.RUSTLS: Row(marker=b"rustls", advice=f"rustls is not probed; {INSTEAD}"),
    Stack.JSSE: Row(library="libjvm.so", advice=f"Java's own TLS is not probed; {INSTEAD}"),
    Stack.LINKER: Row(symbols={LINKER_FUNCTION: ("on_mapped", None)}),
}

SSL_FUNCTIONS = _SSL
"""Symbol -> programs, of OpenSSL and BoringSSL alike."""

PROGRAMS: tuple[str, ...] = tuple(
    dict.fromkeys(
        program
        for row in STACKS.values()
        for program in (
            *(program for pair in row.symbols.values() for program in pair if program),
            *row.programs,
        )
    )
)
"""Every program that may be attached to a file."""

AT_RETURN = frozenset(program for _, program in _SSL.values() if program)
"""Programs of return probes. One in a Go program would crash it: where each belongs is fixed."""
