"""Tells the edge how programs take our certificate, and knows some that cannot trust it.

Most programs read from a variable what they trust. GnuTLS reads none: who uses it trusts the
system's roots, or what the program's own settings name. Such a program would end its handshake
with us, and give up. Its connection is passed on unread instead, before the first attempt fails,
and counted. Others that refuse are noticed by what they do (`proxy_fallback/mitm/handshakes.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.live.proxy.programs import (
    CERTIFICATE,
    client_of,
    tls_libraries,
    tls_library,
    trust_options,
)
from proxy_fallback.mitm.handshakes import Taken
from proxy_fallback.setup.trust import SYSTEM_ROOT_FILES

if TYPE_CHECKING:
    from halton_meter.model import Process

# An extension of ClientHello (RFC 8449) that GnuTLS always sends, and OpenSSL, BoringSSL, Go,
# rustls and Java never do.
_RECORD_SIZE_LIMIT = 28
# Programs that follow our variables, also where they use GnuTLS: `run` sets more of them.
_FOLLOW_ALWAYS = frozenset({"curl", "lynx"})
# Of two settings wget adds either option's roots to what the other one names in our file.
_ADDING = {"wget": frozenset({"--ca-certificate"})}
_FOLLOW_IN_RUN = _FOLLOW_ALWAYS | {"wget", "git-remote-https", "git-remote-http"}


class Trust:
    """How clients take our certificate. `send` takes messages to the edge."""

    def __init__(self, send: Callable[[dict[str, Any]], None], service: bool, ca: Path) -> None:
        self._send = send
        self._in_run = not service
        self._follow = _FOLLOW_ALWAYS if service else _FOLLOW_IN_RUN
        self._in_system = _is_in_system(ca / CERTIFICATE)

    def refused(self, host: str, process: Process | None, said: bool) -> None:
        """A client refused our certificate, or hung up on it during the handshake."""
        self._tell("refused", host, process, said)

    def left(self, host: str, process: Process | None, how: Taken) -> None:
        """A client went after the handshake, without a request."""
        if how is Taken.REFUSED:
            self._tell("refused", host, process, True)
        elif how is not Taken.UNUSED:
            self._tell("left", host, process, how is Taken.LEFT_PROMPTLY)

    def trusted(self, host: str, process: Process | None) -> None:
        """A client began a request."""
        self._send({"trusted": [host, client_of(process, self._in_run)]})

    def done(self, host: str) -> None:
        """All is said about one client's connection to this host."""
        self._send({"judged": host})

    def opened(self, address: str, port: int) -> None:
        """We connected to a provider, from here."""
        self._send({"opened": [address, port]})

    def untrusting(self, host: str, process: Process | None, kinds: frozenset[int]) -> bool:
        """Whether a client's TLS library cannot trust us; then this is told to the edge, too."""
        if self._in_system or process is None or process.exe is None:
            return False
        if Path(process.exe).name in self._follow and not _is_told_otherwise(process):
            return False
        libraries = tls_libraries(process.pid)
        alone = libraries == {"GnuTLS"}
        if "GnuTLS" not in libraries or not (alone or _RECORD_SIZE_LIMIT in kinds):
            return False
        self._send({"passed": [host, client_of(process, self._in_run)], "stack": "GnuTLS"})
        return True

    def _tell(self, what: str, host: str, process: Process | None, certain: bool) -> None:
        library = tls_library(process.pid) if process is not None else None
        self._send({what: [host, client_of(process, self._in_run), certain], "stack": library})


def _is_told_otherwise(process: Process) -> bool:
    """Whether a program's own options go before what our variables tell it."""
    given = set(trust_options(process))
    if given and given <= _ADDING.get(Path(process.exe or "").name, frozenset()):
        return False
    return bool(given)


def _is_in_system(certificate: Path) -> bool:
    """Whether the system's own roots have our CA among them (`init --system-trust`)."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        ours = "".join(certificate.read_text().split())
        for file in SYSTEM_ROOT_FILES:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if ours and ours in "".join(Path(file).read_text().split()):
                    return True
    return False
