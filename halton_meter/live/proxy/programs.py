"""The programs behind the proxy's clients: process, name, TLS library.

Read from the kernel and from /proc as the user, so what another user runs is not known. Nothing of
an environment is looked at, but HALTON_PROJECT.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halton_meter.model import Process
    from proxy_fallback.edge.client_socket import ClientSocket

# Options by which a program is told what to trust: with one, it is another program to us.
TRUST_OPTIONS = frozenset(
    {
        *("--cacert", "--capath", "--pinnedpubkey", "--proxy-cacert"),  # curl
        *("--ca-certificate", "--ca-directory", "--config", "--no-config"),  # wget
        *("--x509cafile", "--tofu", "-CAfile", "-CApath"),  # gnutls-cli, openssl
        *("--cert", "--verify", "--use-openssl-ca", "--use-bundled-ca"),  # HTTPie, Node
    }
)
_INTERPRETER = re.compile(
    r"(python|pypy|node|nodejs|bun|deno|ruby|perl|php|lua|luajit|julia|java|mono|Rscript|tclsh"
    r"|sh|bash|dash|zsh|fish)[\d.]*"
)
# Names of libraries' files, and the TLS library that each holds. The first that is mapped is it.
_LIBRARIES: Mapping[str, str] = {
    "libgnutls": "GnuTLS",
    "libssl3.so": "NSS",
    "libmbedtls": "mbedTLS",
    "libwolfssl": "wolfSSL",
    "libjvm": "JSSE",
    "libssl": "OpenSSL",
    "crypto.so": "Erlang ssl",
}
_LIBRARY = re.compile("|".join(re.escape(name) for name in _LIBRARIES))


def process_of(end: ClientSocket) -> Process | None:
    """The process behind a client's socket, or None."""
    if sys.platform == "darwin":
        from capture.processes.arguments import without_secrets
        from proxy_fallback.mitm import owner_macos

        return owner_macos.process_of(end, without_secrets)
    from capture.processes.proc import read_process
    from proxy_fallback.edge.owner import owner_pid

    asked_ns = time.time_ns()
    pid = owner_pid(end)
    process = None if pid is None else read_process(pid)
    # It had the socket by then: a process that began later only has the same pid.
    return None if process is None or process.started_ns > asked_ns else process


def program_of(process: Process | None) -> str | None:
    """What to call the program of a process: its file, and for an interpreter the script too.

    Each program decides which CAs it trusts, and a script decides apart from its interpreter. A
    script in a hidden folder is named without the folder. Options that say what to trust are
    named without their values.
    """
    if process is None or process.exe is None:
        return None
    return " ".join([_file_of(process), *trust_options(process)])


def trust_options(process: Process) -> list[str]:
    """The options, without their values, by which a process was told what to trust."""
    given = {word.partition("=")[0] for word in process.argv[1:]}
    return sorted(given & TRUST_OPTIONS)


def is_interpreter(exe: str) -> bool:
    """Whether a program runs scripts, so that its first argument may be one."""
    return _INTERPRETER.fullmatch(os.path.basename(exe)) is not None


def _file_of(process: Process) -> str:
    from capture.processes.arguments import REDACTED

    assert process.exe is not None
    if not is_interpreter(process.exe):
        return process.exe
    words = [word for word in process.argv[1:] if not word.startswith("-") and word != REDACTED]
    if words and words[0].startswith(f"{REDACTED}/"):
        return f"{process.exe} {words[0]}"
    script = Path(process.cwd or "/", words[0]) if words else None
    with contextlib.suppress(OSError, ValueError):
        if script is not None and script.is_file():
            return f"{process.exe} {script}"
    return process.exe


def tls_libraries(pid: int) -> frozenset[str]:
    """The TLS libraries that a process maps as files; empty where that cannot be read."""
    from capture.processes.mappings import executable_mappings

    found = set()
    for mapping in executable_mappings(pid) or ():
        match = _LIBRARY.match(os.path.basename(mapping.path))
        if match is not None:
            found.add(_LIBRARIES[match[0]])
    return frozenset(found)


def tls_library(pid: int) -> str | None:
    """The TLS library of a process, as far as files tell: None for none, or for several."""
    found = tls_libraries(pid)
    return next(iter(found)) if len(found) == 1 else None
