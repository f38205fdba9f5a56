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
    GNUTLS = "GnuTLS"
    NSS = "NSS"
    MBEDTLS = "mbedTLS"
    WOLFSSL = "wolfSSL"
    S2N = "s2n"
    BTLS = "Mono BTLS"
    GO = "Go crypto/tls"
    GO_FORK = "a fork of Go crypto/tls"
    RUSTLS = "rustls"
    BEARSSL = "BearSSL"
    BOTAN = "Botan"
    ERLANG = "Erlang ssl"
    JSSE = "JSSE"
    OTHER = "TLS of a kind not known"
    LINKER = "dynamic linker"


@dataclass(frozen=True, slots=True)
class Row:
    """What there is to know about one stack.

    `symbols` maps a function's symbol to the programs at its entry and at its return (None: only
    the entry matters), `programs` are those attached without a symbol. `needed` are the groups of
    symbols of which a file that holds the stack defines one. One of the `markers` is in every
    file that holds the stack without symbols; `finder` is the module that then looks for its
    functions (None: it is not probed, and `advice` is what to do). `library` is the name of the
    file that holds it, where that alone is a sure sign. `partly_known`: some builds are not
    recognised. `ahead`: worth probing before anybody runs the file.
    """

    symbols: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    programs: tuple[str, ...] = ()
    needed: tuple[tuple[str, ...], ...] = ()
    markers: tuple[bytes, ...] = ()
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

# Objects, buffers and results of these are passed as OpenSSL's are, so its programs serve.
_GNUTLS: Mapping[str, tuple[str, str | None]] = {
    "gnutls_record_send": ("enter_write", "leave_plain"),
    "gnutls_record_send2": ("enter_write", "leave_plain"),
    "gnutls_record_recv": ("enter_read", "leave_plain"),
    "gnutls_record_recv_seq": ("enter_read", "leave_plain"),
    "gnutls_server_name_set": ("enter_set_sized_host", None),
    "gnutls_deinit": ("enter_free", None),
    "gnutls_bye": ("enter_shutdown", None),
}
# NSS has a layer of NSPR's files, which have these functions in another library.
_NSS: Mapping[str, tuple[str, str | None]] = {
    "PR_Write": ("enter_write", "leave_plain"),
    "PR_Send": ("enter_write", "leave_plain"),
    "PR_Read": ("enter_read", "leave_plain"),
    "PR_Recv": ("enter_read", "leave_plain"),
    "SSL_SetURL": ("enter_set_host", None),
    "PR_Close": ("enter_free", None),
    "PR_Shutdown": ("enter_shutdown", None),
}
_MBEDTLS: Mapping[str, tuple[str, str | None]] = {
    "mbedtls_ssl_write": ("enter_write", "leave_plain"),
    "mbedtls_ssl_read": ("enter_read", "leave_plain"),
    "mbedtls_ssl_set_hostname": ("enter_set_host", None),
    "mbedtls_ssl_free": ("enter_free", None),
    "mbedtls_ssl_session_reset": ("enter_clear", None),
    "mbedtls_ssl_close_notify": ("enter_shutdown", None),
}
_WOLFSSL: Mapping[str, tuple[str, str | None]] = {
    "wolfSSL_write": ("enter_write", "leave_plain"),
    "wolfSSL_send": ("enter_write", "leave_plain"),
    "wolfSSL_read": ("enter_read", "leave_plain"),
    "wolfSSL_recv": ("enter_read", "leave_plain"),
    "wolfSSL_UseSNI": ("enter_set_sized_host", None),
    "wolfSSL_free": ("enter_free", None),
    "wolfSSL_clear": ("enter_clear", None),
    "wolfSSL_shutdown": ("enter_shutdown", None),
}
_S2N: Mapping[str, tuple[str, str | None]] = {
    "s2n_send": ("enter_write", "leave_plain"),
    "s2n_recv": ("enter_read", "leave_plain"),
    "s2n_set_server_name": ("enter_set_host", None),
    "s2n_connection_free": ("enter_free", None),
    "s2n_connection_wipe": ("enter_clear", None),
    "s2n_shutdown": ("enter_shutdown", None),
}
_BTLS: Mapping[str, tuple[str, str | None]] = {
    "mono_btls_ssl_write": ("enter_write", "leave_plain"),
    "mono_btls_ssl_read": ("enter_read", "leave_plain"),
    "mono_btls_ssl_set_server_name": ("enter_set_host", None),
    "mono_btls_ssl_destroy": ("enter_free", None),
    "mono_btls_ssl_shutdown": ("enter_shutdown", None),
}


_GO = ("enter_go_read", "enter_go_write", "leave_go_read", "leave_go_write", "enter_go_close")


def _unprobed(name: str) -> str:
    return f"{name} is not probed; {INSTEAD}"


# Symbols are looked for in this order, then markers; what is not probed is reported only if nothing
# else is.
STACKS: Mapping[Stack, Row] = {
    Stack.BORINGSSL: Row(
        symbols=_SSL,
        markers=(b"ssl/ssl_lib.cc\0",),
        finder="capture.functions.finder.boringssl",
        partly_known=True,
    ),
    Stack.OPENSSL: Row(
        symbols=_SSL,
        needed=(("SSL_write", "SSL_read"), ("SSL_write_ex", "SSL_read_ex")),
        markers=(b"ssl/ssl_lib.c\0",),  # or BoringSSL of 2023 and before
        finder="capture.functions.finder.openssl",
        partly_known=True,
    ),
    Stack.GNUTLS: Row(
        symbols=_GNUTLS,
        needed=(("gnutls_record_send", "gnutls_record_recv"),),
        markers=(b"GNUTLS_E_UNEXPECTED_HANDSHAKE_PACKET\0",),
        advice=_unprobed("GnuTLS that is linked into the program"),
    ),
    Stack.NSS: Row(
        symbols=_NSS,
        needed=(("PR_Write", "PR_Read"), ("SSL_SetURL",)),
        markers=(b"SSL_ERROR_NO_CYPHER_OVERLAP\0",),
        advice=_unprobed("NSS that is linked into the program"),
    ),
    Stack.MBEDTLS: Row(
        symbols=_MBEDTLS,
        needed=(("mbedtls_ssl_write", "mbedtls_ssl_read"),),
        markers=(b"mbedtls_ssl_fetch_input\0",),
        advice=_unprobed("mbedTLS that is linked into the program"),
    ),
    Stack.WOLFSSL: Row(
        symbols=_WOLFSSL,
        needed=(("wolfSSL_write", "wolfSSL_read"),),
        markers=(b"handshake layer not ready yet, complete first\0",),
        advice=_unprobed("wolfSSL that is linked into the program"),
    ),
    Stack.S2N: Row(
        symbols=_S2N,
        needed=(("s2n_send", "s2n_recv"),),
        markers=(b"S2N_ERR_T_PROTO\0",),
        advice=_unprobed("s2n that is linked into the program"),
    ),
    Stack.BTLS: Row(symbols=_BTLS, needed=(("mono_btls_ssl_write", "mono_btls_ssl_read"),)),
    Stack.GO: Row(
        programs=_GO,
        markers=(b"\xff Go buildinf:",),
        finder="capture.functions.finder.golang",
        ahead=False,  # a machine has many Go programs, of some twenty probes each
    ),
    # utls and its like: only Go's finder tells them, by the package that has the functions.
    Stack.GO_FORK: Row(
        programs=_GO,
        advice=f"this fork of crypto/tls is not probed; if it follows proxy settings, {INSTEAD}",
    ),
    Stack.RUSTLS: Row(
        needed=(("rustls_connection_write", "rustls_connection_read"),),
        programs=("enter_rustls_send", "enter_rustls_receive", "leave_rustls_receive"),
        markers=(b"rustls",),
        finder="capture.functions.finder.rustls",
        advice=_unprobed("this build of rustls"),
    ),
    Stack.BEARSSL: Row(needed=(("br_ssl_engine_sendapp_buf",),), advice=_unprobed("BearSSL")),
    Stack.BOTAN: Row(markers=(b"N5Botan3TLS6ClientE\0",), advice=_unprobed("Botan")),
    Stack.ERLANG: Row(
        needed=(("enif_send", "enif_alloc"),),
        advice=f"Erlang's own TLS is not probed; {INSTEAD}, and set the client's proxy option",
    ),
    Stack.JSSE: Row(
        library="libjvm.so",
        markers=(b"sun.security.ssl.SSLSocketImpl\0",),
        advice=_unprobed("Java's own TLS"),
    ),
    # What RFC 5246 and 8446 have every implementation put into its keys.
    Stack.OTHER: Row(
        markers=(b"client finished", b"c ap traffic"), advice=f"its TLS is not probed; {INSTEAD}"
    ),
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

AT_RETURN = frozenset(
    program for row in STACKS.values() for _, program in row.symbols.values() if program
)
"""Programs of return probes. One in a Go program would crash it: where each belongs is fixed."""
